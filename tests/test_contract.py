"""The API contract: shapes, strides, dtypes, reductions, ignored rows, upstream gradients, and every bad input."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from oracle import CASES, Case, draw, gradient_of, relative_error
from oracle import complement_entropy as oracle_loss
from torch import Tensor
from torch.nn import functional as F

import cot_kernels
from cot_kernels.backends.native import backend as native
from cot_kernels.backends.triton import launch
from cot_kernels.dispatch import _as_rows


@pytest.mark.parametrize(
    "shape", [(5,), (4, 5), (0, 5), (3, 5, 2), (2, 5, 3, 4), (2, 1100, 3), (0, 5, 2), (2, 5, 0)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_are_those_of_cross_entropy(
    case: Case, shape: tuple[int, ...], reduction: str, device: torch.device
) -> None:
    classes = shape[1] if len(shape) > 1 else shape[0]
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.randint(
        classes, (*shape[:1], *shape[2:]) if len(shape) > 1 else (), generator=torch.Generator().manual_seed(1)
    )
    rows = logits.movedim(1, -1).reshape(-1, classes) if len(shape) > 1 else logits[None]
    leaf, rows = logits.to(device).requires_grad_(), rows.requires_grad_()

    loss = case.loss(leaf, target.to(device), reduction=reduction)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    assert loss.shape == expected.shape
    published = case.published(rows, target.reshape(-1), reduction=reduction)
    torch.testing.assert_close(loss.cpu(), published.reshape(loss.shape), rtol=1e-9, atol=1e-11, equal_nan=True)
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    true = torch.autograd.grad(published.sum(), rows)[0]
    true = true.reshape(*shape[:1], *shape[2:], classes).movedim(-1, 1) if len(shape) > 1 else true[0]
    assert gradient.shape == logits.shape
    torch.testing.assert_close(gradient.cpu(), true.nan_to_num(), rtol=1e-7, atol=1e-11)


def strided(name: str, rows: int, classes: int) -> Tensor:
    """Logits of one value in the memory layout that the name tells."""
    dense = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))
    if name == "transposed":
        return dense.t().contiguous().t()
    if name == "every other row":
        return dense.repeat_interleave(2, 0)[::2]
    if name == "every other class":
        return dense.repeat_interleave(2, 1)[:, ::2]
    if name == "off a boundary":
        return torch.cat((torch.zeros(rows, 1), dense), 1)[:, 1:]
    if name == "storage offset":
        return torch.cat((torch.zeros(3), dense.flatten()))[3:].view(rows, classes)
    if name == "expanded":
        return dense[:1].expand(rows, classes)
    return dense


LAYOUTS = [
    "dense",
    "transposed",
    "every other row",
    "every other class",
    "off a boundary",
    "storage offset",
    "expanded",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [7, 1000, 1031])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(layout: str, classes: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = strided(layout, 6, classes)
    target = torch.randint(classes, (6,), generator=torch.Generator().manual_seed(1))
    moved = strided(layout, 6, classes).to(device).to(dtype) if layout == "dense" else None
    if moved is None:
        moved = torch.empty_strided((6, classes), logits.stride(), dtype=dtype, device=device)
        if layout == "expanded":
            moved = logits[:1].to(dtype).to(device).expand(6, classes)
        else:
            moved.copy_(logits)
    leaf = moved.detach().requires_grad_()
    loss = cot_kernels.complement_entropy(leaf, target.to(device))
    (gradient,) = torch.autograd.grad(loss, leaf)
    dense = moved.detach().cpu().double().contiguous().requires_grad_()
    true = cot_kernels.reference.complement_entropy(dense, target)
    (true_gradient,) = torch.autograd.grad(true, dense)
    assert loss.item() == pytest.approx(true.item(), abs=1e-6)
    assert relative_error(gradient, true_gradient) < (2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("classes", [10, 1030, 5000])
def test_logits_expanded_along_the_classes(classes: int, device: torch.device) -> None:
    """One number a row in memory: nothing may be read past it."""
    leaf = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    target = torch.arange(4, device=device)
    logits = leaf.expand(4, classes)
    loss = cot_kernels.cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(math.log(classes), rel=1e-6)
    expected = (torch.full((4, classes), 1 / classes) - F.one_hot(target.cpu(), classes)) / 4
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-5, atol=1e-8)


def test_signs_that_are_still_to_change(device: torch.device) -> None:
    """The imaginary part of a conjugate is a view of numbers of the other sign, marked as such."""
    logits, target = draw(4, 9, None)
    weights = torch.linspace(-1, 2, 4, dtype=torch.float64)
    loss, gradient = gradient_of(cot_kernels.complement_cross_entropy, logits.to(device), target.to(device), weights)

    def view(values: Tensor) -> Tensor:
        return torch.complex(values, -values).to(device).conj().imag

    assert view(logits).is_neg()
    leaf = view(logits).requires_grad_()
    again = cot_kernels.complement_cross_entropy(leaf, target.to(device), reduction="none")
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(torch.autograd.grad(again, leaf, view(weights))[0], gradient)


def test_channels_last_segmentation(device: torch.device) -> None:
    logits = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    target = torch.randint(6, (2, 5, 7), generator=torch.Generator().manual_seed(1))
    leaf = logits.to(device).requires_grad_()
    loss = cot_kernels.complement_entropy(leaf, target.to(device))
    dense = logits.double().contiguous().requires_grad_()
    true = cot_kernels.reference.complement_entropy(dense, target)
    assert loss.item() == pytest.approx(true.item(), abs=1e-7)
    assert relative_error(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(true, dense)[0]) < 2e-6


def test_channels_last_logits_are_taken_as_rows_without_a_copy() -> None:
    logits = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    rows, target = _as_rows(logits, torch.zeros(2, 5, 7, dtype=torch.long))
    assert rows.shape == (70, 6) and rows.is_contiguous() and rows.data_ptr() == logits.data_ptr()
    assert target.shape == (70,)
    # Channels last within each image, but images apart: not rows of one matrix.
    apart = torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last)[::2]
    rows, _ = _as_rows(apart, torch.zeros(2, 5, 7, dtype=torch.long))
    torch.testing.assert_close(rows.flatten(), apart.flatten(2).flatten())


@pytest.mark.parametrize("order", [(0, 1, 3, 2, 4), (0, 1, 4, 2, 3), (2, 4, 0, 3, 1), (3, 1, 0, 4, 2)])
def test_trailing_dimensions_in_any_order(order: tuple[int, ...], device: torch.device) -> None:
    logits = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).permute(order)
    classes, *rows = logits.shape[1], logits.shape[0], *logits.shape[2:]
    target = torch.randint(classes, rows, generator=torch.Generator().manual_seed(1))
    leaf = logits.to(device).requires_grad_()
    assert leaf.stride() == logits.stride()
    upstream = torch.randn(rows)
    dense = logits.double().contiguous().requires_grad_()
    true = cot_kernels.reference.complement_entropy(dense, target, reduction="none")
    loss = cot_kernels.complement_entropy(leaf, target.to(device), reduction="none")
    torch.testing.assert_close(loss.cpu().double(), true, rtol=1e-5, atol=1e-7)
    gradient = torch.autograd.grad(loss, leaf, upstream.to(device))[0]
    assert relative_error(gradient, torch.autograd.grad(true, dense, upstream.double())[0]) < 2e-6
    for value, expected in zip(
        cot_kernels.complement_statistics(leaf, target.to(device)),
        cot_kernels.complement_statistics(dense.to(device), target.to(device)),
        strict=True,
    ):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 3, 1, 2), (0, 3, 2, 1), (3, 0, 2, 1)])
def test_transposed_trailing_dimensions_are_read_where_they_are(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(2, 6, 5, 7).permute(order)
    seen = []
    monkeypatch.setattr(native, "loss", lambda logits, *rest: seen.append(logits) or (logits.sum(), ()))
    cot_kernels.cross_entropy(logits, torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.long))
    assert seen[0].data_ptr() == logits.data_ptr() and seen[0].numel() == logits.numel()


UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", [*UNSIGNED, torch.int8, torch.int16, torch.int32, torch.int64])
def test_targets_of_any_integer_dtype(dtype: torch.dtype, device: torch.device) -> None:
    logits, target = draw(4, 9, None)
    expected = cot_kernels.complement_entropy(logits.to(device), target.to(device))
    assert torch.equal(cot_kernels.complement_entropy(logits.to(device), target.to(dtype).to(device)), expected)


def test_an_ignore_index_beyond_the_targets_dtype_ignores_none(device: torch.device) -> None:
    """261 wraps to 5 in int8: for the count of a mean, for compiled code and for second derivatives."""
    logits, target = draw(6, 9, 1.0)
    logits, target = logits.to(device), torch.tensor([5, 5, 1, 2, 3, 4], device=device)
    small = target.to(torch.int8)
    loss = partial(cot_kernels.cross_entropy, ignore_index=261)
    expected = loss(logits, target)
    assert torch.equal(loss(logits, small), expected)
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(logits, small), expected)
    weight = torch.eye(9, dtype=logits.dtype, device=device)
    linear = cot_kernels.linear_complement_cross_entropy(logits, weight, small, gamma=0.0, ignore_index=261)
    torch.testing.assert_close(linear, expected)
    leaf = logits.requires_grad_()
    first = torch.autograd.grad(loss(leaf, small), leaf)[0]
    second = torch.autograd.grad(loss(leaf, small), leaf, create_graph=True)[0]
    torch.testing.assert_close(first, second)


def test_bytes_as_targets_are_never_ignored_by_a_negative_index(device: torch.device) -> None:
    """-100 wraps to 156 in uint8. Eager, compiled, under a transform, linear and as statistics."""
    logits, target = draw(3, 200, None)
    target[1] = 156
    logits, target = logits.to(device), target.to(device)
    small = target.to(torch.uint8)
    loss = cot_kernels.complement_entropy
    expected = loss(logits, target, reduction="none")
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        torch.testing.assert_close(function(logits, small, reduction="none"), expected)
    torch.testing.assert_close(torch.func.vmap(loss)(logits, small), expected)
    torch.testing.assert_close(torch.func.jvp(lambda z: loss(z, small), (logits,), (logits,))[0], expected.mean())
    statistics = cot_kernels.complement_statistics
    torch.testing.assert_close(tuple(statistics(logits, small)), tuple(statistics(logits, target)))
    linear = cot_kernels.linear_complement_entropy
    identity = torch.eye(200, dtype=logits.dtype, device=device)
    torch.testing.assert_close(linear(logits, identity, small, reduction="none"), expected)


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
def test_nothing_reaches_an_ignored_row(upstream: float, device: torch.device) -> None:
    logits, target = draw(4, 9, None)
    target[1] = -100
    leaf = logits.to(device).requires_grad_()
    loss = cot_kernels.complement_entropy(leaf, target.to(device), reduction="none")
    per_row = torch.ones_like(loss)
    per_row[1] = upstream
    (gradient,) = torch.autograd.grad(loss, leaf, per_row)
    assert gradient[1].eq(0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 2, 255])
@pytest.mark.parametrize("classes", [5, 1100])
def test_ignored_rows(case: Case, ignore_index: int, classes: int, device: torch.device) -> None:
    logits, target = draw(6, classes, None)
    target = torch.where(target == ignore_index, ignore_index + 1, target)
    ignored = torch.tensor([False, True, False, True, True, False])
    target[ignored] = ignore_index
    logits[1] = torch.nan  # whatever an ignored row holds
    logits[3] = torch.inf
    for reduction in ("mean", "sum", "none"):
        leaf = logits.to(device).requires_grad_()
        loss = case.loss(leaf, target.to(device), ignore_index=ignore_index, reduction=reduction)
        kept = logits[~ignored].requires_grad_()
        published = case.published(kept, target[~ignored], reduction=reduction)
        got = loss.cpu() if reduction != "none" else loss.cpu()[~ignored]
        torch.testing.assert_close(got, published, rtol=1e-9, atol=1e-11)
        if reduction == "none":
            assert loss.cpu()[ignored].tolist() == [0.0, 0.0, 0.0]
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert gradient[ignored.to(device)].abs().max().item() == 0
        (true,) = torch.autograd.grad(published.sum(), kept)
        assert relative_error(gradient[~ignored.to(device)], true) < 1e-7


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_to_average(case: Case, device: torch.device) -> None:
    """All rows ignored, and no rows at all: NaN for the mean and 0 for the sum, as F.cross_entropy; zero gradients."""
    for rows in (3, 0):
        leaf = torch.randn(rows, 5, device=device).requires_grad_()
        target = torch.full((rows,), -100, device=device)
        for reduction in ("mean", "sum"):
            loss = case.loss(leaf, target, reduction=reduction)
            assert torch.equal(loss.isnan(), F.cross_entropy(leaf, target, reduction=reduction).isnan())
            assert torch.autograd.grad(loss, leaf)[0].abs().sum().item() == 0


@pytest.mark.parametrize("wrong", [-1, 5, 2**31, -(2**40)])
def test_targets_out_of_range(wrong: int, device: torch.device, request: pytest.FixtureRequest) -> None:
    target = torch.tensor([1, wrong, 2], device=device)
    leaf = torch.randn(3, 5, device=device).requires_grad_()
    if "triton" not in request.node.callspec.id:
        with pytest.raises(IndexError, match=re.escape(f"target {wrong} is out of bounds for 5 classes")):
            cot_kernels.complement_entropy(leaf, target)
        return
    loss = cot_kernels.complement_entropy(leaf, target, reduction="none")
    gradient = torch.autograd.grad(loss.nan_to_num().sum() + loss[1], leaf)[0]
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]
    statistics = cot_kernels.complement_statistics(leaf, target)
    assert all(value.isnan().tolist() == [False, True, False] for value in statistics)


@pytest.mark.parametrize("classes", [6, 1200])
def test_upstream_gradients_of_any_kind(classes: int, device: torch.device) -> None:
    logits, target = draw(5, classes, 1.0)
    leaf = logits.to(device).requires_grad_()
    target = target.to(device)
    weights = torch.linspace(-1, 2, 5, dtype=torch.float64, device=device)
    rows = cot_kernels.complement_entropy(leaf, target, reduction="none")
    per_row = torch.stack([torch.autograd.grad(row, leaf, retain_graph=True)[0] for row in rows]).sum(0)

    def grad(upstream: Tensor) -> Tensor:
        return torch.autograd.grad(rows, leaf, upstream, retain_graph=True)[0]

    torch.testing.assert_close(grad(torch.ones(5, dtype=torch.float64, device=device)), per_row)
    torch.testing.assert_close(grad(weights), per_row * weights[:, None])
    expanded = torch.tensor(3.0, dtype=torch.float64, device=device).expand(5)
    torch.testing.assert_close(grad(expanded), per_row * 3)
    torch.testing.assert_close(grad(weights.repeat_interleave(2)[::2]), per_row * weights[:, None])
    assert grad(torch.zeros(5, dtype=torch.float64, device=device)).abs().max().item() == 0
    mean = cot_kernels.complement_entropy(leaf, target)
    torch.testing.assert_close(torch.autograd.grad(mean * -7.5, leaf)[0], per_row * (-7.5 / 5))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("classes", [10, 1300])
def test_runs_are_deterministic_and_leave_the_logits_alone(case: Case, classes: int, device: torch.device) -> None:
    logits, target = draw(33, classes, None)
    leaf = logits.float().to(device).requires_grad_()
    before = leaf.detach().clone()
    losses, gradients = [], []
    for _ in range(2):
        loss = case.loss(leaf, target.to(device))
        gradients += [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]
        losses.append(loss)
    assert torch.equal(losses[0], losses[1])
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert torch.equal(leaf.detach(), before)


def test_loss_may_be_changed_in_place(device: torch.device) -> None:
    """`loss /= n` is how accumulation loops are written; it must not disturb what the backward pass has saved."""
    logits, target = draw(4, 6, None)
    leaf = logits.to(device).requires_grad_()
    whole = torch.autograd.grad(cot_kernels.complement_entropy(leaf, target.to(device)), leaf)[0]
    for reduction in ("mean", "sum", "none"):
        loss = cot_kernels.complement_entropy(leaf, target.to(device), reduction=reduction)
        loss /= 4
        gradient = torch.autograd.grad(loss.sum(), leaf)[0]
        torch.testing.assert_close(gradient, whole / 4 if reduction == "mean" else whole)


@pytest.mark.gpu
def test_triton_path_never_reads_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of a tensor reaches Python: on a GPU CUDA's own alarm, elsewhere the ways to read one are blocked."""
    from cot_kernels.backends.triton import backend

    monkeypatch.setattr(cot_kernels.autograd, "backend_for", lambda logits: backend)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaf = torch.randn(4, 1100, device=device).requires_grad_()
    target = torch.randint(1100, (4,), device=device)
    cot_kernels.complement_entropy(leaf, target).backward()  # compiled and allocated before the alarm is set

    def read(*_: Any) -> Any:
        raise AssertionError("the value of a tensor was read on the way")

    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    else:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
            monkeypatch.setattr(Tensor, name, read)
    try:
        for loss in (cot_kernels.complement_entropy, cot_kernels.guided_complement_entropy, cot_kernels.cross_entropy):
            loss(leaf, target).backward()
        cot_kernels.complement_statistics(leaf, target).negentropy.sum().backward()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("normalization", "divisor"), [("classes", 6), ("complement", 5), ("entropy", math.log(5)), ("none", 1)]
)
def test_normalizations(normalization: str, divisor: float, device: torch.device) -> None:
    logits, target = draw(4, 6, None)
    logits, target = logits.to(device), target.to(device)
    negentropy = cot_kernels.complement_statistics(logits, target).negentropy.mean()
    loss = cot_kernels.complement_entropy(logits, target, eps=0.0, normalization=normalization)
    torch.testing.assert_close(loss, negentropy / divisor)
    both = cot_kernels.complement_cross_entropy(logits, target, gamma=-3.0, normalization=normalization)
    torch.testing.assert_close(both, F.cross_entropy(logits, target) + 3 * negentropy / divisor)


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


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_tensors_without_values_have_a_loss_without_one(ignore_index: int) -> None:
    """On the meta device shapes follow, whether or not targets would have to be looked at."""
    logits, target = torch.zeros(2, 3, device="meta").requires_grad_(), torch.zeros(2, dtype=torch.long, device="meta")
    loss = cot_kernels.complement_entropy(logits, target, ignore_index=ignore_index)
    loss.backward()
    assert loss.is_meta and loss.shape == () and logits.grad is not None and logits.grad.is_meta


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="input and target must be on one device, got cpu and meta"):
        cot_kernels.complement_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long, device="meta"))


