"""The differentiable row statistics, and losses written on them."""

from __future__ import annotations

import pytest
import torch
from oracle import CASES, Case, draw, relative_error

import cot_kernels


@pytest.mark.parametrize("classes", [3, 200, 1500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values(classes: int, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = draw(6, classes, 2.0)
    others = logits.scatter(1, target[:, None], -torch.inf)
    lse = others.logsumexp(1)
    q = others.softmax(1)
    negentropy = torch.special.xlogy(q, q).sum(1)

    statistics = cot_kernels.complement_statistics(logits.to(dtype).to(device), target.to(device))

    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    for got, true in zip(statistics, (logits.gather(1, target[:, None])[:, 0], lse, negentropy), strict=True):
        assert got.dtype == dtype and got.shape == target.shape
        torch.testing.assert_close(got.cpu().double(), true, **tolerance)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3), (2, 5, 3, 2), (0, 5)], ids=str)
def test_gradcheck(shape: tuple[int, ...], device: torch.device) -> None:
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    target_shape = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    target = torch.randint(5, target_shape, generator=torch.Generator().manual_seed(1)).to(device)
    assert torch.autograd.gradcheck(
        lambda leaf: tuple(cot_kernels.complement_statistics(leaf, target)), logits.requires_grad_()
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_the_losses(case: Case, reduction: str, device: torch.device) -> None:
    logits, target = draw(4, 5, None)
    target[2] = -100
    leaf, target = logits.to(device).requires_grad_(), target.to(device)
    assert torch.autograd.gradcheck(lambda leaf: case.loss(leaf, target, reduction=reduction), leaf)


def test_a_loss_of_ones_own(device: torch.device) -> None:
    """Focal loss plus complement entropy in plain PyTorch on the statistics, against op-by-op autograd."""
    logits, target = draw(7, 40, 1.0)

    def own(log_odds: torch.Tensor, negentropy: torch.Tensor) -> torch.Tensor:
        miss = torch.sigmoid(-log_odds)
        return (miss**2 * torch.nn.functional.softplus(-log_odds) + 0.5 * negentropy).mean()

    leaf = logits.to(device).requires_grad_()
    statistics = cot_kernels.complement_statistics(leaf, target.to(device))
    fused = own(statistics.target_logit - statistics.complement_lse, statistics.negentropy)

    plain = logits.clone().requires_grad_()
    wrong = torch.ones_like(logits, dtype=torch.bool).scatter(1, target[:, None], False)
    log_q = plain[wrong].view(7, 39).log_softmax(1)
    log_odds = plain.gather(1, target[:, None])[:, 0] - plain[wrong].view(7, 39).logsumexp(1)
    true = own(log_odds, (log_q.exp() * log_q).sum(1))

    assert fused.item() == pytest.approx(true.item(), rel=1e-12)
    gradient, true_gradient = torch.autograd.grad(fused, leaf)[0], torch.autograd.grad(true, plain)[0]
    assert relative_error(gradient, true_gradient) < 1e-12


def test_ignored_rows_hold_zeros_and_pass_no_gradient(device: torch.device) -> None:
    logits, target = draw(4, 6, None)
    logits[1] = torch.nan
    target[1] = -100
    leaf = logits.to(device).requires_grad_()
    statistics = cot_kernels.complement_statistics(leaf, target.to(device))
    assert [value[1].item() for value in statistics] == [0.0, 0.0, 0.0]
    gradient = torch.autograd.grad(sum(value.sum() for value in statistics), leaf)[0]
    assert gradient[1].abs().max().item() == 0 and bool(gradient.isfinite().all())


def test_statistics_may_be_changed_in_place(device: torch.device) -> None:
    logits, target = draw(4, 6, None)
    leaf = logits.to(device).requires_grad_()
    before = torch.autograd.grad(cot_kernels.complement_statistics(leaf, target.to(device)).negentropy.sum(), leaf)[0]
    statistics = cot_kernels.complement_statistics(leaf, target.to(device))
    statistics.negentropy.mul_(2)
    assert torch.equal(torch.autograd.grad(statistics.negentropy.sum(), leaf)[0], before * 2)
