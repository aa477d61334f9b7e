"""Logits that lie in every way that has a kernel or a way through one of its own, held against the formula."""

from __future__ import annotations

import oracle
import pytest
import torch
from kernel_runs import DEVICE, some
from torch import Tensor

from cot_kernels import complement_cross_entropy, complement_entropy
from cot_kernels.backends.triton import backend, launch, layout
from cot_kernels.objectives import CrossEntropyObjective


# Around powers of two, the bounds of a tile, and of an access.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "num_classes", some([2, 3, 8, 9, 31, 33, 100, 257, 1017, 1024, 2041, 2049, 3001, 4096], 3, 9, 33, 257, 1024, 2049)
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_begin_anywhere(num_classes: int, dtype: torch.dtype) -> None:
    """Value and gradient; in place it leaves what lies between the rows and beside them alone, but for what pads rows
    that begin on 16-byte boundaries to whole accesses."""
    rows, objective = 5, CrossEntropyObjective(1.0, 0.7)
    for offset, padding in ((0, 0), (0, 1), (1, 0), (3, 2), (0, 8 - num_classes % 8)):
        stride = num_classes + padding
        kept = torch.randn(offset + rows * stride + 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        logits = kept.as_strided((rows, num_classes), (stride, 1), offset)
        target = torch.arange(rows, device=DEVICE) * 7 % num_classes
        target[3] = -100
        exact = logits.double().cpu().requires_grad_()
        expected = complement_cross_entropy(
            exact, target.cpu(), gamma=-0.7, normalization="none", reduction="none"
        )  # fmt: skip
        expected.sum().backward()
        assert exact.grad is not None
        loss, saved = backend.loss(logits, target, -100, objective, "none")
        gradients = [backend.gradient(logits, saved, torch.ones((), device=DEVICE))]
        assert layout.begin(gradients[0]) == layout.begin(logits)
        if offset == 1:  # one that begins elsewhere, as compilers have it
            elsewhere = torch.empty_like(logits)
            gradients.append(backend.gradient(logits, saved, torch.ones((), device=DEVICE), elsewhere))
        tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(loss.flatten().double().cpu(), expected, rtol=3e-6, atol=3e-6)
        for found in (*gradients, None):
            if found is None:
                before = kept.clone()
                found = logits
                backend.value_and_gradient(logits, target, -100, objective, None, True)
                beside = torch.ones_like(kept, dtype=torch.bool)
                per_access = 16 // dtype.itemsize
                on_boundary = offset == 0 and stride % per_access == 0
                width = -(-num_classes // per_access) * per_access if on_boundary else num_classes
                beside.as_strided((rows, width), logits.stride(), offset).fill_(False)
                assert torch.equal(kept[beside], before[beside])
            error = (found.double().cpu() - exact.grad).norm() / exact.grad.norm()
            assert error <= tolerance, (offset, padding, error)
            assert not found[3].any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        *((2, 3, 16), (1, 21, 1040), (3, 2, 48), (2, 5, 2064), (1, 1100, 16)),  # 128 bits an access
        *((5, 7, 31), (2, 3, 33), (3, 21, 127), (2, 4, 300), (1, 21, 1025), (2, 70, 40)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_side_by_side(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Ignored rows are read with the others, and nothing of what they hold shows."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    target = torch.randint(shape[1], (shape[0], shape[2]), generator=generator).to(DEVICE)
    target[:, ::5] = -100
    exact = logits.double().cpu().clone().requires_grad_()
    complement_cross_entropy(exact, target.cpu(), gamma=-0.7, normalization="none", reduction="sum").backward()
    logits[:, :, ::5] = torch.nan
    assert layout.tile(logits).across and exact.grad is not None
    loss, saved = backend.loss(logits, target, -100, CrossEntropyObjective(1.0, 0.7), "none")
    gradient = backend.gradient(logits, saved, torch.ones((), device=DEVICE))
    assert loss.isfinite().all() and not saved[1][[0, 2, 3, 4]].isnan().any()
    assert not gradient[:, :, ::5].any()
    error = (gradient.double().cpu() - exact.grad).norm() / exact.grad.norm()
    assert error <= {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 20), (40, 20), (2, 3, 20), (2, 40, 20)])
@pytest.mark.parametrize("step", [0, 2])
def test_classes_apart_beside_a_gradient_whose_classes_adjoin(step: int, shape: tuple[int, ...]) -> None:
    """Every other class, or one for all: a gradient is dense, and its stride of 1 is a constant to the compiler."""
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits = (wide[..., ::2] if step else wide[..., :1].expand(*shape[:-1], 10)).movedim(-1, 1)
    target = torch.arange(wide.shape[:-1].numel(), device=DEVICE).view(wide.shape[:-1]) % 10
    exact = logits.double().cpu().requires_grad_()
    complement_cross_entropy(exact, target.cpu(), gamma=-0.7, normalization="none", reduction="sum").backward()
    _, saved = backend.loss(logits, target, -100, CrossEntropyObjective(1.0, 0.7), "sum")
    gradient = backend.gradient(logits, saved, torch.ones((), device=DEVICE))
    assert exact.grad is not None and layout.tile(logits, gradient).across
    torch.testing.assert_close(gradient.double().cpu(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [7, 33, 70, 128, 1000])
@pytest.mark.parametrize("step", [1, 2])
def test_a_transposed_matrix_is_one_plane(step: int, rows: int) -> None:
    """Or every other row of one, whose neighbours are apart."""
    classes = 11
    logits = torch.randn(classes, rows * step, generator=torch.Generator().manual_seed(0)).to(DEVICE)[:, ::step].t()
    target = torch.arange(rows, device=DEVICE) % classes
    target[::5] = -100
    assert layout.tile(logits).plane == (rows >= 32 and (step == 2 or rows % 16 != 0))
    exact = logits.double().cpu().requires_grad_()
    complement_cross_entropy(exact, target.cpu(), gamma=-0.7, normalization="none", reduction="sum").backward()
    loss, saved = backend.loss(logits, target, -100, CrossEntropyObjective(1.0, 0.7), "none")
    gradient = backend.gradient(logits, saved, torch.ones((), device=DEVICE))
    assert exact.grad is not None and not loss[0, ::5].any()
    torch.testing.assert_close(gradient.double().cpu(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [1025, 4097, 5001])
@pytest.mark.parametrize("stride", [0, 3])
def test_long_rows_that_begin_anywhere_and_are_not_split(
    classes: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than are split on a small GPU, each of which begins elsewhere; what lies between them is NaN."""
    rows, multiprocessors = 17, 2
    assert launch.choose_splits(rows, 9, multiprocessors) == 1 < launch.choose_splits(2, 9, multiprocessors)
    monkeypatch.setattr(layout, "multiprocessors", lambda device: multiprocessors)
    generator = torch.Generator().manual_seed(0)
    wide = torch.full((rows, classes + stride), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    logits = wide[:, :classes]
    logits.copy_(torch.randn(rows, classes, generator=generator))
    target = torch.randint(classes, (rows,), generator=generator).to(DEVICE)
    loss, _ = backend.loss(logits, target, -100, CrossEntropyObjective(1.0, 0.7), "none")
    published = oracle.complement_cross_entropy(
        logits.double().cpu(), target.cpu(), gamma=-0.7 * (classes - 1), reduction="none"
    )
    torch.testing.assert_close(loss[0].double().cpu(), published, rtol=3e-6, atol=3e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", some([20, 33, 64, 505, 1000, 1001, 2041, 3001, 5001], 20, 33, 505, 5001))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_in_turn(classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As published, and as one by one to the last bit: also in a last program that is not full, ignored and stray."""
    tile = layout.tile(torch.zeros(4, classes, dtype=dtype))
    turns = min(tile.turns, 3)
    rows = 4 * tile.rows + 1
    assert turns > 1 or classes == 20
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).to(DEVICE, dtype)
    target = torch.randint(classes, (rows,), generator=generator).to(DEVICE)
    target[1], target[2] = -100, classes  # the latter out of range
    logits[1] = torch.nan
    objective = CrossEntropyObjective(1.0, 0.7)

    def outcome() -> list[Tensor]:
        row_losses, saved = backend.loss(logits, target, -100, objective, "none")
        gradient = backend.gradient(logits, saved, torch.ones_like(row_losses))
        *statistics, _ = backend.statistics(logits, target, -100)
        assert not saved[1][[0, 2, 3, 4], 1].isnan().any()
        return [row_losses, gradient, *statistics]

    monkeypatch.setattr(launch, "choose_splits", lambda *sizes: 1)
    for choice in ("choose_row_turns", "choose_turns"):
        monkeypatch.setattr(launch, choice, lambda *sizes: 1)
    one_by_one = outcome()
    monkeypatch.setattr(launch, "choose_row_turns", lambda *sizes: turns)
    monkeypatch.setattr(launch, "choose_turns", lambda *sizes: 3)
    backend.forward_plans.clear()
    backend.gradient_plans.clear()
    for found, expected in zip(outcome(), one_by_one, strict=True):
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert one_by_one[0][0, 1] == 0 and one_by_one[0][0, 2].isnan() and one_by_one[0].isnan().sum() == 1
    assert not one_by_one[1][1].any() and not one_by_one[1][1].signbit().any()  # of an ignored row: 0, not -0
    target[2] = -100
    losses, gradient, *_ = outcome()
    kept = target != -100
    exact = logits.double().cpu()[kept.cpu()].requires_grad_()
    published = oracle.complement_cross_entropy(
        exact, target.cpu()[kept.cpu()], gamma=-0.7 * (classes - 1), reduction="none"
    )
    published.sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(losses[0, kept].double().cpu(), published, rtol=3e-6, atol=3e-6)
    error = (gradient[kept].double().cpu() - exact.grad).norm() / exact.grad.norm()
    assert error <= {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]
    mean, saved = backend.loss(logits, target, -100, objective, "mean")
    assert saved[1][-1].item() == pytest.approx(1 / (rows - 2))
    torch.testing.assert_close(mean, losses.sum() / (rows - 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", [pytest.param("triton", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("classes", [4096, 20001])
def test_tiles_that_one_program_takes_in_turn(
    turns: int, classes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "choose_turns", lambda *sizes: turns)
    logits, target = oracle.draw(3, classes, None)
    target[1] = -100
    leaf = logits.float().to(device).requires_grad_()
    loss = complement_entropy(leaf, target.to(device))
    (gradient,) = torch.autograd.grad(loss, leaf)
    kept = logits[::2].requires_grad_()
    true = oracle.complement_entropy(kept, target[::2])
    assert loss.item() == pytest.approx(true.item(), abs=1e-7)
    assert oracle.relative_error(gradient[::2], torch.autograd.grad(true, kept)[0]) < 2e-6
    assert not gradient[1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [5, 8, 11])
def test_many_partial_sums_are_folded_first(rows: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(rows, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.arange(rows)
    target[2] = -100
    expected = complement_cross_entropy(logits, target, gamma=-0.7, normalization="none", reduction=reduction)
    objective = CrossEntropyObjective(1.0, 0.7)
    monkeypatch.setattr(launch, "FOLD_BLOCK", 4)
    loss, saved = backend.loss(logits.float().to(DEVICE), target.to(DEVICE), -100, objective, reduction)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-6, atol=0)
    assert saved[1][-1].item() == (pytest.approx(1 / (rows - 1)) if reduction == "mean" else 1)
