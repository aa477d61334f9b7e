"""The loss family in ATen operations: the CPU, and any device without Triton.

Rows are processed in chunks whose two scratch buffers stay in cache, so each logit is read from memory once in the
forward and once in the backward pass. Besides the logits and their gradient only O(N) is held: per row the shift
``m = max_{j != g} z_j``, ``ln s`` and three coefficients; the backward pass forms ``exp(z_j - m)`` again.

With ``d_j = z_j - m`` over the classes ``j != g``:

    forward     s = sum exp(d_j)    t = sum exp(d_j) d_j    S = t/s - ln s    b = (m - z_g) + ln s
    backward    dl/dz_j = exp(d_j) / s * (f_S d_j - c),    c = f_S (ln s + S) - f_L,    dl/dz_g = f_g

which is ``q_j (f_L + f_S ((z_j - L) - S))`` with what depends on the row alone taken out of the loop.

Problems of at most FEW_ELEMENTS logits in short rows take another way: there a call costs its number of operations,
not their arithmetic, so value and gradient are formed together in the forward pass and the gradient (128 KiB at most)
is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cot_kernels.objectives import Objective

# A logit at or below the floor has probability zero, as has a masked one at -inf, for which 0 * -inf would be NaN.
FLOOR = -1e30

# Bytes of one scratch buffer; two are alive. 256 KiB to 1 MiB measured alike on a processor with 1.25 MiB of L2 a core.
CHUNK_BYTES = 1 << 19

# ATen's grain size: up to here an elementwise operation runs on one thread in a few microseconds. Rows must be short
# besides: log_softmax adds up a row in few running sums, and at 32,000 classes the gradient would be off by 4e-6.
FEW_ELEMENTS = 1 << 15
FEW_CLASSES = 1 << 10

# What a forward pass hands its backward pass: the gradient itself, or index, ignored rows, m, ln s, f_S, c and f_g.
Saved: TypeAlias = tuple[Tensor | None, ...]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


class _Statistics(NamedTuple):
    """One entry a row, shaped like the index."""

    shift: Tensor  # m
    log_total: Tensor  # ln s
    negentropy: Tensor  # S
    log_odds: Tensor  # b


def _check_targets(target: Tensor, ignore_index: int, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """The class dimension added back to the target, ignored rows pointing at class 0, and which rows those are."""
    index = target.long().unsqueeze(1)
    if index.numel() == 0:
        return index, None
    low, high = (int(bound) for bound in index.aminmax())
    if low >= 0 and high < num_classes and not low <= ignore_index <= high:
        return index, None
    ignored = index == ignore_index
    index = index.masked_fill(ignored, 0)
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= num_classes:
        raise IndexError(
            f"target {low if low < 0 else high} is out of bounds for {num_classes} classes: expected "
            f"0 <= target < {num_classes}, or ignore_index={ignore_index}"
        )
    return index, ignored


def _blocks(logits: Tensor, dtype: torch.dtype, buffers: int) -> Iterator[tuple[tuple[slice, ...], list[Tensor]]]:
    """Blocks of whole rows with scratch buffers of their shape: an index into N, and into D where one n is large."""
    num_rows, num_classes = logits.shape[:2]
    inner = logits.shape[2:].numel()
    fitting = max(1, CHUNK_BYTES // (num_classes * dtype.itemsize))  # rows
    if inner <= fitting or logits.dim() == 2:
        step = max(1, fitting // max(inner, 1))
        blocks: list[tuple[slice, ...]] = [(slice(start, start + step),) for start in range(0, num_rows, step)]
    else:
        columns = [slice(start, start + fitting) for start in range(0, inner, fitting)]
        blocks = [(slice(n, n + 1), slice(None), column) for n in range(num_rows) for column in columns]
    scratch = logits.new_empty((buffers, logits[blocks[0]].numel() if blocks else 0), dtype=dtype)
    for block in blocks:
        shape = logits[block].shape
        yield block, [buffer[: shape.numel()].view(shape) for buffer in scratch.unbind()]


def _statistics(logits: Tensor, index: Tensor) -> _Statistics:
    dtype = accumulation_dtype(logits.dtype)
    shift, total, moment = logits.new_empty((3, *index.shape), dtype=dtype).unbind()
    for block, (scaled, weights) in _blocks(logits, dtype, 2):
        rows = logits[block]
        if rows.dtype == dtype:
            torch.clamp(rows, min=FLOOR, out=scaled)
        else:
            scaled.copy_(rows).clamp_(min=FLOOR)
        scaled.scatter_(1, index[block], FLOOR)
        scaled.sub_(torch.amax(scaled, 1, keepdim=True, out=shift[block]))
        torch.sum(torch.exp(scaled, out=weights), 1, keepdim=True, out=total[block])
        torch.sum(scaled.mul_(weights), 1, keepdim=True, out=moment[block])
    log_total = total.log()
    # A complement with no class above the floor is empty: S is an empty sum, and b = -inf within rounding.
    negentropy = moment.div_(total).sub_(log_total).masked_fill_(shift <= FLOOR, 0)
    log_odds = (shift - logits.gather(1, index)).add_(log_total)
    return _Statistics(shift, log_total, negentropy, log_odds)


def _coefficients(statistics: _Statistics, f_target: Tensor, f_lse: Tensor, f_negentropy: Tensor) -> tuple[Tensor, ...]:
    offset = torch.addcmul(-f_lse, f_negentropy, statistics.log_total + statistics.negentropy)
    return f_negentropy, offset, f_target


def _gradient(
    logits: Tensor,
    index: Tensor,
    ignored: Tensor | None,
    shift: Tensor,
    log_total: Tensor,
    slope: Tensor,
    offset: Tensor,
    at_target: Tensor,
) -> Tensor:
    grad = torch.empty_like(logits)
    dtype = shift.dtype
    inverse_total = log_total.neg().exp_()
    slope, offset = slope * inverse_total, offset * inverse_total
    converts = logits.dtype != dtype
    for block, buffers in _blocks(logits, dtype, 1 + converts):
        rows, out, scaled = logits[block], grad[block], buffers[0]
        if converts:
            weights = buffers[1]
            scaled.copy_(rows).sub_(shift[block])
        else:
            weights = out
            torch.sub(rows, shift[block], out=scaled)
        torch.exp(scaled.clamp_(min=FLOOR), out=weights)
        weights.mul_(scaled.mul_(slope[block]).sub_(offset[block]))
        weights.scatter_(1, index[block], at_target[block])
        if ignored is not None:  # a NaN in an ignored row must not survive its zero coefficients
            weights.masked_fill_(ignored[block], 0)
        if converts:
            out.copy_(weights)
    return grad


def _few(logits: Tensor, index: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Row losses and the gradient of their sum, in as few operations as possible."""
    dtype = accumulation_dtype(logits.dtype)
    logits = logits.to(dtype)
    complement = logits.scatter(1, index, FLOOR)
    log_q = torch.log_softmax(complement, 1).clamp_(min=FLOOR)
    q = log_q.exp()
    negentropy = torch.mul(q, log_q).sum(1, keepdim=True)
    log_odds = complement.amax(1, keepdim=True).sub_(logits.gather(1, index)).sub_(log_q.amax(1, keepdim=True))
    loss, d_log_odds, d_negentropy = objective.rows(log_odds, negentropy)
    offset = torch.addcmul(d_log_odds, d_negentropy, negentropy, value=-1)
    grad = torch.addcmul(offset, d_negentropy, log_q).mul_(q).scatter_(1, index, d_log_odds.neg_())
    return loss, grad


