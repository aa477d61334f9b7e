"""The loss family in ATen operations: any device for which there is nothing better.

Rows are processed in blocks whose two scratch buffers stay in cache, so each logit is read from memory once in the
forward and once in the backward pass. Besides the logits and their gradient only O(N) is held: per row the shift
``m = max_{j != g} z_j`` and three coefficients; the backward pass forms ``exp(z_j - m)`` again.

With ``d_j = z_j - m`` over the classes ``j != g``:

    forward     s = sum exp(d_j)    t = sum exp(d_j) d_j    S = t/s - ln s    b = (m - z_g) + ln s
    backward    dl/dz_j = exp(d_j) (A d_j + B),    A = f_S / s,    B = (f_L - f_S t/s) / s,    dl/dz_g = f_g

which is ``q_j (f_L + f_S ((z_j - L) - S))`` with what depends on the row alone taken out of the loop.

On a CPU :mod:`.native.backend` takes its place where the package was built with a compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cot_kernels.backends import FLOOR, accumulation_dtype
from cot_kernels.objectives import Objective, cross_entropy_of

# The exponential of this is zero in any precision, and its product with the slope of a row finite with any slope.
NOTHING = -1e4

# The least of z_j - m in the sums: exp(-87) is nothing beside s >= 1, in float64 too, and an ordinary number, where exp
# of the floor takes the slow way of arguments that underflow.
NEGLIGIBLE = -87.0

LOG2_E = 1.4426950408889634

# Bytes of one scratch buffer; two are alive. 512 KiB to 2 MiB measured alike on a processor with 1.25 MiB of L2 a core.
BLOCK_BYTES = 1 << 20

# What a forward pass hands its backward pass: index, ignored rows, m, and A, B and f_g stacked.
Saved: TypeAlias = tuple[Tensor | None, ...]


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


class _Statistics(NamedTuple):
    """One entry a row, shaped like the index."""

    shift: Tensor  # m
    total: Tensor  # s
    mean: Tensor  # t / s
    negentropy: Tensor  # S
    log_odds: Tensor  # b


def _read_targets(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Where each row's target is in the logits, which rows are ignored (they point at class 0), and ``z_g``."""
    num_classes = logits.shape[1]
    index = target.long().unsqueeze(1)
    if not 0 <= ignore_index < num_classes:
        # Gathering checks each index anyway; only when one is out of range is it worth a look of our own.
        with contextlib.suppress(IndexError, RuntimeError):
            return index, None, logits.gather(1, index)
    ignored = index == ignore_index
    index = index.masked_fill(ignored, 0)
    if index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= num_classes:
            raise IndexError(
                f"target {low if low < 0 else high} is out of bounds for {num_classes} classes: expected "
                f"0 <= target < {num_classes}, or ignore_index={ignore_index}"
            )
    return index, ignored, logits.gather(1, index)


