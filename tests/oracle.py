"""The published formulas in float64, how far a result may lie from them, and the backends it is asked of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cot_kernels

Loss = Callable[..., Tensor]

# Many small blocks are no other way to a compiler, nor to derivatives of derivatives.
on_each_backend = pytest.mark.parametrize(
    "device", ["native", "aten", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)


@dataclass(frozen=True)
class Case:
    """A loss of the package beside the published formula it must equal."""

    name: str
    loss: Loss
    published: Loss

    def __str__(self) -> str:
        return self.name


def _terms(input: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """p_g, 1 - p_g and sum_{j != g} q_j ln q_j with q_j = p_j / (1 - p_g + eps).

    As in cot_kernels.reference, but for two things: 1 - p_g is summed over the wrong classes, for even in float64 the
    difference loses half its digits at a margin of 20; and the guard within the logarithm is left out.
    """
    index = target[:, None]
    probabilities = torch.softmax(input, 1)
    wrong = torch.ones_like(probabilities).scatter(1, index, 0.0)
    miss = (probabilities * wrong).sum(1)
    q = probabilities / (miss + eps)[:, None]
    return probabilities.gather(1, index)[:, 0], miss, (wrong * torch.special.xlogy(q, q)).sum(1)


def complement_entropy(input: Tensor, target: Tensor, eps: float = 1e-7, reduction: str = "mean") -> Tensor:
    return _reduce(_terms(input, target, eps)[2] / input.shape[1], reduction)


def guided_complement_entropy(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    hit, _, terms = _terms(input, target, 1e-7)
    return _reduce((hit + 1e-7) ** (1 / 3) * terms / math.log(input.shape[1]), reduction)


def complement_cross_entropy(input: Tensor, target: Tensor, gamma: float = -2.0, reduction: str = "mean") -> Tensor:
    _, _, terms = _terms(input, target, 0.0)
    weight = -gamma / (input.shape[1] - 1)
    return _reduce(F.cross_entropy(input, target, reduction="none") + weight * terms, reduction)


def _reduce(values: Tensor, reduction: str) -> Tensor:
    return {"none": lambda: values, "sum": values.sum, "mean": values.mean}[reduction]()


CASES = (
    Case("complement_entropy", cot_kernels.complement_entropy, complement_entropy),
    Case(
        "complement_entropy, exact",
        partial(cot_kernels.complement_entropy, eps=0.0),
        partial(complement_entropy, eps=0.0),
    ),
    Case("guided_complement_entropy", cot_kernels.guided_complement_entropy, guided_complement_entropy),
    Case(
        "complement_cross_entropy",
        partial(cot_kernels.complement_cross_entropy, gamma=-2.0),
        complement_cross_entropy,
    ),
    Case("cross_entropy", cot_kernels.cross_entropy, F.cross_entropy),
)


def draw(rows: int, classes: int, margin: float | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float64 logits from N(0, 1), the target's raised ``margin`` above the largest other one, and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    if margin is not None:
        others = logits.scatter(1, target[:, None], -torch.inf)
        logits.scatter_(1, target[:, None], others.amax(1, keepdim=True) + margin)
    return logits, target


def gradient_of(loss: Loss, logits: Tensor, target: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Unreduced losses, and the gradient of their sum weighted by ``weights``."""
    leaf = logits.detach().clone().requires_grad_()
    values = loss(leaf, target, reduction="none", **options)
    (gradient,) = torch.autograd.grad(values, leaf, weights.to(values.dtype).to(values.device))
    return values.detach(), gradient


def relative_error(got: Tensor, true: Tensor) -> float:
    got, true = got.detach().double().cpu(), true.detach().double().cpu()
    return float((got - true).norm() / true.norm().clamp(min=1e-300))


@dataclass(frozen=True)
class RowTruth:
    """What every loss and gradient of (N, K) float64 logits is made of. A class at -inf is absent, as in its limit.

    The published operations make NaN of an absent class, and of a target whose probability rounds to 0 or 1. These are
    the same formulas in the log-odds b and the negentropy S, which tests/test_properties.py holds against them.
    """

    target_logit: Tensor
    complement_lse: Tensor
    log_odds: Tensor
    """Infinite where the target is absent, whatever else is."""
    negentropy: Tensor
    log_q: Tensor
    """(N, K), -inf at the target."""

    @staticmethod
    def of(input: Tensor, target: Tensor) -> RowTruth:
        index = target[:, None]
        target_logit, others = input.gather(1, index)[:, 0], input.scatter(1, index, -torch.inf)
        # The largest comes off first: in a logit of 1e20 the logarithm of a sum would be lost.
        shift = others.amax(1).clamp(min=torch.finfo(torch.float64).min)
        others = others - shift[:, None]
        lse = others.logsumexp(1)
        log_q = torch.where(others == -torch.inf, -torch.inf, others - lse[:, None])
        negentropy = (log_q.exp() * log_q.clamp(min=-1e4)).sum(1)
        log_odds = torch.where(target_logit == -torch.inf, torch.inf, (shift - target_logit) + lse)
        return RowTruth(target_logit, shift + lse, log_odds, negentropy, log_q)

    def gradient(self, target: Tensor, f_target: Tensor, f_lse: Tensor, f_negentropy: Tensor) -> Tensor:
        """``q_j (f_L + f_S (ln q_j - S))``, and f_g at the target."""
        log_q = self.log_q.clamp(min=-1e4)
        grad = log_q.exp() * (f_lse[:, None] + f_negentropy[:, None] * (log_q - self.negentropy[:, None]))
        return grad.scatter(1, target[:, None], f_target[:, None])


def divisor(normalization: str, classes: int) -> float:
    return {"classes": classes, "complement": classes - 1, "entropy": math.log(max(classes - 1, 2)), "none": 1}[
        normalization
    ]


def complement_entropy_of(log_odds: Tensor, negentropy: Tensor, eps: float) -> Tensor:
    """``u (S + ln u)``."""
    miss = torch.sigmoid(log_odds)
    u = miss / (miss + eps) if eps else torch.ones_like(miss)
    return u * negentropy + torch.special.xlogy(u, u)


def guided_complement_entropy_of(log_odds: Tensor, negentropy: Tensor, eps: float, alpha: float) -> Tensor:
    """``(p + eps)^alpha u (S + ln u)``."""
    return (torch.sigmoid(-log_odds) + eps) ** alpha * complement_entropy_of(log_odds, negentropy, eps)


def cross_entropy_of(log_odds: Tensor, negentropy: Tensor, weight: float) -> Tensor:
    """``softplus(b) + weight S``."""
    return torch.logaddexp(log_odds, torch.zeros_like(log_odds)) + weight * negentropy
