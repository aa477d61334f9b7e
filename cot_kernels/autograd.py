"""The family as two autograd Functions, the way of eager mode: :func:`row_loss`, reduced or not, and the differentiable
:func:`row_statistics`. To be called outside of torch.func's transforms.

Both save the logits, which are never modified, and O(N) numbers a backward pass needs besides them, so a backward pass
may run any number of times and with any upstream gradient. The arithmetic is the backend's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cot_kernels import context, differentiable
from cot_kernels.backends import aten
from cot_kernels.backends.native import backend as native
from cot_kernels.objectives import Objective


@functools.cache
def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. Triton asks once too, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend_for(logits: Tensor) -> ModuleType:
    """Triton for tensors on a GPU, and for any tensor under Triton's interpreter; C++ on a CPU; ATen for the rest."""
    if logits.is_cuda or _interpreted():
        from cot_kernels.backends.triton import backend  # imports Triton: only where it is needed

        return backend
    return native if native.serves(logits) else aten


class RowLoss(torch.autograd.Function):
    """``reduce_n l(b_n, S_n)`` for an objective ``l``; see :mod:`cot_kernels.objectives`.

    Unreduced losses come in the backend's own shape: a view of them made in here could not be changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, objective: Objective, reduction: str
    ) -> Tensor:
        ctx.backend = backend_for(logits)
        loss, saved = ctx.backend.loss(logits, target, ignore_index, objective, reduction)
        ctx.save_for_backward(logits, target, *saved)
        ctx.arguments = ignore_index, objective, reduction
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, target, *saved = ctx.saved_tensors
        if not torch.is_grad_enabled() and context.readable(upstream):
            return ctx.backend.gradient(logits, tuple(saved), upstream), None, None, None, None
        # create_graph=True: the gradient is to be differentiated itself. Or an upstream that no kernel can read.
        ignore_index, objective, reduction = ctx.arguments
        if reduction == "none":
            upstream = upstream.reshape(target.shape).unsqueeze(1)
        elif reduction == "mean":
            upstream = upstream / (target != ignore_index).sum()
        gradient = differentiable.loss_gradient(logits, target, ignore_index, objective, upstream)
        return gradient, None, None, None, None


class RowStatistics(torch.autograd.Function):
    """``(z_g, L, S)`` for each row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.backend = backend_for(logits)
        target_logit, complement_lse, negentropy, saved = ctx.backend.statistics(logits, target, ignore_index)
        ctx.save_for_backward(logits, target, *saved)
        ctx.ignore_index = ignore_index
        return target_logit, complement_lse, negentropy

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor, None, None]:
        logits, target, *saved = ctx.saved_tensors
        if not torch.is_grad_enabled() and all(context.readable(each) for each in upstreams):
            return ctx.backend.statistics_gradient(logits, tuple(saved), *upstreams), None, None
        columns = (each.reshape(target.shape).unsqueeze(1) for each in upstreams)
        return differentiable.statistics_gradient(logits, target, ctx.ignore_index, *columns), None, None


def _function(kind: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What ``kind.apply`` comes to outside of torch.func's transforms, without the Python with which it finds out where
    it is: five microseconds of a call among others' work, a tenth of a small loss."""
    apply = super(torch.autograd.Function, kind).apply  # type: ignore[misc]
    unwrap = torch._C._functorch.unwrap_if_dead  # a tensor may have come out of a transform that has ended

    def call(logits: Tensor, target: Tensor, *arguments: Any) -> Any:
        return apply(unwrap(logits), unwrap(target), *arguments)

    return call


row_loss = _function(RowLoss)
row_statistics = _function(RowStatistics)