def _block_shape(logits: Tensor, dtype: torch.dtype, block_bytes: int) -> tuple[int, int]:
    """How many n, and how many of the D columns of each, one block takes: whole rows, a scratch buffer full at most."""
    num_rows, num_classes = logits.shape[:2]
    columns = logits.shape[2:].numel()
    fitting = max(1, block_bytes // (num_classes * dtype.itemsize))  # rows
    if columns > fitting:
        return 1, fitting
    blocks = -(-num_rows * columns // fitting)
    return -(-num_rows // max(blocks, 1)) or 1, max(columns, 1)  # of one size, as near as can be


def _blocks(shape: tuple[int, int], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same block of each tensor, in turn. Splitting is one call a tensor where indexing is one a block."""
    rows, columns = shape
    if tensors[0].shape[0] <= rows and tensors[0].shape[2:].numel() <= columns:
        return iter((tensors,))
    parts: Iterator[list[Tensor] | tuple[Tensor, ...]] = (torch.split(tensor, rows) for tensor in tensors)
    if tensors[0].dim() > 2:
        parts = ([piece for part in each for piece in torch.split(part, columns, 2)] for each in parts)
    return zip(*parts, strict=True)


def _fit(buffers: tuple[Tensor, ...], block: Tensor) -> tuple[Tensor, ...]:
    """The buffers in the shape of the block: their own, but for the blocks at the edge."""
    if block.shape == buffers[0].shape:
        return buffers
    return tuple(buffer.view(-1)[: block.numel()].view(block.shape) for buffer in buffers)


def _statistics(logits: Tensor, index: Tensor, target_logit: Tensor) -> _Statistics:
    return _finish(*_sums(logits, index), target_logit)


def _sums(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, s and t, shaped like the index."""
    dtype = accumulation_dtype(logits.dtype)
    shift, total, moment = logits.new_empty((3, *index.shape), dtype=dtype).unbind()
    # Scattering from a tensor takes a quarter of the time of scattering a number.
    floor = logits.new_full((1,), FLOOR, dtype=dtype).expand(index.shape)
    buffers: tuple[Tensor, ...] = ()
    for rows, target, below, m, s, t in _blocks(
        _block_shape(logits, dtype, BLOCK_BYTES), logits, index, floor, shift, total, moment
    ):
        buffers = buffers or logits.new_empty((2, *rows.shape), dtype=dtype).unbind()
        d, weights = _fit(buffers, rows)
        _exponentials(d.copy_(rows), target, below, d, weights, m)
        torch.sum(weights, 1, True, out=s)
        torch.sum(d.mul_(weights), 1, True, out=t)
    return shift, total, moment


def _exponentials(
    z: Tensor, target: Tensor, below: Tensor, d: Tensor, weights: Tensor, shift: Tensor | None = None
) -> Tensor:
    """Fills d and exp(d) from logits, which lose their targets', and returns m.

    The exponential of the target is negligible, as is that of any class far below the largest.
    """
    shift = torch.amax(z.scatter_(1, target, below), 1, True, out=shift).clamp_(min=FLOOR)
    _exp(torch.sub(z, shift, out=d).clamp_(min=NEGLIGIBLE), out=weights)
    return shift


def _exp(d: Tensor, out: Tensor) -> Tensor:
    """exp(d), of d <= 0, as a power of two: torch.exp hands over to a library that takes 2.5 times as long on a CPU.

    The product's rounding makes a relative error of half a unit of d, which d has from its own subtraction already.
    """
    return torch.exp2(torch.mul(d, LOG2_E, out=out), out=out)


def _finish(shift: Tensor, total: Tensor, moment: Tensor, target_logit: Tensor) -> _Statistics:
    # A complement with no class above the floor is empty: its sums are empty, and b = -inf within rounding.
    empty = shift <= FLOOR
    log_total = total.masked_fill_(empty, 1).log()
    mean = moment.div_(total).masked_fill_(empty, 0)
    negentropy, log_odds = mean - log_total, (shift - target_logit).add_(log_total)
    # A class of an empty complement has a weight of 0, whatever its logit.
    return _Statistics(shift, total.masked_fill_(empty, torch.inf), mean, negentropy, log_odds)


def _coefficients(total: Tensor, mean: Tensor, f_target: Tensor, f_lse: Tensor, f_negentropy: Tensor) -> Tensor:
    """A, B and f_g, stacked."""
    coefficients = torch.empty((3, *total.shape), dtype=total.dtype, device=total.device)
    slope, offset, at_target = coefficients.unbind()
    torch.div(f_negentropy, total, out=slope)
    torch.addcmul(f_lse, f_negentropy, mean, value=-1, out=offset).div_(total)
    at_target.copy_(f_target)
    return coefficients


def _gradient(logits: Tensor, index: Tensor, ignored: Tensor | None, shift: Tensor, coefficients: Tensor) -> Tensor:
    grad = torch.empty_like(logits)
    dtype = shift.dtype
    converts = logits.dtype != dtype
    per_row = [index, shift, *coefficients.unbind()] + ([] if ignored is None else [ignored])
    buffers: tuple[Tensor, ...] = ()
    for rows, out, target, m, slope, offset, at_target, *skip in _blocks(
        _block_shape(logits, dtype, BLOCK_BYTES), logits, grad, *per_row
    ):
        buffers = buffers or logits.new_empty((1 + converts, *rows.shape), dtype=dtype).unbind()
        d, *converted = _fit(buffers, rows)
        weights = converted[0] if converts else out
        if converts:
            d.copy_(rows).sub_(m)
        else:
            torch.sub(rows, m, out=d)
        _exp(d.clamp_(min=NOTHING), out=weights)
        weights.mul_(d.mul_(slope).add_(offset)).scatter_(1, target, at_target)
        if skip:  # a NaN in an ignored row must not survive its zero coefficients
            weights.masked_fill_(skip[0], 0)
        if converts:
            out.copy_(weights)
    return grad


def _many(logits: Tensor, index: Tensor, target_logit: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses, and what the gradient of their sum needs: the shift, and the coefficients."""
    rows = _statistics(logits, index, target_logit)
    row_loss, d_log_odds, d_negentropy = objective.rows(rows.log_odds, rows.negentropy)
    return row_loss, rows.shift, _coefficients(rows.total, rows.mean, d_log_odds.neg(), d_log_odds, d_negentropy)


def _reduce(row_loss: Tensor, ignored: Tensor | None, count: int, reduction: str) -> Tensor:
    if ignored is not None:
        row_loss.masked_fill_(ignored, 0)
    if reduction == "none":
        return row_loss
    total = row_loss.sum()
    # With nothing to average over the mean is 0 / 0, as in torch.nn.functional.cross_entropy.
    return total if count or reduction == "sum" else total.fill_(torch.nan)


def loss(
    logits: Tensor, target: Tensor, ignore_index: int, objective: Objective, reduction: str
) -> tuple[Tensor, Saved]:
    """Row losses (``reduction="none"``, (N, 1) or (N, 1, D)) or their sum or mean, and what :func:`gradient` needs.

    Args:
        logits: (N, K) or (N, K, D), any strides.
        target: (N) or (N, D), integers.
    """
    index, ignored, target_logit = _read_targets(logits, target, ignore_index)
    count = index.numel() if ignored is None else index.numel() - int(ignored.sum())
    if reduction == "mean" and count:
        objective = objective.scaled(1 / count)
    row_loss, shift, coefficients = _many(logits, index, target_logit, objective)
    return _reduce(row_loss, ignored, count, reduction), (index, ignored, shift, coefficients)


def gradient(logits: Tensor, saved: Saved, upstream: Tensor) -> Tensor:
    """``upstream * dl/dz`` in the dtype and layout of the logits; ``upstream`` is shaped like the loss."""
    index, ignored, shift, coefficients = saved
    return _gradient(logits, _present(index), ignored, _present(shift), _present(coefficients) * upstream)


def statistics(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """target_logit, complement_lse and negentropy, each (N, 1) or (N, 1, D) and 0 where ignored, and the saved rows."""
    index, ignored, target_logit = _read_targets(logits, target, ignore_index)
    rows = _statistics(logits, index, target_logit)
    target_logit = target_logit.to(rows.shift.dtype)
    complement_lse = (rows.shift + rows.total.log()).masked_fill_(rows.shift <= FLOOR, -torch.inf)
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
    coefficients = _coefficients(rows.total, rows.mean, d_target_logit, d_complement_lse, d_negentropy)
    return _gradient(logits, _present(index), ignored, rows.shift, coefficients)


# The same by rows, for the registered operators: what is handed on is one tensor, whose shape follows from that of the
# target alone. So targets are read again.

LOSS_STATE = 4  # m, A, B, f_g
STATISTICS_STATE = 3  # m, s, t / s


def row_loss(logits: Tensor, target: Tensor, ignore_index: int, objective: Objective) -> tuple[Tensor, Tensor]:
    """Row losses in the shape of the target, and the state, [LOSS_STATE, *target.shape]."""
    index, ignored, target_logit = _read_targets(logits, target, ignore_index)
    values, shift, coefficients = _many(logits, index, target_logit, objective)
    return _reduce(values, ignored, 0, "none").squeeze(1), torch.cat((shift[None], coefficients)).squeeze(2)


def row_loss_gradient(logits: Tensor, target: Tensor, ignore_index: int, state: Tensor, upstream: Tensor) -> Tensor:
    index, ignored = _reread_targets(target, ignore_index)
    shift, coefficients = state[0].unsqueeze(1), state[1:].unsqueeze(2)
    return _gradient(logits, index, ignored, shift, coefficients * upstream.unsqueeze(1))


def row_statistics(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """target_logit, complement_lse and negentropy in the shape of the target, and [STATISTICS_STATE, *target.shape]."""
    *values, saved = statistics(logits, target, ignore_index)
    target_logit, complement_lse, negentropy = (value.squeeze(1) for value in values)
    state = torch.stack([_present(each).squeeze(1) for each in saved[2:5]])
    return target_logit, complement_lse, negentropy, state


def row_statistics_gradient(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    state: Tensor,
    d_target_logit: Tensor,
    d_complement_lse: Tensor,
    d_negentropy: Tensor,
) -> Tensor:
    index, ignored = _reread_targets(target, ignore_index)
    shift, total, mean = state.unsqueeze(2).unbind()
    upstreams = (each.unsqueeze(1) for each in (d_target_logit, d_complement_lse, d_negentropy))
    coefficients = _coefficients(total, mean, *upstreams)
    return _gradient(logits, index, ignored, shift, coefficients)


def value_and_gradient(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    objective: Objective,
    upstream: Tensor | None,
    wanted: bool,
) -> Tensor:
    """Loss, cross-entropy and negentropy of rows, (3, N). **Overwrites the logits**, where wanted with the gradient.

    Args:
        logits: (N, K).
        target: (N), integers.
        upstream: (N), the derivative of a scalar by each row's loss; None where it is 1.
    """
    index, ignored, target_logit = _read_targets(logits, target, ignore_index)
    dtype = accumulation_dtype(logits.dtype)
    values = logits.new_empty((3, *index.shape), dtype=dtype)
    target_logit = target_logit.to(dtype)
    floor = logits.new_full((1,), FLOOR, dtype=dtype).expand(index.shape)
    scale = index.new_ones((1,), dtype=dtype).expand(index.shape) if upstream is None else upstream.unsqueeze(1)
    buffers: tuple[Tensor, ...] = ()
    # Twice the block of the separate passes: here each block has its operations on few numbers as well.
    for rows, g, z_g, below, factor, *kept in _blocks(
        _block_shape(logits, dtype, 2 * BLOCK_BYTES), logits, index, target_logit, floor, scale, *values.unbind()
    ):
        buffers = buffers or logits.new_empty((1 + (logits.dtype != dtype), *rows.shape), dtype=dtype).unbind()
        weights, *converted = _fit(buffers, rows)
        # In place, and the gradient as w d A + w B, not w (d A + B): a third buffer would not fit the cache.
        d = converted[0].copy_(rows) if converted else rows
        shift = _exponentials(d, g, below, d, weights)
        total, moment = weights.sum(1, True), d.mul_(weights).sum(1, True)
        found = _finish(shift, total, moment, z_g)
        loss, d_log_odds, d_negentropy = objective.rows(found.log_odds, found.negentropy)
        for place, value in zip(kept, (loss, cross_entropy_of(found.log_odds), found.negentropy), strict=True):
            place.copy_(value)
        if wanted:
            partials = (each * factor for each in (-d_log_odds, d_log_odds, d_negentropy))
            slope, offset, at_target = _coefficients(found.total, found.mean, *partials).unbind()
            d.mul_(slope).add_(weights.mul_(offset)).scatter_(1, g, at_target)
            if converted:
                rows.copy_(d)
    if ignored is not None:
        values.masked_fill_(ignored, 0)
        if wanted:
            logits.masked_fill_(ignored, 0)
    return values.squeeze(2)


def _reread_targets(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    index = target.long().unsqueeze(1)
    ignored = index == ignore_index
    return (index.masked_fill(ignored, 0), ignored) if ignored.any() else (index, None)
