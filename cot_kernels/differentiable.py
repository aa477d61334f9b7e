"""The same mathematics in differentiable PyTorch operations, for what the kernels do not do: derivatives of derivatives
(double backward, to any order) and forward-mode differentiation.

Logits are (N, K) or (N, K, D), targets (N) or (N, D), and everything with one entry a row is (N, 1) or (N, 1, D). A
handful of tensors of the size of the logits is alive at a time. Nothing here looks at the values of its arguments, so
that it runs under every transform; a target out of range gives its row NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cot_kernels.backends import FLOOR, accumulation_dtype
from cot_kernels.objectives import Objective


class _Rows(NamedTuple):
    """With d_j = z_j - m and weights exp(d_j), both 0 outside of the complement."""

    at_target: Tensor  # whether the class is the row's target
    ignored: Tensor
    invalid: Tensor
    target_logit: Tensor
    d: Tensor
    weights: Tensor
    total: Tensor  # s
    mean: Tensor  # t / s
    negentropy: Tensor
    log_odds: Tensor
    complement_lse: Tensor


def _rows(logits: Tensor, target: Tensor, ignore_index: int) -> _Rows:
    num_classes = logits.shape[1]
    index = target.long().unsqueeze(1)
    ignored = index == ignore_index
    invalid = ((index < 0) | (index >= num_classes)) & ~ignored
    index = index.masked_fill(ignored | invalid, 0)
    # Cleared before the arithmetic, not after it: the derivative of a masked NaN is NaN.
    z = logits.to(accumulation_dtype(logits.dtype)).masked_fill(ignored, 0)
    classes = torch.arange(num_classes, device=logits.device).view(-1, *(1,) * (logits.dim() - 2))
    at_target = classes == index
    present = ~at_target & ~(z <= FLOOR)
    shift = z.detach().masked_fill(~present, FLOOR).amax(1, True)
    empty = shift <= FLOOR
    d = (z - shift).where(present, 0)
    weights = d.exp().where(present, 0)
    total = weights.sum(1, True).masked_fill(empty, 1)
    mean = (weights * d).sum(1, True) / total
    log_total = total.log()
    target_logit = z.gather(1, index)
    # Below this the odds underflow, and the second derivative of u ln u is 0 * ln 0.
    smallest = math.log(torch.finfo(z.dtype).tiny)
    return _Rows(
        at_target=at_target,
        ignored=ignored,
        invalid=invalid,
        target_logit=target_logit,
        d=d,
        weights=weights,
        total=total,
        mean=mean,
        negentropy=mean - log_total,
        log_odds=((shift - target_logit) + log_total).clamp(min=smallest),
        complement_lse=(shift + log_total).masked_fill(empty, -torch.inf),
    )


def _mask(rows: _Rows, value: Tensor) -> Tensor:
    return value.masked_fill(rows.invalid, torch.nan).masked_fill(rows.ignored, 0)


def _gradient(rows: _Rows, logits: Tensor, d_target_logit: Tensor, d_lse: Tensor, d_negentropy: Tensor) -> Tensor:
    q = rows.weights / rows.total
    gradient = q * (d_lse + d_negentropy * (rows.d - rows.mean))
    return _mask(rows, gradient.where(~rows.at_target, d_target_logit)).to(logits.dtype)


def statistics(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(z_g, L, S)``."""
    rows = _rows(logits, target, ignore_index)
    return _mask(rows, rows.target_logit), _mask(rows, rows.complement_lse), _mask(rows, rows.negentropy)


def statistics_gradient(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    d_target_logit: Tensor,
    d_complement_lse: Tensor,
    d_negentropy: Tensor,
) -> Tensor:
    """The gradient of anything built on :func:`statistics`, from what reaches its three outputs."""
    rows = _rows(logits, target, ignore_index)
    return _gradient(rows, logits, d_target_logit, d_complement_lse, d_negentropy)


def loss(logits: Tensor, target: Tensor, ignore_index: int, objective: Objective) -> Tensor:
    """Row losses, ``l(b, S)``."""
    rows = _rows(logits, target, ignore_index)
    return _mask(rows, objective.rows(rows.log_odds, rows.negentropy).loss)


def loss_gradient(logits: Tensor, target: Tensor, ignore_index: int, objective: Objective, upstream: Tensor) -> Tensor:
    """The gradient of ``sum_n upstream_n l(b_n, S_n)``, by the partials of the objective."""
    rows = _rows(logits, target, ignore_index)
    _, d_log_odds, d_negentropy = objective.rows(rows.log_odds, rows.negentropy)
    d_log_odds, d_negentropy = d_log_odds * upstream, d_negentropy * upstream
    return _gradient(rows, logits, -d_log_odds, d_log_odds, d_negentropy)
