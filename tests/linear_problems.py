"""The linear losses, fused and not, and problems to compare them on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import cot_kernels

FAMILY: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], dict[str, Any]]] = {
    "cross-entropy": (cot_kernels.linear_complement_cross_entropy, cot_kernels.complement_cross_entropy, {"gamma": 0}),
    "complement cross-entropy": (
        cot_kernels.linear_complement_cross_entropy,
        cot_kernels.complement_cross_entropy,
        {"gamma": -2.0, "normalization": "none"},
    ),
    "complement entropy": (cot_kernels.linear_complement_entropy, cot_kernels.complement_entropy, {}),
    "exact complement entropy": (
        cot_kernels.linear_complement_entropy,
        cot_kernels.complement_entropy,
        {"eps": 0.0, "normalization": "entropy"},
    ),
}
each_loss = pytest.mark.parametrize("name", FAMILY)


def fused(name: str, **options: Any) -> Callable[..., Any]:
    function, _, arguments = FAMILY[name]
    return partial(function, **arguments, **options)


def unfused(name: str, **options: Any) -> Callable[..., Tensor]:
    _, function, arguments = FAMILY[name]

    def loss(input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor | None = None) -> Tensor:
        logits = linear(input, weight, linear_bias)
        return function(logits.movedim(-1, 1) if logits.dim() > 2 else logits, target, **arguments, **options)

    return loss


def problem(
    rows: int = 13, features: int = 8, classes: int = 37, dtype: torch.dtype = torch.float64, device: Any = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets, of which every third is ignored."""
    generator = torch.Generator().manual_seed(0)
    input, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in ((rows, features), (classes, features), (classes,))
    )
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    target[1::3] = -100
    return input, weight, bias, target


def gradients(loss: Callable[..., Tensor], *tensors: Tensor, target: Tensor, upstream: Tensor | None = None) -> Any:
    """The value, and the gradients of input, weight and, where given, bias."""
    leaves = [each.detach().requires_grad_() for each in tensors]
    value = loss(*leaves[:2], target, linear_bias=leaves[2] if len(leaves) > 2 else None)
    return value.detach(), torch.autograd.grad(value, leaves, upstream)
