"""The family as registered operators, ``torch.ops.cot_kernels.*``: what torch.compile, torch.export, torch.func, fake
and meta tensors see of it.

Each has a fake, an autograd and a vmap rule, and passes autocast unchanged: whatever the region, half-precision logits
are read as they are and computed with in float32. Losses come unreduced, so that all shapes follow from those of the
arguments; a compiler fuses the reduction with what surrounds it. In eager mode :mod:`.autograd` takes the shorter way,
without the dispatcher's cost of each call.

``state`` holds the backend's numbers for each row, [numbers, *target.shape]; it is opaque and carries no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.library import custom_op

from cot_kernels import autograd, context, differentiable
from cot_kernels.backends import accumulation_dtype
from cot_kernels.checks import check_rows
from cot_kernels.objectives import (
    ComplementEntropyObjective,
    CrossEntropyObjective,
    GuidedComplementEntropyObjective,
    Objective,
)

# An objective crosses the dispatcher as its name and its numbers.
_OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "complement_entropy": ComplementEntropyObjective,
    "guided_complement_entropy": GuidedComplementEntropyObjective,
    "cross_entropy": CrossEntropyObjective,
}

Batched: TypeAlias = tuple[Any, ...]


def describe(objective: Objective) -> tuple[str, list[float]]:
    """The name and the numbers of an objective. (dataclasses.astuple copies, which torch.compile of 2.8 refuses.)"""
    name = next(name for name, kind in _OBJECTIVES.items() if isinstance(objective, kind))  # type: ignore[arg-type]
    return name, [getattr(objective, field.name) for field in dataclasses.fields(objective)]


def objective_of(name: str, parameters: list[float]) -> Objective:
    return _OBJECTIVES[name](*parameters)


_STATISTICS = ("d_target_logit", "d_complement_lse", "d_negentropy")


def _check(logits: Tensor, target: Tensor, ignore_index: int, **rows: Tensor) -> None:
    """What a kernel is about to read is there: operators are public, and nothing else has looked."""
    check_rows(logits, target, ignore_index, "none")
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must have shape (N, K) or (N, K, D), got {tuple(logits.shape)}")
    dtype = accumulation_dtype(logits.dtype)
    for name, each in rows.items():
        shape = each.shape[1:] if name == "state" else each.shape
        if shape != target.shape or each.dtype != dtype or each.device != logits.device:
            raise ValueError(
                f"{name} must hold {dtype} on {logits.device} for a target of shape {tuple(target.shape)}, got "
                f"{tuple(each.shape)} of {each.dtype} on {each.device}"
            )


@custom_op("cot_kernels::row_loss", mutates_args=())
def row_loss(
    logits: Tensor, target: Tensor, ignore_index: int, objective: str, parameters: list[float]
) -> tuple[Tensor, Tensor]:
    """Row losses ``l(b, S)`` in the shape of the target, and the state."""
    _check(logits, target, ignore_index)
    backend = autograd.backend_for(logits)
    return backend.row_loss(logits, target, ignore_index, objective_of(objective, parameters))  # type: ignore[no-any-return]


@custom_op("cot_kernels::row_loss_gradient", mutates_args=())
def row_loss_gradient(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    objective: str,
    parameters: list[float],
    state: Tensor,
    upstream: Tensor,
) -> Tensor:
    """The gradient of ``sum_n upstream_n l_n``."""
    _check(logits, target, ignore_index, state=state, upstream=upstream)
    return autograd.backend_for(logits).row_loss_gradient(logits, target, ignore_index, state, upstream)  # type: ignore[no-any-return]


@custom_op("cot_kernels::row_statistics", mutates_args=())
def row_statistics(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(z_g, L, S)`` in the shape of the target, and the state."""
    _check(logits, target, ignore_index)
    return autograd.backend_for(logits).row_statistics(logits, target, ignore_index)  # type: ignore[no-any-return]


@custom_op("cot_kernels::row_statistics_gradient", mutates_args=())
def row_statistics_gradient(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    state: Tensor,
    d_target_logit: Tensor,
    d_complement_lse: Tensor,
    d_negentropy: Tensor,
) -> Tensor:
    """The gradient of anything built on the statistics, from what reaches the three of them."""
    upstreams = (d_target_logit, d_complement_lse, d_negentropy)
    _check(logits, target, ignore_index, state=state, **dict(zip(_STATISTICS, upstreams, strict=True)))
    return autograd.backend_for(logits).row_statistics_gradient(logits, target, ignore_index, state, *upstreams)  # type: ignore[no-any-return]


