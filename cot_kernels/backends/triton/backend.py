"""The loss family in Triton: GPUs, and the CPU under Triton's interpreter.

A loss is three launches: the statistics of the rows with the objective (a second one merges them where rows were
split), the reduction (two, of thousands of partial sums), and, in the backward pass, the gradient. Nothing here waits
for the device.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor

from cot_kernels.backends import accumulation_dtype
from cot_kernels.backends.triton import launch, layout
from cot_kernels.backends.triton.gradient import gradient_kernel
from cot_kernels.backends.triton.objectives import TWINS, device_twin
from cot_kernels.backends.triton.prepared import Plans, Prepared, settle_keys
from cot_kernels.backends.triton.reduction import fold_kernel, reduce_kernel
from cot_kernels.backends.triton.statistics import merge_kernel, split_kernel, statistics_kernel
from cot_kernels.backends.triton.value_and_gradient import value_and_gradient_kernel
from cot_kernels.objectives import Objective, cross_entropy_of

# What a forward pass hands its backward pass: target and state, [5, N] (see statistics.finish). That of a reduced loss
# is one row: behind the 5 N numbers come the partial sums, and last what the gradient of a row's loss is multiplied by.
Saved: TypeAlias = tuple[Tensor, Tensor]

settle_keys(
    *TWINS, statistics_kernel, split_kernel, merge_kernel, reduce_kernel, fold_kernel, gradient_kernel,
    value_and_gradient_kernel,
)  # fmt: skip

_REDUCE_BLOCK = 1024
_HERE = contextlib.nullcontext()

# By all that a plan follows from, and all that decides for which variants of its kernels.
forward_plans: Plans[_Forward] = Plans()
gradient_plans: Plans[Prepared] = Plans()


def _on(device: int) -> AbstractContextManager[object]:
    """Kernels start on the current device, which need not be the one that holds the logits."""
    return _HERE if device < 0 or device == torch.cuda.current_device() else torch.cuda.device(device)


class _Forward(NamedTuple):
    """A forward pass: shapes of what it writes, and its launches."""

    dtype: torch.dtype  # of all these, that of the arithmetic
    state: tuple[int, int] | int
    values: tuple[int, int] | None  # where they are not reduced
    parts: tuple[int, int, int] | None  # where rows are split
    rows: tuple[Prepared, ...]
    reduces: tuple[Prepared, ...]


def _next_access(place: int) -> int:
    return (place + 15) // 16 * 16


def _registers(most: int) -> dict[str, int]:
    """The most that a thread may have: an option of NVIDIA's compiler alone."""
    return {"maxnreg": most} if torch.version.hip is None else {}