def _averaged(objective: Objective, index: Tensor, ignored: Tensor | None, reduction: str) -> tuple[Objective, int]:
    """The objective whose sum is the wanted reduction, and the number of rows that count."""
    count = index.numel() if ignored is None else ignored.numel() - int(ignored.sum())
    return (objective.scaled(1 / count) if reduction == "mean" and count else objective), count


def _reduce(row_loss: Tensor, ignored: Tensor | None, count: int, reduction: str) -> Tensor:
    if ignored is not None:
        row_loss.masked_fill_(ignored, 0)
    if reduction == "none":
        return row_loss
    total = row_loss.sum()
    # With nothing to average over the mean is 0 / 0, as in torch.nn.functional.cross_entropy.
    return total if count or reduction == "sum" else total.fill_(torch.nan)


def _loss_of_few(
    logits: Tensor, index: Tensor, ignored: Tensor | None, objective: Objective, reduction: str
) -> tuple[Tensor, Saved]:
    objective, count = _averaged(objective, index, ignored, reduction)
    row_loss, grad = _few(logits, index, objective)
    if ignored is not None:
        grad.masked_fill_(ignored, 0)
    # The gradient is kept in the accumulation dtype: in half precision it could underflow before it is scaled.
    return _reduce(row_loss, ignored, count, reduction), (grad,)


