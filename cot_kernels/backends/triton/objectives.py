"""Device twins of :mod:`cot_kernels.objectives`: ``(b, S, scale, ...) -> (l, dl/db, dl/dS)`` for a vector of rows.

Every twin takes the same arguments, so that one kernel serves them all; a twin ignores the parameters it has no use
for. :func:`device_twin` pairs an objective with its twin and parameters.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from cot_kernels.objectives import (
    ComplementEntropyObjective,
    CrossEntropyObjective,
    GuidedComplementEntropyObjective,
    Objective,
)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _log1p(x):
    """ln(1 + x) for x >= 0: the rounding of 1 + x is put back to first order."""
    y = 1 + x
    return tl.log(y) + (x - (y - 1)) / y


@triton.jit
def complement_entropy(log_odds, negentropy, scale, eps, unused):
    miss = _sigmoid(log_odds)  # 1 - p
    guarded = miss + eps
    # u = 0 where 1 - p underflows, and there u ln u is 0, not 0 * -inf; with eps = 0, u is 1 even at 0 / 0. A NaN
    # is not 0, and shows.
    u = tl.where(guarded != 0, miss / guarded, 1.0)
    log_u = tl.where(u > 0, tl.log(u), 0.0)
    loss = scale * u * (negentropy + log_u)
    d_negentropy = scale * u
    at_target = tl.where(guarded != 0, _sigmoid(-log_odds) * eps / guarded, 0.0)
    return loss, (loss + d_negentropy) * at_target, d_negentropy


@triton.jit
def guided_complement_entropy(log_odds, negentropy, scale, eps, alpha):
    loss, d_log_odds, d_negentropy = complement_entropy(log_odds, negentropy, scale, eps, 0.0)
    p = _sigmoid(-log_odds)
    miss = _sigmoid(log_odds)
    guided = p + eps
    guide = tl.where(guided != 0, tl.exp(alpha * tl.log(guided)), tl.where(alpha > 0, 0.0, 1.0))
    # p (1 - p) / (p + eps) is 0 / 0 where p underflows and eps = 0; its limit there is 1.
    ratio = tl.where(guided != 0, p * miss / guided, miss)
    return guide * loss, guide * (d_log_odds - alpha * ratio * loss), guide * d_negentropy


@triton.jit
def cross_entropy(log_odds, negentropy, scale, weight, unused):
    softplus = tl.maximum(log_odds, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(tl.exp(-tl.abs(log_odds)))
    loss = scale * softplus
    # Kept apart: a weight of 0 must not turn an infinite or NaN negentropy into a NaN loss.
    loss += tl.where(weight != 0, scale * weight * negentropy, 0.0)
    return loss, scale * _sigmoid(log_odds), scale * weight + tl.zeros_like(negentropy)


def device_twin(objective: Objective) -> tuple[Any, tuple[float, float, float]]:
    """The device function of an objective, and its three parameters."""
    if isinstance(objective, ComplementEntropyObjective):
        return complement_entropy, (objective.scale, objective.eps, 0.0)
    if isinstance(objective, GuidedComplementEntropyObjective):
        return guided_complement_entropy, (objective.scale, objective.eps, objective.alpha)
    if isinstance(objective, CrossEntropyObjective):
        return cross_entropy, (objective.scale, objective.weight, 0.0)
    raise TypeError(f"no device function for {type(objective).__name__}: add one here, beside its PyTorch twin")
