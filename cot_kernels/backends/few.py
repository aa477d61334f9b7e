"""What is computed on few numbers, in NumPy: value and gradient of few logits, and the losses of few rows.

A call on a batch of 128 x 10 costs its number of operations, not their arithmetic, and one of NumPy's takes a third of
the time of one of ATen's. Formulas and notation are those of :mod:`.aten`; the gradient is formed with the value, and
kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cot_kernels.backends import accumulation_dtype

if TYPE_CHECKING:
    from cot_kernels.objectives import Objective


def _places(index: Any, num_classes: int) -> Any:
    """Where the target logits lie in contiguous logits, (N, 1) or (N, 1, D) like the index."""
    if index.ndim == 2:
        return index + np.arange(0, len(index) * num_classes, num_classes)[:, None]
    inner = index.shape[2]
    first = np.arange(0, len(index) * num_classes * inner, num_classes * inner)
    return index * inner + first[:, None, None] + np.arange(inner)


class Finished(NamedTuple):
    """From the sums of rows to their losses, each of the shape of the sums."""

    loss: Any
    log_odds: Any
    negentropy: Any
    slope: Any  # A
    offset: Any  # B
    at_target: Any  # f_g


def finish(objective: Objective, shift: Any, total: Any, moment: Any, target_logit: Any, floor: float) -> Finished:
    """Losses and coefficients of rows with m, s and t, arrays that are changed."""
    empty = shift <= floor  # no class above the floor: empty sums, and b = -inf within rounding
    if np.logical_or.reduce(empty, None):
        total[empty], moment[empty] = 1, 0
    log_total = np.log(total)
    moment /= total
    log_odds = (shift - target_logit) + log_total
    negentropy = moment - log_total
    loss, d_log_odds, d_negentropy = objective.rows(log_odds, negentropy)
    slope = d_negentropy / total
    offset: Any = d_log_odds / total - slope * moment
    return Finished(loss, log_odds, negentropy, slope, offset, -d_log_odds)


def value_and_gradient(logits: Tensor, index: Tensor, objective: Objective, floor: float) -> tuple[Tensor, Tensor]:
    """Row losses, shaped like the index, and the gradient of their sum.

    Args:
        logits: (N, K) or (N, K, D) on the CPU, not empty, any strides.
        index: the target of each row, (N, 1) or (N, 1, D), within [0, K).
        floor: a logit at or below it has probability zero.

    Returns:
        Both in the accumulation dtype: in half precision the gradient could underflow before it is scaled.
    """
    z = logits.to(accumulation_dtype(logits.dtype)).numpy(force=True)
    at = _places(index.numpy(), z.shape[1])
    with np.errstate(all="ignore"):
        d = np.maximum(z, z.dtype.type(floor), order="C")
        d.put(at, floor)
        shift = torch.from_numpy(d).amax(1, True).numpy()  # NumPy's takes three times as long
        d -= shift
        weights = np.exp(d)
        weights.put(at, 0)
        total = np.add.reduce(weights, 1, keepdims=True)
        if (shift <= floor).any():
            weights *= shift > floor
        moment = np.add.reduce(d * weights, 1, keepdims=True)
        rows = finish(objective, shift, total, moment, z.take(at), floor)
        d *= rows.slope
        d += rows.offset
        d *= weights
        d.put(at, rows.at_target)
    return torch.from_numpy(rows.loss), torch.from_numpy(d)
