"""Does a provider compute what it claims? Its loss and gradient beside the formula in float64.

The loss is compared over all rows; the gradient entry by entry in a few rows, spread over the problem, and in every
row by its length and its product with a vector of random signs, whose mean square is that of the row's entries. So a
single row that is not written shows, unless a provider rounds each operation, and no gradient in float64 need be held.
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
OF_A_ROW = 10  # times as much for the worst of all rows, beside a row of usual length

ROWS = 64
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 23}  # logits that are in float64 at a time


@dataclass(frozen=True)
class Truth:
    """The mean loss of all rows, and its gradient, in float64: ``picked`` rows of it whole, [rows, classes], and of
    all rows the product with ``signs`` and the length, [rows] each."""

    loss: float
    picked: Tensor
    gradient: Tensor
    signs: Tensor
    products: Tensor
    lengths: Tensor

    @property
    def length(self) -> float:
        """Of the gradient of a row, in the root mean square."""
        return float(self.lengths.square().mean().sqrt())


@dataclass(frozen=True)
class Errors:
    """Relative to the truth; None where they are not finite. ``row`` is of the worst row, relative to the length."""

    loss: float | None
    gradient: float | None
    row: float | None

    def within(self, tolerance: float) -> bool:
        bounds = ((self.loss, tolerance), (self.gradient, tolerance), (self.row, OF_A_ROW * tolerance))
        return all(error is not None and error <= bound for error, bound in bounds)


def as_rows(logits: Tensor) -> Tensor:
    """(N, K, ...) as (rows, K)."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def truth(formula: Loss, logits: Tensor, target: Tensor) -> Truth:
    rows, targets = as_rows(logits.detach()), target.reshape(-1)
    count, classes = rows.shape
    signs = torch.randint(2, (classes,), generator=torch.Generator().manual_seed(0)).to(rows.device).double() * 2 - 1
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    products, lengths = [], []
    for some, wanted in zip(_chunks(rows), _chunks(targets, classes), strict=True):
        leaf = some.double().requires_grad_()
        value = formula(leaf, wanted)
        (gradient,) = torch.autograd.grad(value / count, leaf)
        total += value.detach()
        products.append(gradient @ signs)
        lengths.append(gradient.norm(dim=1))
    picked = torch.linspace(0, count - 1, min(ROWS, count), device=logits.device).long()
    leaf = rows[picked].double().requires_grad_()
    (gradient,) = torch.autograd.grad(formula(leaf, targets[picked]) / count, leaf)
    return Truth(float(total) / count, picked, gradient, signs, torch.cat(products), torch.cat(lengths))


def _chunks(rows: Tensor, classes: int | None = None) -> tuple[Tensor, ...]:
    return torch.split(rows, max(1, _CHUNK[rows.device.type] // (classes or rows.shape[1])))


def errors(loss: Loss, logits: Tensor, target: Tensor, true: Truth) -> Errors:
    """Logits are not changed: the loss is given a copy."""
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, target)
    # What is freed here is likely to be given to the gradient: an entry that is not written shows.
    torch.full_like(leaf, math.nan)
    upstream = _upstream(value.dtype, true.gradient)
    (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream))
    found = as_rows(gradient)
    seen = [(some @ true.signs, some.norm(dim=1)) for some in (some.double() for some in _chunks(found))]
    products, lengths = (torch.cat(each) / upstream for each in zip(*seen, strict=True))
    beside = products - true.products
    whole = float(beside.norm() / true.lengths.norm())
    row = float(torch.maximum(beside.abs(), (lengths - true.lengths).abs()).max()) / true.length
    picked = float((found[true.picked].double() / upstream - true.gradient).norm() / true.gradient.norm())
    loss_error = abs(float(value.detach()) - true.loss) / abs(true.loss)
    # Of NaN and a number Python's max may be either.
    of_gradient = max(whole, picked) if math.isfinite(whole + picked) else math.nan
    return Errors(_finite(loss_error), _finite(of_gradient), _finite(row))


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
