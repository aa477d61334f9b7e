"""Device twins of :mod:`cot_kernels.objectives`: ``(b, S, scale, ...) -> (l, dl/db, dl/dS)`` for a vector of rows.

Every twin takes the same arguments, so that one kernel serves them all; a twin ignores the parameters it has no use
for. HALF: the logits are of 16 bits; see :mod:`.arithmetic`. :func:`device_twin` pairs an objective with its twin and
parameters.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from cot_kernels.backends.triton.arithmetic import log2, quotient
from cot_kernels.backends.triton.tiles import LN2, LOG2E
from cot_kernels.objectives import (
    ComplementEntropyObjective,
    CrossEntropyObjective,
    GuidedComplementEntropyObjective,
    Objective,
)


@triton.jit
def _exp(x):
    """As a power of two: tl.exp keeps subnormal results, which are of no use here and cost instructions."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _odds(log_odds, HALF: tl.constexpr):
    """1 - p and p, and x = e^-|b|, of which both are made, with 1 / (1 + x)."""
    x = _exp(-tl.abs(log_odds))
    inverse = quotient(tl.full(x.shape, 1.0, x.dtype), 1 + x, HALF)
    less = x * inverse
    return tl.where(log_odds < 0, less, inverse), tl.where(log_odds < 0, inverse, less), x, inverse


@triton.jit
def complement_entropy(log_odds, negentropy, scale, eps, unused, HALF: tl.constexpr):
    """With e^-b = p / (1 - p), u is 1 / (1 + eps + eps e^-b), and p eps / (1 - p + eps) is u eps e^-b."""
    raised = tl.where((eps != 0) | (log_odds != log_odds), eps * _exp(-log_odds), 0.0)
    v = 1 + eps + raised  # 1 / u
    u = quotient(tl.full(v.shape, 1.0, v.dtype), v, HALF)
    log_u = tl.where(u != 0, -log2(v, HALF) * LN2, 0.0)  # u = 0 where 1 - p underflows, and there u ln u is 0
    d_negentropy = scale * u
    loss = d_negentropy * (negentropy + log_u)
    at_target = tl.where(u != 0, raised * u, 0.0)
    return loss, (loss + d_negentropy) * at_target, d_negentropy


@triton.jit
def guided_complement_entropy(log_odds, negentropy, scale, eps, alpha, HALF: tl.constexpr):
    loss, d_log_odds, d_negentropy = complement_entropy(log_odds, negentropy, scale, eps, 0.0, HALF)
    miss, p, _, _ = _odds(log_odds, HALF)
    guided = p + eps
    guide = tl.where(guided != 0, tl.exp2(alpha * tl.log2(guided)), tl.where(alpha > 0, 0.0, 1.0))
    # p (1 - p) / (p + eps) is 0 / 0 where p underflows and eps = 0; its limit there is 1.
    ratio = tl.where(guided != 0, p * miss / guided, miss)
    return guide * loss, guide * (d_log_odds - alpha * ratio * loss), guide * d_negentropy


@triton.jit
def cross_entropy(log_odds, negentropy, scale, weight, unused, HALF: tl.constexpr):
    miss, _, x, inverse = _odds(log_odds, HALF)
    # ln(1 + x): the rounding of 1 + x is put back to first order.
    y = 1 + x
    log1p = log2(y, HALF) * LN2 + (x - (y - 1)) * inverse
    loss = scale * (tl.maximum(log_odds, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p)
    # Kept apart: a weight of 0 must not turn an infinite or NaN negentropy into a NaN loss.
    loss += tl.where(weight != 0, scale * weight * negentropy, 0.0)
    return loss, scale * miss, scale * weight + tl.zeros_like(negentropy)


TWINS = (complement_entropy, guided_complement_entropy, cross_entropy)


def device_twin(objective: Objective) -> tuple[Any, tuple[float, float, float]]:
    """The device function of an objective, and its three parameters."""
    if isinstance(objective, ComplementEntropyObjective):
        return complement_entropy, (objective.scale, objective.eps, 0.0)
    if isinstance(objective, GuidedComplementEntropyObjective):
        return guided_complement_entropy, (objective.scale, objective.eps, objective.alpha)
    if isinstance(objective, CrossEntropyObjective):
        return cross_entropy, (objective.scale, objective.weight, 0.0)
    raise TypeError(f"no device function for {type(objective).__name__}: add one here, beside its PyTorch twin")
