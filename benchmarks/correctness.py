"""Does a provider compute what it claims? Its loss and gradient beside the formula in float64.

The loss is compared over all rows, the gradient over a few rows, spread over the problem: enough to catch a wrong
kernel, and cheap beside the timing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.providers import Loss

# Relative L2 error of the gradient, and relative error of the loss. Ten times as much for a provider that rounds each
# operation: at the logits drawn here, the published operations in bf16 are off by some percent.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROUNDING_OPERATIONS = 10

ROWS = 64
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 23}  # logits that are in float64 at a time


@dataclass(frozen=True)
class Truth:
    """The mean loss of all rows, and the gradient of ``picked`` rows, [rows, classes], in float64."""

    loss: float
    picked: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Errors:
    """Relative to the truth; None where they are not finite."""

    loss: float | None
    gradient: float | None

    def within(self, tolerance: float) -> bool:
        return all(error is not None and error <= tolerance for error in (self.loss, self.gradient))


def as_rows(logits: Tensor) -> Tensor:
    """(N, K, ...) as (rows, K)."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def truth(formula: Loss, logits: Tensor, target: Tensor) -> Truth:
    rows, targets = as_rows(logits.detach()), target.reshape(-1)
    count, classes = rows.shape
    chunk = max(1, _CHUNK[logits.device.type] // classes)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for some, wanted in zip(torch.split(rows, chunk), torch.split(targets, chunk), strict=True):
        total += formula(some.double(), wanted)
    picked = torch.linspace(0, count - 1, min(ROWS, count), device=logits.device).long()
    leaf = rows[picked].double().requires_grad_()
    (gradient,) = torch.autograd.grad(formula(leaf, targets[picked]) / count, leaf)
    return Truth(float(total) / count, picked, gradient)


def errors(loss: Loss, logits: Tensor, target: Tensor, true: Truth) -> Errors:
    """Logits are not changed: the loss is given a copy."""
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, target)
    # What is freed here is likely to be given to the gradient: an entry that is not written shows.
    torch.full_like(leaf, math.nan)
    upstream = _upstream(value.dtype, true.gradient)
    (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream))
    found = as_rows(gradient)[true.picked].double() / upstream
    gradient_error = float((found - true.gradient).norm() / true.gradient.norm())
    loss_error = abs(float(value.detach()) - true.loss) / abs(true.loss)
    return Errors(_finite(loss_error), _finite(gradient_error))


def _upstream(dtype: torch.dtype, gradient: Tensor) -> float:
    """A power of two that brings the largest entry of the gradient near 1000, or as near as ``dtype`` can say.

    The mean over 8192 rows of a loss divided by 128256 classes has a gradient that float16 cannot hold; trainers scale
    it, and so does the check.
    """
    wanted = 2.0 ** math.floor(math.log2(1024 / float(gradient.abs().max())))
    return min(wanted, 2.0 ** math.floor(math.log2(torch.finfo(dtype).max)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tolerance(dtype: torch.dtype, rounds_operations: bool) -> float:
    return TOLERANCES[dtype] * (ROUNDING_OPERATIONS if rounds_operations else 1)
