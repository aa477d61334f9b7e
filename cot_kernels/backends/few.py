"""What is computed on few numbers, in NumPy: value and gradient of few logits, and the losses of few rows.

A call on a batch of 128 x 10 costs its number of operations, not their arithmetic, and one of NumPy's takes a third of
the time of one of ATen's. Formulas and notation are those of :mod:`.aten`; the gradient is formed with the value, and
kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cot_kernels.backends import accumulation_dtype

if TYPE_CHECKING:
    from cot_kernels.objectives import Objective


class Finished(NamedTuple):
    """From the sums of rows to their losses, each of the shape of the sums."""

    loss: Any
    log_odds: Any
    negentropy: Any
    slope: Any  # A
    offset: Any  # B
    at_target: Any  # f_g


def finish(objective: Objective, shift: Any, total: Any, moment: Any, target_logit: Any, empty: Any | None) -> Finished:
    """Losses and coefficients of rows with m, s and t, arrays that are changed."""
    if empty is not None:  # empty sums, and b = -inf within rounding
        total[empty], moment[empty] = 1, 0
    log_total = np.log(total)
    moment /= total
    log_odds = (shift - target_logit) + log_total
    negentropy = moment - log_total
    loss, d_log_odds, d_negentropy = objective.rows(log_odds, negentropy)
    slope = d_negentropy / total
    offset: Any = d_log_odds / total - slope * moment
    return Finished(loss, log_odds, negentropy, slope, offset, -d_log_odds)


def losses(
    objective: Objective, shift: Tensor, total: Tensor, moment: Tensor, target_logit: Tensor, floor: float
) -> tuple[Tensor, Tensor]:
    """Row losses, and A, B and f_g stacked, from tensors on the CPU, of which the sums are changed."""
    z_g, m = target_logit.to(shift.dtype).numpy(force=True), shift.numpy()
    with np.errstate(all="ignore"):
        rows = finish(objective, m, total.numpy(), moment.numpy(), z_g, empty_rows(m, floor))
        coefficients = np.stack((rows.slope, rows.offset, rows.at_target))
    return torch.from_numpy(rows.loss), torch.from_numpy(coefficients)


def empty_rows(shift: Any, floor: float) -> Any | None:
    """Which rows have no class above the floor; None where each has one."""
    return shift <= floor if np.fmin.reduce(shift, None) <= floor else None  # NaN passes by


def plain_classes(target: Tensor, num_classes: int, ignore_index: int) -> Any | None:
    """The targets as an array of 64-bit integers, where each is a class and none ignored; else None."""
    if 0 <= ignore_index < num_classes:
        return None
    classes = (target if target.dtype is torch.int64 else target.long()).numpy()
    # Read as unsigned, a negative one is huge: one reduction finds both kinds.
    return classes if np.maximum.reduce(classes.view(np.uint64), None) < num_classes else None


def value_and_gradient(logits: Tensor, classes: Any, objective: Objective, floor: float) -> tuple[Any, Tensor]:
    """Row losses, an array (N) or (N D), and the gradient of their sum.

    Args:
        logits: (N, K) or (N, K, D) on the CPU, not empty, any strides.
        classes: the target of each row, an array of 64-bit integers within [0, K) of N or N D entries, any shape.
        floor: a logit at or below it has probability zero.

    Returns:
        Both in the accumulation dtype: in half precision the gradient could underflow before it is scaled.
    """
    dtype = accumulation_dtype(logits.dtype)
    z = (logits if logits.dtype is dtype else logits.to(dtype)).numpy(force=True).swapaxes(0, 1)  # classes first
    num_classes, num_rows = len(z), classes.size
    # NumPy reduces short rows slowly: of many short rows, the same class of all rows lies together.
    together = num_rows >= num_classes
    flat = np.empty((num_classes, num_rows) if together else (num_rows, num_classes), z.dtype)
    d = flat if together else flat.T
    of_row, of_class = (1, num_rows) if together else (num_classes, 1)
    at = classes.reshape(-1) * of_class
    at += np.arange(0, num_rows * of_row, of_row)
    with np.errstate(all="ignore"):
        np.copyto(d.reshape(z.shape), z)
        z_g = flat.take(at)
        np.maximum(d, floor, out=d)
        flat.put(at, floor)
        # NumPy's maximum along rows takes three times as long as PyTorch's.
        shift = np.maximum.reduce(d, 0) if together else torch.from_numpy(flat).amax(1).numpy()
        d -= shift
        weights = np.exp(d)
        empty = empty_rows(shift, floor)
        if empty is not None:
            weights *= ~empty
        total = np.add.reduce(weights, 0)
        moment = np.add.reduce(d * weights, 0)
        rows = finish(objective, shift, total, moment, z_g, empty)
        d *= rows.slope
        d += rows.offset
        d *= weights
        flat.put(at, rows.at_target)
    grad = np.ascontiguousarray(d.reshape(z.shape).swapaxes(0, 1))
    return rows.loss, torch.from_numpy(grad)


def reduced(row_loss: Any, ignored: Tensor | None, reduction: str, shape: Iterable[int]) -> Tensor:
    """The losses in a shape, or their sum; of the mean's, already scaled, the mean. Those of ignored rows are 0."""
    if ignored is not None:
        row_loss[ignored.numpy().reshape(-1)] = 0
    if reduction == "none":
        return torch.from_numpy(row_loss.reshape(shape))
    total = np.empty((), row_loss.dtype)
    np.add.reduce(row_loss, 0, out=total)
    return torch.from_numpy(total)