def _plan_forward(
    logits: Tensor, target: Tensor, ignore_index: int, objective: Objective | None, reduction: str
) -> _Forward:
    num_rows, num_classes, dtype = target.numel(), logits.shape[1], accumulation_dtype(logits.dtype)
    reduces = reduction != "none"
    twin: Any = None
    parameters = (0.0, 0.0, 0.0)
    if objective is not None:
        twin, parameters = device_twin(objective)
    tile = layout.tile(logits)
    splits = layout.splits(tile, num_rows, num_classes, logits.device)
    if splits > 1:
        turns, block_rows = 1, max(1, 256 // launch.next_power_of_two(splits))
    else:
        turns = launch.choose_row_turns(tile, num_rows, layout.multiprocessors(logits.device))
        block_rows = turns * tile.rows
    inner, stride_n, stride_k, stride_d = layout.strides(logits, tile.across)
    blocks = layout.blocks(tile, num_rows, inner) if tile.plane else triton.cdiv(num_rows, block_rows)

    partials = _next_access(5 * num_rows) if reduces else 0
    numbers = (num_rows, num_classes, inner, stride_n, stride_k, stride_d, ignore_index, *parameters, partials)
    common = {"OBJECTIVE": twin, "REDUCES": reduces}
    if not num_rows:
        rows: tuple[Prepared, ...] = ()
    elif splits > 1:
        rows = (
            Prepared(
                split_kernel,
                num_rows * splits,
                (num_rows, num_classes, inner, stride_n, stride_d, ignore_index, splits),
                {
                    "LANES": tile.lanes,
                    "VEC": tile.vec,
                    "DEPTH": tile.depth,
                    "ALIGN": tile.align,
                    "NARROW": tile.narrow,
                },
                num_warps=tile.warps,
            ),
            Prepared(
                merge_kernel,
                blocks,
                (*numbers, splits),
                {
                    **common,
                    "ROWS": block_rows,
                    "SPLITS": launch.next_power_of_two(splits),
                    "NARROW": tile.narrow,
                },
            ),
        )
    else:
        constants = {
            **common,
            "LONG": tile.long,
            "ACROSS": tile.across,
            "PLANE": tile.plane,
            "ROWS": tile.rows,
            "TURNS": tile.turns,
            "PIECES": tile.pieces,
            "LANES": tile.lanes,
            "VEC": tile.vec,
            "DEPTH": tile.depth,
            "ALIGN": tile.align,
            "HEADS": tile.heads and not tile.long,  # long rows look for their boundary anyway
            "NARROW": tile.narrow,
        }
        # Threads of eight rows side by side; others take few enough by themselves, and a limit costs instructions.
        eight_rows = tile.across and not tile.plane and logits.itemsize == 2
        limit = _registers(launch.REGISTERS_ACROSS) if eight_rows else {}
        rows = (Prepared(statistics_kernel, blocks, (*numbers, turns), constants, num_warps=tile.warps, **limit),)

    parts = (3, num_rows, splits) if splits > 1 else None
    if not reduces:
        return _Forward(dtype, (5, num_rows), (1 if objective is not None else 3, num_rows), parts, rows, ())
    reductions: tuple[Prepared, ...] = ()
    if blocks > launch.FOLD_BLOCK:
        programs, folded = triton.cdiv(blocks, launch.FOLD_BLOCK), _next_access(partials + 2 * blocks)
        reductions = (
            Prepared(fold_kernel, programs, (partials, folded, blocks), {"BLOCK": launch.FOLD_BLOCK}, num_warps=8),
        )
        blocks, partials = programs, folded
    constants = {"MEAN": reduction == "mean", "BLOCK": _REDUCE_BLOCK}
    last = Prepared(reduce_kernel, 1, (partials, blocks), constants, num_warps=4)
    return _Forward(dtype, partials + 2 * blocks + 1, None, parts, rows, (*reductions, last))


def _forward(
    logits: Tensor, target: Tensor, ignore_index: int, objective: Objective | None, reduction: str
) -> tuple[_Forward, Tensor, Tensor, Tensor]:
    """The plan; row values, or the state again; the target in row order; and the state."""
    logits, target = logits.resolve_neg(), target.contiguous()  # a kernel would not see that signs are still to change
    device = logits.get_device()
    key = (
        logits.shape, logits.stride(), logits.dtype, logits.data_ptr() % 16, device, target.dtype,
        target.data_ptr() % 16, ignore_index, objective, reduction,
    )  # fmt: skip
    plan = forward_plans.get(key)
    if plan is None:
        plan = forward_plans.keep(key, _plan_forward(logits, target, ignore_index, objective, reduction))
    state = logits.new_empty(plan.state, dtype=plan.dtype)
    values = state if plan.values is None else state.new_empty(plan.values)
    if plan.parts is not None:
        parts = state.new_empty(plan.parts)
        split, merge = plan.rows
        split(device, logits, target, parts)
        merge(device, logits, target, parts, state, values)
    elif plan.rows:
        plan.rows[0](device, logits, target, state, values)
    return plan, values, target, state


def loss(
    logits: Tensor, target: Tensor, ignore_index: int, objective: Objective, reduction: str
) -> tuple[Tensor, Saved]:
    """Row losses (``reduction="none"``, (1, rows)) or their sum or mean, and what :func:`gradient` needs.

    Args:
        logits: (N, K) or (N, K, D), any strides.
        target: (N) or (N, D), integers.
    """
    device = logits.get_device()
    with _on(device):
        plan, values, flat_target, state = _forward(logits, target, ignore_index, objective, reduction)
        if not plan.reduces:
            return values, (flat_target, state)
        result = state.new_empty(())
        for fold in plan.reduces[:-1]:
            fold(device, state)
        plan.reduces[-1](device, state, result)
    return result, (flat_target, state)


def _plan_gradient(logits: Tensor, target: Tensor, state: Tensor, upstream: Tensor, grad: Tensor) -> Prepared:
    num_rows, num_classes = target.numel(), logits.shape[1]
    tile = layout.tile(logits, grad)
    tiles = triton.cdiv(num_classes + tile.overhang, tile.block)
    turns = launch.choose_turns(tile, num_rows, tiles, layout.multiprocessors(logits.device))
    inner, *strides = layout.strides(logits, tile.across)
    blocks = layout.blocks(tile, num_rows, inner)
    programs = blocks * triton.cdiv(tiles, turns) if tile.long or tile.across else triton.cdiv(blocks, turns)
    by_row = upstream.dim() and upstream.numel() == num_rows and num_rows > 1
    reduced = state.dim() == 1
    return Prepared(
        gradient_kernel,
        programs,
        (
            num_rows, num_classes, inner, *strides, *layout.strides(grad, tile.across)[1:],
            upstream.stride(0) if by_row else 0, state.numel() - 1 if reduced else 0, tiles, turns,
        ),
        {
            "HAS_FACTOR": reduced,
            "LONG": tile.long,
            "ACROSS": tile.across,
            "PLANE": tile.plane,
            "PIECES": tile.pieces,
            "ROWS": tile.rows,
            "WIDTH": tile.lanes * tile.vec,
            "VEC": tile.vec,
            "ALIGN": tile.align,
            "HEADS": tile.heads and not tile.long,  # long rows look for their boundary anyway
        },
        num_warps=tile.warps,
        **(_registers(launch.REGISTERS) if tile.long else {}),
    )  # fmt: skip


def gradient(logits: Tensor, saved: Saved, upstream: Tensor, grad: Tensor | None = None) -> Tensor:
    """``upstream * dl/dz`` in the dtype of the logits; ``upstream`` is shaped like the loss.

    It is written to ``grad`` if given, which may be the logits themselves: a program reads its tile, then writes it.
    """
    # Hooks on saved tensors may have changed how they lie.
    target, state = saved[0].contiguous(), saved[1].contiguous()
    logits, upstream = logits.resolve_neg(), upstream.resolve_neg()
    begin, device = logits.data_ptr() % launch.LINE, logits.get_device()
    if grad is None:
        grad = layout.gradient_like(logits) if begin or not logits.is_contiguous() else torch.empty_like(logits)
    if not grad.numel():
        return grad
    if upstream.dim() > 1:
        upstream = upstream.reshape(-1)  # a view of any scalar or expanded upstream
    others = target.data_ptr(), state.data_ptr(), upstream.data_ptr(), grad.data_ptr()
    begins = 0
    for each in others:
        begins = begins * 16 + each % 16
    key = (
        logits.shape, logits.stride(), logits.dtype, begin, device, grad.stride(), target.dtype, state.shape,
        upstream.shape, upstream.stride(), upstream.dtype, begins,
    )  # fmt: skip
    plan = gradient_plans.get(key)
    if plan is None:
        plan = gradient_plans.keep(key, _plan_gradient(logits, target, state, upstream, grad))
    with _on(device):
        plan(device, logits, target, state, upstream, grad)
    return grad


def statistics(
    logits: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """target_logit, complement_lse and negentropy, (rows) each (zero where ignored), and the saved rows."""
    with _on(logits.get_device()):
        _, values, flat_target, state = _forward(logits, target, ignore_index, None, "none")
    target_logit, complement_lse, negentropy = (value.clone() for value in values.unbind())
    return target_logit, complement_lse, negentropy, (flat_target, state, values)


def statistics_gradient(
    logits: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    d_target_logit: Tensor,
    d_complement_lse: Tensor,
    d_negentropy: Tensor,
) -> Tensor:
    """The gradient of anything built on :func:`statistics`, from what reaches its three outputs."""
    target, state, values = saved
    state = _coefficients(state, values[2], d_target_logit, d_complement_lse, d_negentropy)
    return gradient(logits, (target, state), state.new_ones(()))


def _coefficients(
    state: Tensor, negentropy: Tensor, d_target_logit: Tensor, d_complement_lse: Tensor, d_negentropy: Tensor
) -> Tensor:
    """A state of which only the first two rows are taken, with what reaches the statistics as the partials."""
    coefficients = torch.empty((5, state.shape[1]), dtype=state.dtype, device=state.device)
    slope, d_lse, at_target = (each.reshape(-1) for each in (d_negentropy, d_complement_lse, d_target_logit))
    coefficients[:2] = state[:2]
    torch.mul(slope, math.log(2), out=coefficients[2])
    torch.sub(slope * negentropy, d_lse, out=coefficients[3])
    coefficients[4] = at_target
    return coefficients


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
        logits: (N, K). Where rows begin on 16-byte boundaries, what pads them to whole 16 bytes is overwritten too.
        target: (N), integers.
        upstream: (N), the derivative of a scalar by each row's loss; None where it is 1.
    """
    num_rows, num_classes = logits.shape
    tile = layout.tile(layout.with_padding(logits), in_place=True)
    if tile.heads or layout.splits(tile, num_rows, num_classes, logits.device) > 1:
        return _value_then_gradient(logits, target, ignore_index, objective, upstream, wanted)
    twin, parameters = device_twin(objective)
    values = torch.empty((3, num_rows), dtype=accumulation_dtype(logits.dtype), device=logits.device)
    if not num_rows:
        return values
    with _on(logits.get_device()):
        value_and_gradient_kernel[(triton.cdiv(num_rows, tile.rows),)](
            logits, target.contiguous(), values if upstream is None else upstream, values, num_rows, num_classes,
            logits.stride(0), 0 if upstream is None else upstream.stride(0), ignore_index, *parameters,
            OBJECTIVE=twin,
            HAS_UPSTREAM=upstream is not None,
            GRADIENT=wanted,
            LONG=tile.long,
            PIECES=tile.pieces,
            ROWS=tile.rows,
            LANES=tile.lanes,
            VEC=tile.vec,
            DEPTH=tile.depth,
            ALIGN=tile.align,
            TAIL=num_classes % tile.vec != 0,
            NARROW=tile.narrow and tile.long,  # of whole rows the compiler would keep what it widened
            num_warps=tile.warps,
        )  # fmt: skip
    return values


def _value_then_gradient(
    logits: Tensor, target: Tensor, ignore_index: int, objective: Objective, upstream: Tensor | None, wanted: bool
) -> Tensor:
    """For rows so few that several programs share one, and those that begin anywhere: the statistics, and then the
    gradient in place."""
    with _on(logits.get_device()):
        _, values, flat_target, state = _forward(logits, target, ignore_index, None, "none")
    target_logit, _, negentropy = values.unbind()
    # As in statistics.finish. NaN where the target is out of range; where it is ignored, the state is infinite.
    log_odds = state[1] * math.log(2) - (target_logit - state[0])
    log_odds = log_odds.masked_fill(target.reshape(-1) == ignore_index, 0)
    row_loss, d_log_odds, d_negentropy = objective.rows(log_odds, negentropy)
    values = torch.stack((row_loss, cross_entropy_of(log_odds), negentropy))
    if wanted:
        partials = (-d_log_odds, d_log_odds, d_negentropy)
        state = _coefficients(state, negentropy, *partials)
        gradient(logits, (flat_target, state), state.new_ones(()) if upstream is None else upstream, logits)
    return values.masked_fill_(target == ignore_index, 0)


# The same by rows, for the registered operators: what is handed on is one tensor, whose shape follows from that of the
# target alone; and a gradient has the strides that torch.empty_like gives it, which a compiler knows beforehand, with
# any symbol for a size.

LOSS_STATE = 5  # see statistics.finish
STATISTICS_STATE = 3  # shift, log2 s, S


def row_loss(logits: Tensor, target: Tensor, ignore_index: int, objective: Objective) -> tuple[Tensor, Tensor]:
    """Row losses in the shape of the target, and the state, [LOSS_STATE, *target.shape]."""
    with _on(logits.get_device()):
        _, values, _, state = _forward(logits, target, ignore_index, objective, "none")
    return values.view(target.shape), state.view(LOSS_STATE, *target.shape)


def row_loss_gradient(logits: Tensor, target: Tensor, ignore_index: int, state: Tensor, upstream: Tensor) -> Tensor:
    return gradient(logits, (target, state), upstream, torch.empty_like(logits))


def row_statistics(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """target_logit, complement_lse and negentropy in the shape of the target, and [STATISTICS_STATE, *target.shape]."""
    *values, (_, state, saved) = statistics(logits, target, ignore_index)
    target_logit, complement_lse, negentropy = (value.view(target.shape) for value in values)
    state = torch.cat((state[:2], saved[2:])).view(STATISTICS_STATE, *target.shape)
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
    state = state.flatten(1)
    coefficients = _coefficients(state, state[2], d_target_logit, d_complement_lse, d_negentropy)
    return gradient(logits, (target, coefficients), coefficients.new_ones(()), torch.empty_like(logits))