# Shapes.


def _row(logits: Tensor, target: Tensor, *numbers: int) -> Tensor:
    return logits.new_empty((*numbers, *target.shape), dtype=accumulation_dtype(logits.dtype))


@row_loss.register_fake
def _(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _row(logits, target), _row(logits, target, autograd.backend_for(logits).LOSS_STATE)


@row_statistics.register_fake
def _(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = (_row(logits, target), _row(logits, target), _row(logits, target))
    return *values, _row(logits, target, autograd.backend_for(logits).STATISTICS_STATE)


@row_loss_gradient.register_fake
@row_statistics_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


# Derivatives. Those of the gradients are left to PyTorch: they are asked for rarely, and to any order. The rules are
# written as autograd Functions because torch.func takes no other; the operators borrow them.


class RowLossRule(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, ignore_index: int, objective: str, parameters: list[float]
    ) -> tuple[Tensor, Tensor]:
        return row_loss(logits, target, ignore_index, objective, parameters)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, *ctx.arguments = inputs
        ctx.save_for_backward(logits, target, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
        logits, target, state = ctx.saved_tensors
        gradient = _call(row_loss_gradient, RowLossGradientRule, logits, target, *ctx.arguments, state, upstream)
        return gradient, None, None, None, None


class RowLossGradientRule(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        objective: str,
        parameters: list[float],
        state: Tensor,
        upstream: Tensor,
    ) -> Tensor:
        return row_loss_gradient(logits, target, ignore_index, objective, parameters, state, upstream)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, target, *ctx.arguments, _, upstream = inputs
        ctx.save_for_backward(logits, target, upstream)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        logits, target, row_upstream = ctx.saved_tensors
        ignore_index, objective, parameters = ctx.arguments

        def gradient(logits: Tensor, row_upstream: Tensor) -> Tensor:
            return differentiable.loss_gradient(
                logits, target, ignore_index, objective_of(objective, parameters), row_upstream.unsqueeze(1)
            )

        d_logits, d_upstream = torch.func.vjp(gradient, logits, row_upstream)[1](upstream)
        return d_logits, None, None, None, None, None, d_upstream


class RowStatisticsRule(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return row_statistics(logits, target, ignore_index)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, ctx.ignore_index = inputs
        ctx.save_for_backward(logits, target, output[-1])
        ctx.mark_non_differentiable(output[-1])

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Any, ...]:
        logits, target, state = ctx.saved_tensors
        arguments = (logits, target, ctx.ignore_index, state, *upstreams[:3])
        return _call(row_statistics_gradient, RowStatisticsGradientRule, *arguments), None, None


class RowStatisticsGradientRule(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        state: Tensor,
        d_target_logit: Tensor,
        d_complement_lse: Tensor,
        d_negentropy: Tensor,
    ) -> Tensor:
        upstreams = (d_target_logit, d_complement_lse, d_negentropy)
        return row_statistics_gradient(logits, target, ignore_index, state, *upstreams)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, target, ctx.ignore_index, _, *upstreams = inputs
        ctx.save_for_backward(logits, target, *upstreams)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        logits, target, *row_upstreams = ctx.saved_tensors

        def gradient(logits: Tensor, *row_upstreams: Tensor) -> Tensor:
            columns = (each.unsqueeze(1) for each in row_upstreams)
            return differentiable.statistics_gradient(logits, target, ctx.ignore_index, *columns)

        d_logits, *d_upstreams = torch.func.vjp(gradient, logits, *row_upstreams)[1](upstream)
        return d_logits, None, None, None, *d_upstreams


def _call(operator: Any, rule: Any, *arguments: Any) -> Any:
    return (rule.apply if context.transformed() else operator)(*arguments)


for _operator, _rule in (
    (row_loss, RowLossRule),
    (row_loss_gradient, RowLossGradientRule),
    (row_statistics, RowStatisticsRule),
    (row_statistics_gradient, RowStatisticsGradientRule),
):
    _operator.register_autograd(_rule.backward, setup_context=_rule.setup_context)


# Batches: a batch of problems is one problem with more rows.


def _fold(tensor: Tensor, dim: int | None, size: int, rows_at: int = 0) -> Tensor:
    """The batch dimension, or one of that size, merged into the dimension of the rows."""
    if dim is None:
        sizes = list(tensor.shape)
        sizes.insert(rows_at, size)
        tensor = tensor.unsqueeze(rows_at).expand(sizes)
    else:
        tensor = tensor.movedim(dim, rows_at)
    return tensor.flatten(rows_at, rows_at + 1)


def _batch(info: Any, in_dims: Batched, target: Tensor) -> tuple[int, int]:
    """The problems, none for one, and the rows of each."""
    sizes = list(target.shape)
    if in_dims[1] is not None:
        del sizes[in_dims[1]]
    return info.batch_size, sizes[0]


@row_loss.register_vmap
def _(info: Any, in_dims: Batched, logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Any, Any]:
    batch = size, _ = _batch(info, in_dims, target)
    logits, target = _fold(logits, in_dims[0], size), _fold(target, in_dims[1], size)
    loss, state = row_loss(logits, target, *arguments)
    return (loss.unflatten(0, batch), state.unflatten(1, batch)), (0, 1)


@row_loss_gradient.register_vmap
def _(info: Any, in_dims: Batched, logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Any, Any]:
    batch = size, _ = _batch(info, in_dims, target)
    *arguments, state, upstream = arguments  # type: ignore[assignment]
    logits, target = _fold(logits, in_dims[0], size), _fold(target, in_dims[1], size)
    state, upstream = _fold(state, in_dims[5], size, 1), _fold(upstream, in_dims[6], size)
    return row_loss_gradient(logits, target, *arguments, state, upstream).unflatten(0, batch), 0


@row_statistics.register_vmap
def _(info: Any, in_dims: Batched, logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Any, Any]:
    batch = size, _ = _batch(info, in_dims, target)
    logits, target = _fold(logits, in_dims[0], size), _fold(target, in_dims[1], size)
    *values, state = row_statistics(logits, target, ignore_index)
    return (*(value.unflatten(0, batch) for value in values), state.unflatten(1, batch)), (0, 0, 0, 1)


@row_statistics_gradient.register_vmap
def _(info: Any, in_dims: Batched, logits: Tensor, target: Tensor, ignore_index: int, *rows: Tensor) -> tuple[Any, Any]:
    batch = size, _ = _batch(info, in_dims, target)
    logits, target = _fold(logits, in_dims[0], size), _fold(target, in_dims[1], size)
    state = _fold(rows[0], in_dims[3], size, 1)
    upstreams = [_fold(each, dim, size) for each, dim in zip(rows[1:], in_dims[4:], strict=True)]
    gradient = row_statistics_gradient(logits, target, ignore_index, state, *upstreams)
    return gradient.unflatten(0, batch), 0


# Autocast.

_library = torch.library.Library("cot_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]


def ignore_autocast(operator: Any) -> None:
    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(operator._opoverload, torch.library.fallthrough_kernel, key)  # type: ignore[no-untyped-call]


for _operator in (row_loss, row_loss_gradient, row_statistics, row_statistics_gradient):
    ignore_autocast(_operator)


# What functional calls.


def loss(logits: Tensor, target: Tensor, ignore_index: int, objective: Objective, reduction: str) -> Tensor:
    """What :class:`.autograd.RowLoss` computes, but with losses in the shape of the target where unreduced."""
    arguments = (logits, target, ignore_index, *describe(objective))
    return reduce(_call(row_loss, RowLossRule, *arguments)[0], target, ignore_index, reduction)


def statistics(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """What :class:`.autograd.RowStatistics` computes, in the shape of the target."""
    values: tuple[Tensor, ...] = _call(row_statistics, RowStatisticsRule, logits, target, ignore_index)
    return values[:3]


def reduce(
    loss: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    whole: Callable[[Tensor], Tensor] = lambda total: total,
) -> Tensor:
    """Sum or mean of row losses in the shape of the target; ``whole`` makes a sum over some ranks one over all."""
    if reduction == "none":
        return loss
    total = whole(loss.sum())
    return total if reduction == "sum" else total / whole((target != ignore_index).sum())
