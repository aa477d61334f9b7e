"""Which way a call takes: the autograd Functions, the registered operators, or plain operations; and in what shape.

Logits come as they were given, checked; what computes takes (N, K) or (N, K, D).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cot_kernels import autograd, context, differentiable, distributed, operators
from cot_kernels.checks import signed
from cot_kernels.objectives import Objective


def statistics(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """``(z_g, L, S)`` in the shape of the target."""
    values: tuple[Tensor, ...]
    target = signed(target, ignore_index)
    if distributed.is_dtensor(input):
        values, _ = distributed.by_rows(partial(statistics, ignore_index=ignore_index), input, target)
        return values
    if order := _memory_order(input):
        return _permuted(partial(statistics, ignore_index=ignore_index), input, target, order)
    logits, rows = _as_rows(input, target)
    if _eager(input, target):
        values = autograd.row_statistics(logits, rows, ignore_index)
    elif context.needs_plain_operations():
        values = differentiable.statistics(logits, rows, ignore_index)
    else:
        values = operators.statistics(logits, rows, ignore_index)
    return tuple(value.reshape(target.shape) for value in values)


def row_loss(input: Tensor, target: Tensor, ignore_index: int, objective: Objective, reduction: str) -> Tensor:
    """The losses of the rows under the reduction; not reduced, in the shape of the target."""
    loss: Tensor
    target = signed(target, ignore_index)
    if distributed.is_dtensor(input):
        rows_of_rank = partial(row_loss, ignore_index=ignore_index, objective=objective, reduction="none")
        (loss,), target = distributed.by_rows(lambda input, target: (rows_of_rank(input, target),), input, target)
        return operators.reduce(loss, target, ignore_index, reduction, distributed.replicate)
    if order := _memory_order(input):
        of_order = partial(row_loss, ignore_index=ignore_index, objective=objective, reduction=reduction)
        return _permuted(lambda input, target: (of_order(input, target),), input, target, order)[0]
    logits, rows = (input, target) if input.dim() == 2 else _as_rows(input, target)
    if _eager(input, target):
        loss = autograd.row_loss(logits, rows, ignore_index, objective, reduction)
    elif context.needs_plain_operations():
        loss = differentiable.loss(logits, rows, ignore_index, objective).squeeze(1)
        loss = operators.reduce(loss, rows, ignore_index, reduction)
    else:
        loss = operators.loss(logits, rows, ignore_index, objective, reduction)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _eager(input: Tensor, target: Tensor) -> bool:
    """Whether the autograd Functions can be called as they are, without the dispatcher's cost of an operator."""
    return not torch.compiler.is_compiling() and (
        context.plain(input)
        and context.plain(target)
        and not input.is_meta
        and not context.in_forward_mode()
        and not context.transformed()
        and not context.traced()
    )


def _memory_order(input: Tensor) -> list[int] | None:
    """The trailing dimensions, the outermost in memory first, where that is another order than theirs.

    In that order they are one dimension without a copy: logits whose height and width are transposed, for one. In a
    graph for any shape the strides are not known.
    """
    if input.dim() < 4 or torch.compiler.is_compiling():
        return None
    strides = input.stride()[2:]
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    return None if order == list(range(len(strides))) else order


def _permuted(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], input: Tensor, target: Tensor, order: list[int]
) -> tuple[Tensor, ...]:
    """``function`` with the trailing dimensions in ``order``; those of its values are put back."""
    values = function(input.permute(0, 1, *(2 + dim for dim in order)), target.permute(0, *(1 + dim for dim in order)))
    back = [0, *(1 + order.index(dim) for dim in range(len(order)))]
    return tuple(value.permute(back) if value.dim() else value for value in values)


def _as_rows(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) logits, or (N, K, D) where the class dimension is not the innermost, with their targets (N) or (N, D)."""
    if input.dim() == 1:
        return input.unsqueeze(0), target.unsqueeze(0)
    if input.dim() == 2:
        return input, target
    logits, rows = input.flatten(2), target.flatten(1)
    if logits.stride(1) == 1 and logits.stride(0) == logits.stride(2) * logits.shape[2]:  # channels last
        return logits.transpose(1, 2).flatten(0, 1), rows.flatten()
    return logits, rows
