"""Logits of any size and of none, one beside another: levels, pairs of 16 bits and empty sums."""

from __future__ import annotations

import pytest
import torch
from kernel_runs import DEVICE, some
from torch import Tensor

from cot_kernels import complement_cross_entropy
from cot_kernels.backends.triton import backend, launch
from cot_kernels.objectives import (
    ComplementEntropyObjective,
    CrossEntropyObjective,
    GuidedComplementEntropyObjective,
)

SOME_WIDTHS = (40, False), (1003, False), (4501, True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "classes", some([33, 64, 200, 249, 257, 520, 1000, 1001, 1032, 2041, 2049, 3000, 4097], 33, 200, 1001, 2049)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_logit_anywhere_in_dense_rows(classes: int, dtype: torch.dtype) -> None:
    """Its maximum may lie in each piece of a row; and behind the last row, which ends on a boundary, is nothing."""
    rows = 16
    target = torch.arange(rows) * 5 % classes
    large = torch.linspace(0, classes - 1, rows).long()
    large[large == target] += 1
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[torch.arange(rows), large] = 200
    exact = logits.double().requires_grad_()
    expected = complement_cross_entropy(exact, target, gamma=-0.7, normalization="none", reduction="none")
    expected.sum().backward()
    assert exact.grad is not None
    on_device, objective = logits.to(DEVICE), CrossEntropyObjective(1.0, 0.7)
    loss, saved = backend.loss(on_device, target.to(DEVICE), -100, objective, "none")
    gradient = backend.gradient(on_device, saved, torch.ones((), device=DEVICE))
    torch.testing.assert_close(loss[0].double().cpu(), expected, rtol=3e-6, atol=3e-6)
    error = (gradient.double().cpu() - exact.grad).norm() / exact.grad.norm()
    assert error <= {torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("classes", "split"),
    some(
        [(21, False), (40, False), (1000, False), (1003, False), (2056, False), (4104, False), (4501, True)],
        *SOME_WIDTHS,
    ),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_of_any_size(
    dtype: torch.dtype, classes: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their largest is scaled, rounded and put right; from 2^16 on it is not scaled, and some rows rise beyond that."""
    if not split:
        monkeypatch.setattr(launch, "choose_splits", lambda *arguments: 1)
    sizes = [0.0, 3.0, 100.0, 1021.0, 3e4] + [2.0**16, 1.0625 * 2**16, 1e6, 3e9, 1e29, 3e38] * (dtype == torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    rising = torch.linspace(0.9, 1, classes)
    rows = []
    for size in sizes:
        flat = size + torch.randn(classes, generator=generator)
        rows += [flat, size * rising, size * rising.flip(0)]
        if size < 1e30:  # below -1e30 there is nothing
            rows += [flat - 2 * size, -size * rising]
    logits = torch.stack(rows).to(dtype)
    target = torch.arange(len(rows)) * 7 % classes
    exact = logits.double().requires_grad_()
    expected = complement_cross_entropy(exact, target, gamma=-0.7, normalization="none", reduction="none")
    expected.sum().backward()
    on_device, objective = logits.to(DEVICE), CrossEntropyObjective(1.0, 0.7)
    loss, saved = backend.loss(on_device, target.to(DEVICE), -100, objective, "none")
    gradient = backend.gradient(on_device, saved, torch.ones((), device=DEVICE))
    in_one = backend.value_and_gradient(on_device, target.to(DEVICE), -100, objective, None, True)  # in their place
    for losses, gradients in ((loss[0], gradient), (in_one[0], on_device)):
        torch.testing.assert_close(losses.double().cpu(), expected, rtol=3e-6, atol=3e-6)
        assert exact.grad is not None
        errors = (gradients.double().cpu() - exact.grad).norm(dim=1)
        assert (errors <= 8e-3 * exact.grad.norm(dim=1) + 1e-12).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("classes", "split"),
    some(
        [(2, False), (40, False), (1000, False), (1003, False), (2056, False), (4104, False), (4501, True)],
        *SOME_WIDTHS,
    ),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_negentropy_is_never_positive_and_vanishes_beside_a_wrong_class(
    dtype: torch.dtype, classes: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16-bit logits but for what the rounding of their level leaves, at most 2^-46 of the largest."""
    if not split:
        monkeypatch.setattr(launch, "choose_splits", lambda *arguments: 1)
    # 2^r and 2^-r, each rounded, are no inverse of each other for the remainder r of most of these.
    largest = [1.5, 2.1, 4.12, 5.76, 7.3, 15.8, 31, 60, 233, 326, 896, 1757, 3444, 18521, 25930]
    logits = torch.full((3 * len(largest), classes), -50.0)
    logits[:, classes // 2] = torch.tensor(largest * 3)
    logits[len(largest) : 2 * len(largest), -1] = torch.tensor(largest)  # one more, and if few others
    logits[2 * len(largest) :, -1] = torch.tensor(largest) - 13.3
    logits[:, 0] = 1000 * torch.arange(3).repeat_interleave(len(largest))  # the target's
    logits = logits.to(dtype)
    target = torch.zeros(len(logits), dtype=torch.int64)
    wrong = logits[:, 1:].double()
    q = wrong.softmax(1)
    expected = (q * wrong.log_softmax(1)).sum(1)
    found = backend.statistics(logits.to(DEVICE), target.to(DEVICE), -100)[2].double().cpu()
    assert (found <= 0).all()
    error = (found - expected).abs()
    assert (error <= 3e-6 * expected.abs() + 1.5e-7).all()  # the rounding of a sum of 1 and little else
    alone = expected > -1e-12
    left = 0 if dtype.itemsize > 2 else 2.0**-46 * wrong[alone].abs().amax(1).clamp(min=1)
    assert alone.sum() >= 6 and (error[alone] <= 0.01 * expected[alone].abs() + left + 1e-33).all()


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [40, 131, 2051, 4104])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_no_number_in_either_half_of_a_register(
    dtype: torch.dtype, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-inf is nothing, and NaN makes its row NaN and no other, beside a target in the other half and elsewhere."""
    monkeypatch.setattr(launch, "choose_splits", lambda *arguments: 1)
    places = torch.cat([torch.arange(10), torch.arange(classes - 6, classes)])
    rows = torch.arange(16)
    target = torch.where(rows % 5 < 3, places ^ 1, places + classes // 2) % classes
    numbers = torch.randn(16, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    for value in (-torch.inf, torch.nan):
        logits = numbers.clone()
        logits[rows, places] = value
        wrong = logits.double()
        wrong[rows, target] = -torch.inf
        q = wrong.softmax(1)
        expected = wrong.logsumexp(1), torch.special.xlogy(q, q).sum(1)
        target_logit, *found, _ = backend.statistics(logits.to(DEVICE), target.to(DEVICE), -100)
        assert torch.equal(target_logit.cpu(), logits[rows, target].float())
        for of_rows, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(of_rows.double().cpu(), exact, rtol=3e-6, atol=3e-6, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [2, 40, 131, 2051])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_nothing_but_the_target_and_of_no_number(
    dtype: torch.dtype, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty complement, wrong classes that are all NaN, a target out of range or NaN; and beside them two rows that
    are as they are alone."""
    monkeypatch.setattr(launch, "choose_splits", lambda *arguments: 1)
    logits = torch.randn(6, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1:3, 1:] = torch.tensor([[-torch.inf], [torch.nan]])
    logits[3, 0] = torch.nan
    target = torch.tensor([0, 0, 0, 0, classes, 1])
    whole = torch.tensor([0, 5])
    on_device = logits.to(DEVICE)
    _, lse, negentropy, _ = (
        each.cpu() if isinstance(each, Tensor) else each
        for each in backend.statistics(on_device, target.to(DEVICE), -100)
    )
    assert lse[1] == -torch.inf and negentropy[1] == 0
    assert lse[[2, 4]].isnan().all() and negentropy[[2, 4]].isnan().all() and lse[[0, 3, 5]].isfinite().all()
    for objective in (
        ComplementEntropyObjective(1.0, 1e-7), ComplementEntropyObjective(1.0, 0.0),
        GuidedComplementEntropyObjective(1.0, 1e-7, 0.5), CrossEntropyObjective(1.0, 0.7),
    ):  # fmt: skip
        loss, saved = backend.loss(on_device, target.to(DEVICE), -100, objective, "none")
        gradient = backend.gradient(on_device, saved, torch.ones((), device=DEVICE)).cpu()
        losses = loss[0].cpu()
        assert losses[1].abs() < 1e-30 and not gradient[1].any()
        assert losses[2:5].isnan().all() and gradient[2:5].isnan().all()
        alone, saved = backend.loss(on_device[whole], target[whole].to(DEVICE), -100, objective, "none")
        torch.testing.assert_close(losses[whole], alone[0].cpu(), rtol=1e-6, atol=1e-6)
        gradient_alone = backend.gradient(on_device[whole], saved, torch.ones((), device=DEVICE)).cpu()
        torch.testing.assert_close(gradient[whole], gradient_alone, rtol=8e-3, atol=1e-7)