def loss(
    logits: Tensor, target: Tensor, ignore_index: int, objective: Objective, reduction: str
) -> tuple[Tensor, Saved]:
    """Row losses (``reduction="none"``, (N, 1) or (N, 1, D)) or their sum or mean, and what :func:`gradient` needs.

    Args:
        logits: (N, K) or (N, K, D), any strides.
        target: (N) or (N, D), integers.
    """
    few = 0 < logits.numel() <= FEW_ELEMENTS and logits.shape[1] <= FEW_CLASSES
    if few and not 0 <= ignore_index < logits.shape[1]:
        # Gathering checks each index anyway; only when one is out of range is it worth a look of our own.
        with contextlib.suppress(IndexError, RuntimeError):
            return _loss_of_few(logits, target.long().unsqueeze(1), None, objective, reduction)
    index, ignored = _check_targets(target, ignore_index, logits.shape[1])
    if few:
        return _loss_of_few(logits, index, ignored, objective, reduction)
    objective, count = _averaged(objective, index, ignored, reduction)
    statistics = _statistics(logits, index)
    row_loss, d_log_odds, d_negentropy = objective.rows(statistics.log_odds, statistics.negentropy)
    coefficients = _coefficients(statistics, d_log_odds.neg(), d_log_odds, d_negentropy)
    saved = (index, ignored, statistics.shift, statistics.log_total, *coefficients)
    return _reduce(row_loss, ignored, count, reduction), saved


def gradient(logits: Tensor, saved: Saved, upstream: Tensor) -> Tensor:
    """``upstream * dl/dz`` in the dtype and layout of the logits; ``upstream`` is shaped like the loss."""
    if len(saved) == 1:
        return (_present(saved[0]) * upstream).to(logits.dtype)
    index, ignored, shift, log_total, slope, offset, at_target = saved
    coefficients = (_present(each) * upstream for each in (slope, offset, at_target))
    return _gradient(logits, _present(index), ignored, _present(shift), _present(log_total), *coefficients)


def statistics(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """target_logit, complement_lse and negentropy, each (N, 1) or (N, 1, D) and 0 where ignored, and the saved rows."""
    index, ignored = _check_targets(target, ignore_index, logits.shape[1])
    rows = _statistics(logits, index)
    target_logit = logits.gather(1, index).to(rows.shift.dtype)
    complement_lse = (rows.shift + rows.log_total).masked_fill_(rows.shift <= FLOOR, -torch.inf)
    negentropy = rows.negentropy.clone()  # the caller's to change; ours is saved
    if ignored is not None:
        for value in (target_logit, complement_lse, negentropy):
            value.masked_fill_(ignored, 0)
    return target_logit, complement_lse, negentropy, (index, ignored, *rows)


def statistics_gradient(
    logits: Tensor, saved: Saved, d_target_logit: Tensor, d_complement_lse: Tensor, d_negentropy: Tensor
) -> Tensor:
    """The gradient of anything built on :func:`statistics`, from what reaches its three outputs."""
    index, ignored, *rest = saved
    rows = _Statistics(*(_present(each) for each in rest))
    coefficients = _coefficients(rows, d_target_logit, d_complement_lse, d_negentropy)
    return _gradient(logits, _present(index), ignored, rows.shift, rows.log_total, *coefficients)