def test_numbers_of_numpy_are_numbers() -> None:
    logits, target = draw(4, 6, None)
    expected = cot_kernels.complement_entropy(logits, target, eps=1e-3)
    assert cot_kernels.complement_entropy(logits, target, eps=numpy.float64(1e-3)) == expected  # type: ignore[arg-type]


def test_two_classes(device: torch.device) -> None:
    """K = 2: one wrong class, whose entropy is 0. The exact loss and gradient vanish, and the caller is told."""
    logits, target = draw(4, 2, None)
    with pytest.warns(UserWarning, match="2 classes: the complement then holds a single class"):
        loss, gradient = gradient_of(
            cot_kernels.complement_entropy, logits.to(device), target.to(device), torch.ones(4), eps=0.0
        )
    # Nothing but the ATen backend's stand-in for the target's exponential, 1e-36, may be left of it.
    assert loss.abs().max().item() < 1e-30 and gradient.abs().max().item() < 1e-30
    with pytest.raises(ValueError, match=r"normalization='entropy' divides by ln\(K - 1\)"):
        cot_kernels.complement_cross_entropy(logits, target, normalization="entropy")


@pytest.mark.parametrize("classes", [5, 100, 1500])
def test_a_class_at_minus_infinity_gets_no_gradient_however_large_its_factor(
    classes: int, device: torch.device
) -> None:
    logits = draw(3, classes, None)[0].float()
    logits[:, 3] = -torch.inf
    leaf = logits.to(device).requires_grad_()
    target = torch.zeros(3, dtype=torch.int64, device=device)
    loss = cot_kernels.complement_cross_entropy(leaf, target, gamma=-1e12, normalization="none", reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 1e12))
    assert gradient.isfinite().all() and gradient[:, 3].eq(0).all() and gradient[:, 1].ne(0).all()


