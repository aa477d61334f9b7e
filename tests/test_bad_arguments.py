"""Everything that is refused, and the message it is refused with."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from linear_problems import problem
from oracle import draw

import cot_kernels

WORDS = numpy.array(["mean", "classes"])  # compared with a word, an array has no truth value

BAD_CALLS: list[tuple[type[Exception], str, tuple[Any, Any], dict[str, Any]]] = [
    (TypeError, "input must be a Tensor, got list", ([[1.0, 2.0]], torch.tensor([0])), {}),
    (TypeError, "target must be a Tensor, got int", (torch.zeros(2, 3), 1), {}),
    (TypeError, "input must be float32, .* got torch.int64", (torch.zeros(2, 3).long(), torch.zeros(2).long()), {}),
    (TypeError, "got torch.complex64", (torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2).long()), {}),
    (TypeError, "integer class indices, got torch.float32; class prob", (torch.zeros(2, 3), torch.zeros(2, 3)), {}),
    (TypeError, "integer class indices, got torch.bool", (torch.zeros(2, 3), torch.zeros(2).bool()), {}),
    (ValueError, "got a scalar", (torch.tensor(1.0), torch.tensor(0)), {}),
    (ValueError, r"target must have shape \(2,\) .* got \(3,\)", (torch.zeros(2, 3), torch.zeros(3).long()), {}),
    (ValueError, r"target must have shape \(\) .* got \(1,\)", (torch.zeros(3), torch.zeros(1).long()), {}),
    (ValueError, r"shape \(2, 4\) .* got \(4, 2\)", (torch.zeros(2, 3, 4), torch.zeros(4, 2).long()), {}),
    (
        ValueError,
        r"got \(2, 3\): classes are dimension 1, use input.movedim\(-1, 1\)",
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).long()),
        {},
    ),
    (ValueError, "at least 2 classes, got 1", (torch.zeros(2, 1), torch.zeros(2).long()), {}),
    (ValueError, "at least 2 classes, got 0", (torch.zeros(2, 0), torch.zeros(2).long()), {}),
    (
        ValueError,
        "reduction must be one of .* got 'avg'",
        (torch.zeros(2, 3), torch.zeros(2).long()),
        {"reduction": "avg"},
    ),
    (TypeError, "ignore_index must be an int", (torch.zeros(2, 3), torch.zeros(2).long()), {"ignore_index": 1.5}),
]


@pytest.mark.parametrize(("error", "message", "arguments", "options"), BAD_CALLS, ids=[row[1] for row in BAD_CALLS])
@pytest.mark.parametrize(
    "loss",
    [
        cot_kernels.complement_entropy,
        cot_kernels.guided_complement_entropy,
        cot_kernels.complement_cross_entropy,
        cot_kernels.cross_entropy,
    ],
)
def test_bad_input(
    loss: Any, error: type[Exception], message: str, arguments: tuple[Any, Any], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        loss(*arguments, **options)


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (cot_kernels.complement_entropy, {"eps": -1e-7}, ValueError, "eps must be at least 0, got -1e-07"),
        (cot_kernels.complement_entropy, {"eps": math.nan}, ValueError, "eps must be finite, got nan"),
        (cot_kernels.complement_entropy, {"eps": "1e-7"}, TypeError, "eps must be a number, got str"),
        (cot_kernels.complement_entropy, {"eps": 10**400}, ValueError, "eps must be finite, got 1000"),
        (cot_kernels.complement_entropy, {"eps": 1e300}, ValueError, r"eps must be at most 1e\+30 in magnitude"),
        (cot_kernels.complement_cross_entropy, {"gamma": -1e39}, ValueError, r"gamma must be at most 1e\+30"),
        (cot_kernels.complement_entropy, {"eps": True}, TypeError, "eps must be a number, got bool"),
        (cot_kernels.complement_entropy, {"ignore_index": True}, TypeError, "ignore_index must be an int, got bool"),
        (cot_kernels.complement_entropy, {"ignore_index": 2**70}, ValueError, "ignore_index must fit in 64 bits"),
        (cot_kernels.complement_entropy, {"normalization": "K"}, ValueError, "normalization must be one of .* got 'K'"),
        (cot_kernels.guided_complement_entropy, {"alpha": -0.1}, ValueError, "alpha must be at least 0"),
        (cot_kernels.guided_complement_entropy, {"eps": -1.0}, ValueError, "eps must be at least 0"),
        (cot_kernels.complement_cross_entropy, {"gamma": math.inf}, ValueError, "gamma must be finite, got inf"),
        (cot_kernels.complement_cross_entropy, {"normalization": None}, ValueError, "normalization must be one of"),
        (
            cot_kernels.complement_entropy,
            {"normalization": WORDS},
            ValueError,
            "normalization must be one of .* ndarray",
        ),
        (cot_kernels.complement_entropy, {"reduction": WORDS}, ValueError, "reduction must be one of .* got ndarray"),
    ],
)
def test_bad_options(loss: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), **options)


def test_tensors_that_are_not_dense_are_refused() -> None:
    target = torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match=r"input must be a dense tensor, got layout torch\.sparse_coo"):
        cot_kernels.complement_entropy(torch.eye(2, 3).to_sparse(), target)
    with pytest.raises(TypeError, match="target must be a dense tensor"):
        cot_kernels.complement_entropy(torch.eye(2, 3), target.to_sparse())


def test_nested_tensors_are_refused() -> None:
    logits, target = torch.eye(2, 3), torch.zeros(2, dtype=torch.long)
    nested = [
        torch.nested.nested_tensor(list(each), layout=torch.jagged) for each in (logits, torch.stack([target] * 2))
    ]
    with pytest.raises(TypeError, match="input must be a dense tensor, got a nested one"):
        cot_kernels.complement_entropy(nested[0], target)
    with pytest.raises(TypeError, match="target must be a dense tensor, got a nested one"):
        cot_kernels.complement_entropy(logits, nested[1])
    with pytest.raises(TypeError, match="input must be a dense tensor, got a nested one"):
        cot_kernels.ComplementEntropy(3)(nested[0], target)


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="input and target must be on one device, got cpu and meta"):
        cot_kernels.complement_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long, device="meta"))


def test_numbers_of_numpy_are_numbers() -> None:
    logits, target = draw(4, 6, None)
    expected = cot_kernels.complement_entropy(logits, target, eps=1e-3)
    assert cot_kernels.complement_entropy(logits, target, eps=numpy.float64(1e-3)) == expected  # type: ignore[arg-type]


BAD_LINEAR: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": 3}, TypeError, "input must be a Tensor, got int"),
    (
        {"input": torch.zeros(13, 8, dtype=torch.long)},
        TypeError,
        "input must be float32, .* hidden states, got torch.int64",
    ),
    ({"input": torch.tensor(1.0)}, ValueError, "input must have shape .* got a scalar"),
    ({"linear_weight": torch.zeros(37, 9)}, ValueError, r"linear_weight must have shape \(K, 8\) .* got \(37, 9\)"),
    ({"linear_weight": torch.zeros(8)}, ValueError, r"linear_weight must have shape \(K, 8\)"),
    ({"linear_weight": torch.zeros(1, 8)}, ValueError, "linear_weight must have at least 2 classes, got 1"),
    ({"linear_weight": torch.zeros(37, 8).double()}, TypeError, "linear_weight must have the dtype of input"),
    ({"linear_weight": None}, TypeError, "linear_weight must be a Tensor, got NoneType"),
    ({"linear_bias": torch.zeros(36)}, ValueError, r"linear_bias must have shape \(37,\)"),
    ({"linear_bias": [0.0]}, TypeError, "linear_bias must be a Tensor, got list"),
    ({"target": torch.zeros(12).long()}, ValueError, r"target must have shape \(13,\)"),
    ({"target": torch.zeros(13, 37)}, TypeError, "class probabilities are not supported"),
    ({"target": torch.zeros(13).long().to("meta")}, ValueError, "input and target must be on one device"),
    ({"reduction": "average"}, ValueError, "reduction must be one of mean, sum, none, got 'average'"),
    ({"normalization": "K"}, ValueError, "normalization must be one of"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
    ({"memory_budget": 0}, ValueError, "memory_budget must be at least 1 byte, got 0"),
    ({"memory_budget": 1e6}, TypeError, "memory_budget must be None or an int, in bytes, got float"),
    ({"gamma": float("nan")}, ValueError, "gamma must be finite, got nan"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LINEAR, ids=lambda value: str(value)[:40])
def test_bad_arguments_of_the_linear_losses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    input, weight, bias, target = problem(dtype=torch.float32)
    arguments: dict[str, Any] = {"input": input, "linear_weight": weight, "target": target, "linear_bias": bias}
    with pytest.raises(error, match=message):
        cot_kernels.linear_complement_cross_entropy(**{**arguments, **change})


def test_bad_eps_of_the_linear_losses() -> None:
    input, weight, _, target = problem()
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        cot_kernels.linear_complement_entropy(input, weight, target, eps=-1)
