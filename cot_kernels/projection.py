"""Projection and loss, a chunk of rows at a time: the logits of one chunk are all that ever exists of them.

    forward, for each chunk of rows x [R, H]:

        z = x W^T + b                                      one product; z [R, K] is a private buffer
        z <- dl/dz                                         the loss of the rows, and its gradient in place of the logits
        dx = z W      dW += z^T x      db += sum_n z       two products; dW and db in float32

    backward: the gradients of the sum times the upstream number.

That takes three products, as many as a projection and a loss apart, and the logits' memory is a budget instead of N K.
It needs the upstream gradient of every row to be the same number, which a sum or a mean grants. Where it is not, and
where a backward pass runs a second time, the gradients are computed from the inputs then, which costs one product more.

The gradient with respect to the logits is formed for a loss of unit scale and scaled at the very end, in float32: a
mean over 8192 rows in float16 would otherwise lose what no scaling of the loss could bring back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from cot_kernels import autograd, context, differentiable, operators
from cot_kernels.backends import accumulation_dtype
from cot_kernels.objectives import Objective

CONVERTED = 4 << 20  # bytes of a block of either factor, where a product needs them in float32


class Plan(NamedTuple):
    """What is to be computed of the rows, and within which memory."""

    ignore_index: int
    objective: Objective
    memory_budget: int
    dtype: torch.dtype
    """What the products are computed in: that of autocast, or of the input."""


def chunk_rows(num_rows: int, num_classes: int, itemsize: int, memory_budget: int) -> int:
    """Rows of a chunk: as many as fit, all chunks of one size as near as can be."""
    fitting = max(1, memory_budget // (num_classes * itemsize))
    chunks = max(1, -(-num_rows // fitting))
    return max(1, -(-num_rows // chunks))


def _buffer(rows: int, num_classes: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, K] whose rows begin on 16-byte boundaries, which matrix products and kernels need at odd K."""
    per_access = 16 // dtype.itemsize
    stride = -(-num_classes // per_access) * per_access
    return like.new_empty((rows, stride), dtype=dtype)[:, :num_classes]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, in the precision of the total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # type: ignore[call-overload]
    else:
        # CPUs have no product of mixed precision, and the product of a chunk must not be rounded to bfloat16, or
        # overflow float16, before it is added: blocks of both factors are converted.
        rows = max(1, CONVERTED // max(1, right.shape[1] * total.itemsize))
        for block, factor in zip(torch.split(left, rows, dim=1), torch.split(right, rows), strict=True):
            converted = factor.to(total.dtype)
            columns = max(1, CONVERTED // (len(factor) * total.itemsize))
            for part, sums in zip(torch.split(block, columns), torch.split(total, columns), strict=True):
                sums.addmm_(part.to(total.dtype), converted)


def compute(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    plan: Plan,
    upstream: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, cross-entropy and negentropy of rows, (3, N), and the wanted ones of the gradients dx, dW, db.

    Args:
        input: (N, H).
        weight: (K, H).
        bias: (K) or None.
        target: (N).
        upstream: (N), the derivative of a scalar by each row's loss; None where it is 1.
        wanted: whether dx, dW and db are.
    """
    num_rows, num_classes = len(input), len(weight)
    accumulation = accumulation_dtype(plan.dtype)
    kept = None
    if input.device.type == "cpu":  # elsewhere, counting the rows to leave out would wait for the device
        counted = target != plan.ignore_index
        kept = None if bool(counted.all()) else counted.nonzero().squeeze(1)
        num_rows = num_rows if kept is None else len(kept)
    values = input.new_zeros((3, len(input)), dtype=accumulation)
    d_input = torch.zeros_like(input, memory_format=torch.contiguous_format) if wanted[0] else None
    d_weight = weight.new_zeros(weight.shape, dtype=accumulation) if wanted[1] else None
    d_bias = weight.new_zeros(num_classes, dtype=accumulation) if wanted[2] else None
    size = chunk_rows(num_rows, num_classes, plan.dtype.itemsize, plan.memory_budget)
    backend = autograd.backend_for(input)
    with torch.autocast(input.device.type, enabled=False):
        weight, bias = weight.to(plan.dtype), None if bias is None else bias.to(plan.dtype)
        buffer = _buffer(min(size, num_rows), num_classes, input, plan.dtype)
        for start in range(0, num_rows, size):
            stop = min(start + size, num_rows)
            rows = slice(start, stop) if kept is None else kept[start:stop]
            x, logits = input[rows].to(plan.dtype), buffer[: stop - start]
            if bias is None:
                torch.mm(x, weight.t(), out=logits)
            else:
                torch.addmm(bias, x, weight.t(), out=logits)
            values[:, rows] = backend.value_and_gradient(
                logits,
                target[rows],
                plan.ignore_index,
                plan.objective,
                None if upstream is None else upstream[rows],
                any(wanted),
            )
            if d_input is not None:
                d_input[rows] = (logits @ weight).to(d_input.dtype)
            if d_weight is not None:
                _add_product(d_weight, logits.t(), x)
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=accumulation)
    return values, d_input, d_weight, d_bias


def _differentiable(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, plan: Plan, upstream: Tensor
) -> list[Tensor | None]:
    """The gradients in differentiable operations, all logits at once."""
    x, projection = input.to(plan.dtype), weight.to(plan.dtype)
    logits = functional.linear(x, projection, None if bias is None else bias.to(plan.dtype))
    grad = differentiable.loss_gradient(logits, target, plan.ignore_index, plan.objective, upstream.unsqueeze(1))
    return [grad @ projection, grad.t() @ x, None if bias is None else grad.sum(0)]


class ChunkedLinearLoss(torch.autograd.Function):
    """Losses of rows, and their cross-entropy and negentropy, which pass no gradient on.

    Gradients are formed in the forward pass where ``uniform`` promises that all rows will get one upstream number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        plan: Plan,
        uniform: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [uniform and needed for needed in ctx.needs_input_grad[:3]]
        values, *ctx.gradients = compute(input, weight, bias, target, plan, None, wanted)
        ctx.save_for_backward(input, weight, bias, target)
        ctx.plan, ctx.uniform = plan, uniform
        ctx.dtypes = [None if each is None else each.dtype for each in (input, weight, bias)]
        loss, parts = values[0], values[1:]
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
        input, weight, bias, target = ctx.saved_tensors
        if torch.is_grad_enabled() or not context.readable(upstream):
            # create_graph=True: the gradients are to be differentiated themselves. Or no kernel can read the upstream.
            gradients = _differentiable(input, weight, bias, target, ctx.plan, upstream)
        elif ctx.uniform:
            # Scaled in place and given away: a second backward pass finds none, and forms them again.
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                _, *gradients = compute(input, weight, bias, target, ctx.plan, None, ctx.needs_input_grad[:3])
            factor = upstream[:1].sum()
            gradients = [None if each is None else each.mul_(factor) for each in gradients]
        else:
            _, *gradients = compute(input, weight, bias, target, ctx.plan, upstream, ctx.needs_input_grad[:3])
        as_got = (None if each is None else each.to(dtype) for each, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *as_got, None, None, None


# The same as a registered operator, for torch.compile.


@custom_op("cot_kernels::linear_loss", mutates_args=())
def linear_loss(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor | None,
    ignore_index: int,
    objective: str,
    parameters: list[float],
    memory_budget: int,
    dtype: torch.dtype,
    wanted: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`compute`; gradients that are not wanted are empty. A trace can hold a list of int, not one of bool."""
    plan = Plan(ignore_index, operators.objective_of(objective, parameters), memory_budget, dtype)
    values, *gradients = compute(input, weight, bias, target, plan, upstream, [bool(each) for each in wanted])
    d_input, d_weight, d_bias = (values.new_empty(0) if each is None else each for each in gradients)
    return values, d_input, d_weight, d_bias


@linear_loss.register_fake
def _(input: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, dtype, wanted = arguments
    accumulation = accumulation_dtype(dtype)
    none = input.new_empty(0, dtype=accumulation)
    return (
        input.new_empty((3, input.shape[0]), dtype=accumulation),
        input.new_empty(input.shape) if wanted[0] else none,
        weight.new_empty(weight.shape, dtype=accumulation) if wanted[1] else none.clone(),
        weight.new_empty(weight.shape[0], dtype=accumulation) if wanted[2] else none.clone(),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, bias, target, _, *ctx.arguments, ctx.wanted = inputs
    ctx.save_for_backward(input, weight, bias, target, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Any, ...]:
    input, weight, bias, target, *gradients = ctx.saved_tensors
    needed = [int(each) for each in ctx.needs_input_grad[:3]]
    if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
        ignore_index, objective, parameters, budget, dtype = ctx.arguments
        plan = Plan(ignore_index, operators.objective_of(objective, parameters), budget, dtype)
        gradients = _differentiable(input, weight, bias, target, plan, upstream[0])  # type: ignore[assignment]
    elif any(ctx.wanted):
        factor = upstream[0, :1].sum()
        gradients = [each * factor for each in gradients]
    else:
        _, *gradients = linear_loss(input, weight, bias, target, upstream[0], *ctx.arguments, needed)
    as_got = (
        gradient.to(each.dtype) if wanted and gradient is not None else None
        for wanted, gradient, each in zip(needed, gradients, (input, weight, bias), strict=True)
    )
    return *as_got, *(None,) * 8


linear_loss.register_autograd(_backward, setup_context=_setup_context)
operators.ignore_autocast(linear_loss)


@linear_loss.register_vmap
def _(info: Any, in_dims: operators.Batched, *arguments: Any) -> tuple[Any, Any]:
    problems = (
        linear_loss(*(v if dim is None else v.select(dim, place) for v, dim in zip(arguments, in_dims, strict=True)))
        for place in range(info.batch_size)
    )
    return tuple(torch.stack(outputs) for outputs in zip(*problems, strict=True)), (0,) * 4


def by_operator(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, plan: Plan, uniform: bool
) -> tuple[Tensor, Tensor]:
    """What :class:`ChunkedLinearLoss` returns."""
    name, parameters = operators.describe(plan.objective)
    # A trace is for tensors that ask for gradients and for those that do not: it forms them in the backward pass.
    uniform = uniform and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    wanted = [int(uniform and each is not None and each.requires_grad) for each in (input, weight, bias)]
    values = linear_loss(
        input,
        weight,
        bias,
        target,
        None,
        plan.ignore_index,
        name,
        parameters,
        plan.memory_budget,
        plan.dtype,
        wanted,
    )[0]
    return values[0], values[1:].detach()