@pytest.mark.parametrize("device", [pytest.param("triton", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("classes", [4096, 20001])
def test_tiles_that_one_program_takes_in_turn(
    turns: int, classes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "choose_turns", lambda *sizes: turns)
    logits, target = draw(3, classes, None)
    target[1] = -100
    leaf = logits.float().to(device).requires_grad_()
    loss = cot_kernels.complement_entropy(leaf, target.to(device))
    (gradient,) = torch.autograd.grad(loss, leaf)
    kept = logits[::2].requires_grad_()
    true = oracle_loss(kept, target[::2])
    assert loss.item() == pytest.approx(true.item(), abs=1e-7)
    assert relative_error(gradient[::2], torch.autograd.grad(true, kept)[0]) < 2e-6
    assert not gradient[1].any()


def test_many_rows_and_many_classes(device: torch.device) -> None:
    """More rows than a GPU's second grid axis has places, and more classes than fit 2^20."""
    for rows, classes in ((65537, 3), (1, 2**20 + 3)):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, classes, generator=generator)
        target = torch.randint(classes, (rows,), generator=generator)
        leaf = logits.to(device).requires_grad_()
        loss = cot_kernels.complement_entropy(leaf, target.to(device), normalization="none")
        (gradient,) = torch.autograd.grad(loss, leaf)
        plain = logits.double().requires_grad_()
        true = oracle_loss(plain, target) * classes
        (true_gradient,) = torch.autograd.grad(true, plain)
        assert loss.item() == pytest.approx(true.item(), rel=1e-6)
        assert relative_error(gradient, true_gradient) < 2e-6
