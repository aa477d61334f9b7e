"""The API contract: shapes, dtypes, reductions, ignored rows, upstream gradients."""

from __future__ import annotations

import math
import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from oracle import CASES, Case, draw, gradient_of, relative_error
from oracle import complement_entropy as oracle_loss
from torch import Tensor
from torch.nn import functional as F

import cot_kernels


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


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_tensors_without_values_have_a_loss_without_one(ignore_index: int) -> None:
    """On the meta device shapes follow, whether or not targets would have to be looked at."""
    logits, target = torch.zeros(2, 3, device="meta").requires_grad_(), torch.zeros(2, dtype=torch.long, device="meta")
    loss = cot_kernels.complement_entropy(logits, target, ignore_index=ignore_index)
    loss.backward()
    assert loss.is_meta and loss.shape == () and logits.grad is not None and logits.grad.is_meta


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


def test_two_classes_of_one_step_losses() -> None:
    """What the warnings say of the losses is so, and where no complement is asked for there is none to warn of."""
    logits, target = draw(4, 2, None)
    with pytest.warns(UserWarning, match="complement_cross_entropy got 2 classes.*of cross_entropy alone") as told:
        loss = cot_kernels.complement_cross_entropy(logits, target)
    torch.testing.assert_close(loss, cot_kernels.cross_entropy(logits, target))
    with pytest.warns(UserWarning, match="guided_complement_entropy got 2 classes.*says nothing") as told_of_guided:
        assert not cot_kernels.guided_complement_entropy(logits, target, eps=0.0)
    assert told[0].filename == told_of_guided[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cot_kernels.complement_cross_entropy(logits, target, gamma=0.0)
        cot_kernels.cross_entropy(logits, target)


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
