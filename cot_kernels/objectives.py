"""The loss family as row formulas with hand-written partials.

A row of logits ``z`` with target class ``g`` enters every loss through two numbers only:

    b = L - z_g            log-odds of a wrong class,  L = log sum_{j != g} exp(z_j),   p = p_g = sigmoid(-b)
    S = sum q_j log q_j    negentropy of the complement,  q_j = exp(z_j - L),  j != g

so an objective is a scalar function ``l(b, S)`` with the partials ``dl/db`` and ``dl/dS``:

| objective                        | l / scale              | dl/db / scale                         | dl/dS / scale |
|----------------------------------|------------------------|---------------------------------------|---------------|
| ComplementEntropyObjective       | h = u (S + ln u)       | f = (h + u) p eps / (1 - p + eps)     | u             |
| GuidedComplementEntropyObjective | G h, G = (p + eps)^alpha | G (f - alpha h p (1 - p) / (p + eps)) | G u           |
| CrossEntropyObjective            | softplus(b) + w S      | 1 - p                                 | w             |

with ``u = (1 - p) / (1 - p + eps)`` and ``1 - p = sigmoid(b)``, never computed as a difference: ``u = 1 / v`` with
``v = 1 + eps + x`` and ``x = eps exp(-b)``, and ``p eps / (1 - p + eps) = x u``.

The partials are written out, and not left to autograd, because differentiating ``ln u`` through ``1 - p`` subtracts
nearly equal numbers: in float32 that alone costs 7e-5 of the gradient at 32,000 classes.

Sources: complement entropy, Chen et al., ICLR 2019 (arXiv 1903.01182); guided complement entropy, Chen et al., ICCV
2019 (arXiv 1903.09799); complement cross-entropy, Kim et al., 2021 (arXiv 2009.02189).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import softplus


class RowValues(NamedTuple):
    """An objective and its two partials, one entry a row."""

    loss: Tensor
    d_log_odds: Tensor
    d_negentropy: Tensor


def _softplus(x: Tensor) -> Tensor:
    # Beyond the threshold softplus(x) is x itself: 40 keeps float64 exact, the default of 20 is off by 1e-10.
    return softplus(x, threshold=40)


@dataclass(frozen=True)
class ComplementEntropyObjective:
    """``scale * u (S + ln u)``; with ``eps = 0`` exactly ``scale * S``."""

    scale: float
    eps: float

    def scaled(self, factor: float) -> ComplementEntropyObjective:
        return ComplementEntropyObjective(self.scale * factor, self.eps)

    def rows(self, log_odds: Tensor, negentropy: Tensor) -> RowValues:
        if self.eps == 0:
            # The target's own logit does not matter, unless it is NaN.
            constant = torch.full_like(negentropy, self.scale).masked_fill(log_odds.isnan(), math.nan)
            return RowValues(negentropy * constant, torch.zeros_like(negentropy), constant)
        # eps / (1 - p) = eps + x, so u = 1 / v. Where x would overflow u is nothing, and its limit is as good; of an
        # empty complement it is exactly 0.
        largest = math.log(torch.finfo(log_odds.dtype).max / (4 * max(self.eps, 1.0)))
        x = torch.exp(-log_odds.clamp(min=-largest)) * self.eps
        v = x + (1 + self.eps)
        u = (1 / v).masked_fill(log_odds < -2 * largest, 0)
        d_negentropy = u * self.scale
        loss = d_negentropy * (negentropy - v.log())
        return RowValues(loss, (loss + d_negentropy) * (x * u), d_negentropy)


@dataclass(frozen=True)
class GuidedComplementEntropyObjective:
    """``scale * (p_g + eps)^alpha * u (S + ln u)``."""

    scale: float
    eps: float
    alpha: float

    def scaled(self, factor: float) -> GuidedComplementEntropyObjective:
        return GuidedComplementEntropyObjective(self.scale * factor, self.eps, self.alpha)

    def rows(self, log_odds: Tensor, negentropy: Tensor) -> RowValues:
        plain = ComplementEntropyObjective(1.0, self.eps).rows(log_odds, negentropy)
        p, miss = torch.sigmoid(-log_odds), torch.sigmoid(log_odds)
        guided = p + self.eps
        guide = guided**self.alpha * self.scale
        # (p + eps)^alpha has an infinite slope at p + eps = 0, but p (1 - p) / (p + eps) stays within [0, 1]; where p
        # underflows and eps = 0 it is 0 / 0, and its limit there is 1.
        ratio = torch.where(guided > 0, p * miss / guided, miss)
        d_log_odds = guide * (plain.d_log_odds - self.alpha * ratio * plain.loss)
        return RowValues(guide * plain.loss, d_log_odds, guide * plain.d_negentropy)


@dataclass(frozen=True)
class CrossEntropyObjective:
    """``scale * (softplus(b) + weight * S)``: cross-entropy minus ``weight`` times the complement entropy ``-S``."""

    scale: float
    weight: float

    def scaled(self, factor: float) -> CrossEntropyObjective:
        return CrossEntropyObjective(self.scale * factor, self.weight)

    def rows(self, log_odds: Tensor, negentropy: Tensor) -> RowValues:
        loss = _softplus(log_odds) * self.scale
        if self.weight:
            loss = loss + negentropy * (self.scale * self.weight)
        return RowValues(
            loss, torch.sigmoid(log_odds) * self.scale, torch.full_like(negentropy, self.scale * self.weight)
        )


def cross_entropy_of(log_odds: Tensor) -> Tensor:
    """``-ln p_g``."""
    return _softplus(log_odds)


Objective: TypeAlias = ComplementEntropyObjective | GuidedComplementEntropyObjective | CrossEntropyObjective
