"""Garbage in every argument: what comes out is a value, or an error that names the argument and tells what it got."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import cot_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*got 2 classes"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]

CALLS: dict[Any, tuple[str, ...]] = {
    cot_kernels.complement_entropy: ("ignore_index", "reduction", "eps", "normalization"),
    cot_kernels.guided_complement_entropy: ("alpha", "ignore_index", "reduction", "eps"),
    cot_kernels.complement_cross_entropy: ("gamma", "normalization", "ignore_index", "reduction"),
    cot_kernels.cross_entropy: ("ignore_index", "reduction"),
    cot_kernels.complement_statistics: ("ignore_index",),
    cot_kernels.ComplementEntropy: ("num_classes", "ignore_index", "reduction", "eps", "normalization"),
    cot_kernels.GuidedComplementEntropy: ("num_classes", "alpha", "ignore_index", "reduction", "eps"),
    cot_kernels.ComplementCrossEntropy: ("num_classes", "gamma", "normalization", "ignore_index", "reduction"),
}


class Subclass(Tensor):
    pass


DTYPES = [each for each in vars(torch).values() if isinstance(each, torch.dtype)]
PLAIN = [getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8")]

shapes = st.sampled_from(
    [(2, 3), (2,), (2, 3), (2,), (), (3,), (2, 2), (0, 3), (2, 0), (2, 1), (2, 3, 2), (1, 0, 5, 2)]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.fractions(),
    st.decimals(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.sampled_from(
        [10**400, -(10**400), 2**63, -(2**63), 1e300, math.inf, math.nan, -0.0, Fraction(10**400), Decimal(1)]
    ),
    st.sampled_from(["mean", "sum", "none", "classes", "complement", "entropy", "Mean", "batchmean"]),
    st.sampled_from([numpy.float32(0.5), numpy.float16(2), numpy.int64(3), numpy.bool_(True), numpy.str_("mean")]),
    st.sampled_from([numpy.ones((2, 3)), numpy.array(["mean", "sum"]), numpy.array(3), numpy.array("mean")]),
    st.sampled_from([int, torch, torch.float32, torch.device("cpu"), len, ..., NotImplemented, object()]),
)
containers = st.one_of(st.lists(scalars, max_size=3), st.tuples(scalars), st.dictionaries(st.text(max_size=2), scalars))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any kind: most are wrong somewhere, some are right."""
    kind = draw(
        st.sampled_from(["plain", "plain", "odd dtype", "layout", "nested", "quantized", "view", "class", "grad"])
    )
    shape = draw(shapes)
    dtype = draw(st.sampled_from(PLAIN))
    tensor = torch.full(shape, draw(st.sampled_from([0, 1, 2, 7])), dtype=dtype)
    if kind == "odd dtype":
        return torch.empty(shape, dtype=draw(st.sampled_from(DTYPES)), device=draw(st.sampled_from(["cpu", "meta"])))
    if kind == "layout":
        dense = tensor if tensor.dim() == 2 else torch.eye(2, 3, dtype=dtype)
        return draw(st.sampled_from([Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_sparse_csc]))(dense)
    if kind == "nested":
        layout = draw(st.sampled_from([torch.jagged, torch.strided]))
        return torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], dtype=dtype, layout=layout)
    if kind == "quantized":
        return torch.quantize_per_tensor(torch.ones(shape), 0.5, 1, torch.qint8)
    if kind == "view":
        return draw(
            st.sampled_from([tensor[..., None].expand(*shape, 2)[..., 1], tensor.t() if len(shape) == 2 else tensor])
        )
    if kind == "class":
        wrap = torch.nn.Parameter if tensor.is_floating_point() else torch.nn.Buffer
        return draw(st.sampled_from([tensor.as_subclass(Subclass), wrap(tensor)]))
    if kind == "grad" and tensor.is_floating_point():
        return tensor.requires_grad_()
    return tensor.to(draw(st.sampled_from(["cpu", "cpu", "cpu", "meta"])))


garbage = scalars | containers


@st.composite
def calls(draw: st.DrawFn, names: tuple[str, ...]) -> tuple[dict[str, Any], set[str]]:
    """Arguments of a call that is right but for the one or two that are named, which hold anything."""
    wrong = draw(st.sets(st.sampled_from(("input", "target", *names)), min_size=1, max_size=2))
    arguments: dict[str, Any] = {"input": torch.ones(2, 3), "target": torch.tensor([0, 1])}
    for name in sorted(wrong):
        tensor = draw(st.integers(0, 4)) > (0 if name in arguments else 3)  # one in five, or four where one is wanted
        arguments[name] = draw(tensors() if tensor else garbage)
    return arguments, wrong


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@settings(max_examples=settings.default.max_examples * 2)
@given(data=st.data())
def test_garbage(call: Any, data: st.DataObject) -> None:
    options, wrong = data.draw(calls(CALLS[call]))
    try:
        if isinstance(call, type):
            tensors = {name: options.pop(name) for name in ("input", "target")}
            loss = call(**options)
            result = loss(**tensors)
        else:
            tensors = options
            result = call(**options)
    except (TypeError, ValueError, IndexError) as error:
        message = str(error)
        assert any(re.search(rf"\b{name}\b", message) for name in wrong), f"{message!r} names none of {wrong}"
        assert re.search("got|divides by|out of bounds for", message), f"{message!r} does not tell what it got"
        return
    assert tensors["target"].device == tensors["input"].device
    values = result if isinstance(result, tuple) else (result,)
    for value in values:
        assert isinstance(value, Tensor) and value.device == tensors["input"].device
        assert value.dtype == (torch.float64 if tensors["input"].dtype == torch.float64 else torch.float32)
    if values[0].requires_grad:
        torch.autograd.backward(values, [torch.ones_like(value) for value in values])
