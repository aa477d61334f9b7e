"""Losses of a linear projection, without its logits: for vocabularies whose logits would not fit.

Shapes, dtypes and errors, common to all of them:

- ``input``: (H), (N, H) or (N, d1, ..., H), the hidden states, float64, float32, float16 or bfloat16, any strides.
- ``linear_weight``: (K, H), as that of :class:`torch.nn.Linear`, and ``linear_bias``: (K). Of one dtype with the input,
  except under autocast, where all three are cast as :func:`torch.nn.functional.linear` casts them.
- ``target``: class indices in [0, K), any integer dtype, of the shape of the input without its last dimension. Rows
  whose target is ``ignore_index`` have loss 0 and gradient 0 and are not counted by the mean.
- ``reduction``: ``"mean"`` over the rows that are not ignored, ``"sum"``, or ``"none"`` (shape of ``target``). With
  ``"none"`` the logits are computed a second time in the backward pass.
- ``memory_budget``: bytes for the logits of a chunk of rows, the only ones alive at any time. None stands for 128 MiB
  on a CPU and 512 MiB elsewhere; ``docs/linear.md`` says why, and what a larger one buys.
- ``return_parts``: return a :class:`LinearLoss`, the cross-entropy and the complement entropy beside the loss, instead
  of the loss alone.
- The loss is float32 (float64 for float64 input). Gradients are summed over the chunks in float32 and have the dtypes
  of their tensors. They are formed in the forward pass; with ``torch.no_grad()`` none are.
- TypeError or ValueError for anything else, before any arithmetic; a target out of range as in
  :mod:`cot_kernels.functional`.

Forward mode, :mod:`torch.func`, and tensors other than plain ones (DTensor, fake, meta) are served by the unfused
operations: right, and without the saving of memory.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import linear

from cot_kernels import context, dispatch, operators, projection
from cot_kernels.checks import (
    OF_SUM,
    check_eps,
    check_finite,
    check_projection,
    scale_of,
    signed,
    warn_of_two_classes,
)
from cot_kernels.objectives import ComplementEntropyObjective, CrossEntropyObjective, Objective, cross_entropy_of

CPU_BUDGET = 128 << 20
GPU_BUDGET = 512 << 20
UNLIMITED = 2**62  # an operator takes integers of 64 bits


class LinearLoss(NamedTuple):
    """A loss and what it is made of, under one reduction."""

    loss: Tensor
    cross_entropy: Tensor
    """``-ln p_g`` in nats, detached."""
    complement_entropy: Tensor
    """``H = -sum_{j != g} q_j ln q_j`` in nats, between 0 and ln(K - 1), detached."""


@overload
def linear_complement_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    gamma: float = -1.0,
    normalization: str = "complement",
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    return_parts: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_complement_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    gamma: float = -1.0,
    normalization: str = "complement",
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    return_parts: Literal[True],
) -> LinearLoss: ...
@overload
def linear_complement_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    gamma: float = -1.0,
    normalization: str = "complement",
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    return_parts: bool,
) -> Tensor | LinearLoss: ...
def linear_complement_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    gamma: float = -1.0,
    normalization: str = "complement",
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    return_parts: bool = False,
) -> Tensor | LinearLoss:
    r""":func:`.complement_cross_entropy` of ``linear(input, linear_weight, linear_bias)``, without these logits.

    .. math:: \ell = -\ln p_g + \frac{\gamma}{K - 1} H, \qquad p = \mathrm{softmax}(W x + b)

    With ``gamma=0`` it is the fused linear cross-entropy.

    Args:
        input: hidden states, (H), (N, H) or (N, d1, ..., H).
        linear_weight: (K, H).
        target: class indices, (), (N) or (N, d1, ...).
        linear_bias: (K).
        gamma, normalization: as in :func:`.complement_cross_entropy`.
        ignore_index, reduction, memory_budget, return_parts: see the head of this module.

    Raises:
        TypeError, ValueError: see the head of this module.

    Source: the loss, Kim et al., 2021 (arXiv 2009.02189).

    Example:
        >>> hidden, vocabulary = torch.randn(6, 32), torch.nn.Linear(32, 1000, bias=False)
        >>> loss = linear_complement_cross_entropy(hidden, vocabulary.weight, torch.arange(6))
        >>> loss.backward()
        >>> vocabulary.weight.grad.shape
        torch.Size([1000, 32])
    """
    check_projection(input, linear_weight, linear_bias, target, ignore_index, reduction, memory_budget)
    check_finite("gamma", gamma)
    objective = CrossEntropyObjective(1.0, -float(gamma) * scale_of(normalization, len(linear_weight)))
    if gamma != 0:
        warn_of_two_classes("linear_complement_cross_entropy", len(linear_weight), OF_SUM)
    return _loss(
        input, linear_weight, linear_bias, target, ignore_index, objective, reduction, memory_budget, return_parts
    )


@overload
def linear_complement_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    eps: float = 1e-7,
    normalization: str = "classes",
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    return_parts: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_complement_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    eps: float = 1e-7,
    normalization: str = "classes",
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    return_parts: Literal[True],
) -> LinearLoss: ...
@overload
def linear_complement_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    eps: float = 1e-7,
    normalization: str = "classes",
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    return_parts: bool,
) -> Tensor | LinearLoss: ...
def linear_complement_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    eps: float = 1e-7,
    normalization: str = "classes",
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    return_parts: bool = False,
) -> Tensor | LinearLoss:
    r""":func:`.complement_entropy` of ``linear(input, linear_weight, linear_bias)``, without these logits.

    It is **never positive**: see there.

    Args:
        input: hidden states, (H), (N, H) or (N, d1, ..., H).
        linear_weight: (K, H).
        target: class indices, (), (N) or (N, d1, ...).
        linear_bias: (K).
        eps, normalization: as in :func:`.complement_entropy`.
        ignore_index, reduction, memory_budget, return_parts: see the head of this module.

    Raises:
        TypeError, ValueError: see the head of this module.

    Source: the loss, Chen et al., ICLR 2019 (arXiv 1903.01182).
    """
    check_projection(input, linear_weight, linear_bias, target, ignore_index, reduction, memory_budget)
    check_eps(eps)
    warn_of_two_classes("linear_complement_entropy", len(linear_weight))
    objective = ComplementEntropyObjective(scale_of(normalization, len(linear_weight)), float(eps))
    return _loss(
        input, linear_weight, linear_bias, target, ignore_index, objective, reduction, memory_budget, return_parts
    )


def _loss(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    objective: Objective,
    reduction: str,
    memory_budget: int | None,
    return_parts: bool,
) -> Tensor | LinearLoss:
    target = signed(target, ignore_index)
    if not all(_plain(each) for each in (input, weight, bias, target) if each is not None):
        return _unfused(input, weight, bias, target, ignore_index, objective, reduction, return_parts)
    budget = memory_budget or (CPU_BUDGET if input.device.type == "cpu" else GPU_BUDGET)
    budget = min(budget, UNLIMITED)
    unit = objective.scaled(1 / objective.scale)
    plan = projection.Plan(ignore_index, unit, budget, _compute_dtype(input))
    seen = torch.compiler.is_compiling() or context.traced()
    run = projection.by_operator if seen else projection.ChunkedLinearLoss.apply
    rows, parts = run(  # type: ignore[no-untyped-call]
        input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0),
        weight,
        bias,
        target.reshape(-1),
        plan,
        reduction != "none" and torch.is_grad_enabled(),  # a Function cannot see it: in its forward pass it is off
    )
    loss = _reduce(rows, target, ignore_index, reduction, objective.scale)
    if not return_parts:
        return loss
    cross_entropy, negentropy = (_reduce(part, target, ignore_index, reduction, 1.0) for part in parts.unbind())
    return LinearLoss(loss, cross_entropy, -negentropy)


def _unfused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    objective: Objective,
    reduction: str,
    return_parts: bool,
) -> Tensor | LinearLoss:
    logits = linear(input, weight, bias)
    logits = logits.movedim(-1, 1) if logits.dim() > 1 else logits
    loss = dispatch.row_loss(logits, target, ignore_index, objective, reduction)
    if not return_parts:
        return loss
    target_logit, complement_lse, negentropy = dispatch.statistics(logits.detach(), target, ignore_index)
    cross_entropy = cross_entropy_of(complement_lse - target_logit).masked_fill(target == ignore_index, 0)
    parts = (operators.reduce(each, target, ignore_index, reduction) for each in (cross_entropy, -negentropy))
    return LinearLoss(loss, *parts)


def _reduce(rows: Tensor, target: Tensor, ignore_index: int, reduction: str, scale: float) -> Tensor:
    if reduction == "none":
        return (rows * scale).reshape(target.shape)
    total = rows.sum()
    if reduction == "sum":
        return total * scale
    count = (target != ignore_index).sum()
    # The mean of no rows is NaN, and its gradient 0, not 0 / 0.
    return (total * scale / count.clamp(min=1)).masked_fill(count == 0, torch.nan)


def _plain(tensor: Tensor) -> bool:
    if context.needs_plain_operations() or context.transformed() or tensor.is_meta:
        return False
    return torch.compiler.is_compiling() or context.plain(tensor)


def _compute_dtype(input: Tensor) -> torch.dtype:
    cast = context.in_autocast(input) and input.dtype != torch.float64
    return torch.get_autocast_dtype(input.device.type) if cast else input.dtype
