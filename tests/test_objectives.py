"""The row formulas: partials against autograd of the formula as written, and the device twins against both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from twin_kernel import arithmetic, twin_kernel

from cot_kernels.backends.triton.objectives import device_twin
from cot_kernels.objectives import (
    ComplementEntropyObjective,
    CrossEntropyObjective,
    GuidedComplementEntropyObjective,
    Objective,
)

HAS_GPU = torch.cuda.is_available()


def fading(log_odds: Tensor, negentropy: Tensor, eps: float) -> Tensor:
    u = torch.sigmoid(log_odds) / (torch.sigmoid(log_odds) + eps)
    return u * (negentropy + torch.log(u))


FORMULAS: list[tuple[Objective, Callable[[Tensor, Tensor], Tensor]]] = [
    (ComplementEntropyObjective(0.1, 1e-7), lambda b, s: 0.1 * fading(b, s, 1e-7)),
    (ComplementEntropyObjective(0.1, 1e-2), lambda b, s: 0.1 * fading(b, s, 1e-2)),
    (ComplementEntropyObjective(0.5, 0.0), lambda b, s: 0.5 * s),
    (
        GuidedComplementEntropyObjective(0.3, 1e-7, 1 / 3),
        lambda b, s: 0.3 * (torch.sigmoid(-b) + 1e-7) ** (1 / 3) * fading(b, s, 1e-7),
    ),
    (
        GuidedComplementEntropyObjective(0.3, 1e-3, 2.0),
        lambda b, s: 0.3 * (torch.sigmoid(-b) + 1e-3) ** 2 * fading(b, s, 1e-3),
    ),
    (GuidedComplementEntropyObjective(0.3, 0.0, 0.0), lambda b, s: 0.3 * s),
    (GuidedComplementEntropyObjective(0.3, 0.0, 0.5), lambda b, s: 0.3 * torch.sigmoid(-b) ** 0.5 * s),
    (CrossEntropyObjective(1.0, 0.0), lambda b, s: torch.nn.functional.softplus(b, threshold=700)),
    (CrossEntropyObjective(0.25, 1.5), lambda b, s: 0.25 * (torch.nn.functional.softplus(b, threshold=700) + 1.5 * s)),
]
IDS = [repr(objective) for objective, _ in FORMULAS]


def rows() -> tuple[Tensor, Tensor]:
    log_odds = torch.linspace(-16, 30, 93, dtype=torch.float64)
    return log_odds, -torch.rand(93, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4 - 0.1


@pytest.mark.parametrize(("objective", "formula"), FORMULAS, ids=IDS)
def test_partials_are_those_of_the_formula(objective: Objective, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    log_odds, negentropy = (value.requires_grad_() for value in rows())
    true = formula(log_odds, negentropy)
    gradients = torch.autograd.grad(true.sum(), (log_odds, negentropy), materialize_grads=True)
    values = objective.rows(log_odds.detach(), negentropy.detach())
    torch.testing.assert_close(values.loss, true.detach(), rtol=1e-12, atol=1e-14)
    # Autograd's own subtraction of nearly equal numbers is what the hand-written partial avoids: hence 1e-7.
    torch.testing.assert_close(values.d_log_odds, gradients[0], rtol=1e-7, atol=1e-15)
    torch.testing.assert_close(values.d_negentropy, gradients[1], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("objective", "formula"), FORMULAS, ids=IDS)
def test_scaled(objective: Objective, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    for plain, scaled in zip(objective.rows(*rows()), objective.scaled(3.0).rows(*rows()), strict=True):
        torch.testing.assert_close(scaled, plain * 3)


@pytest.mark.parametrize("objective", [objective for objective, _ in FORMULAS], ids=IDS)
def test_float32_is_off_by_a_few_roundings(objective: Objective) -> None:
    log_odds, negentropy = (value.float() for value in rows())
    true = objective.rows(log_odds.double(), negentropy.double())
    for got, expected in zip(objective.rows(log_odds, negentropy), true, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=3e-6, atol=3e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [1e-30, 1e-7, 1.0, 1e30])
def test_any_eps_at_any_confidence(eps: float, dtype: torch.dtype) -> None:
    log_odds = torch.tensor([-math.inf, -1e30, -710.0, -90.0, -20.0, 0.0, 20.0, 1e30, math.inf], dtype=dtype)
    negentropy = torch.full_like(log_odds, -2)
    miss = torch.sigmoid(log_odds.double())
    u = torch.where(miss > 0, miss / (miss + eps), 0)
    values = [each.double() for each in ComplementEntropyObjective(1.0, eps).rows(log_odds, negentropy)]
    torch.testing.assert_close(values[0], torch.special.xlogy(u, u) - 2 * u, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values[2], u, rtol=1e-5, atol=1e-6)
    assert values[1].isfinite().all()


@pytest.mark.parametrize("objective", [objective for objective, _ in FORMULAS], ids=IDS)
@pytest.mark.parametrize("extreme", [-1e30, -math.inf, -104.0, 104.0, 1e30, math.inf])
def test_extremes_are_finite_or_the_limit(objective: Objective, extreme: float) -> None:
    values = objective.rows(torch.tensor([extreme]), torch.tensor([-1.0]))
    assert not any(value.isnan().any() for value in values)
    assert math.isfinite(values.d_log_odds.item()) and math.isfinite(values.d_negentropy.item())


def evaluated(rows: Tensor, twin: Any, parameters: tuple[float, float, float]) -> Tensor:
    """What a device function makes of two numbers a row, three a row."""
    out = torch.full((3, rows.shape[1]), torch.nan, dtype=rows.dtype, device=rows.device)
    twin_kernel[(1,)](rows, out, *parameters, rows.shape[1], TWIN=twin, BLOCK=128)
    return out.cpu().double()


@pytest.mark.gpu
@pytest.mark.parametrize("objective", [objective for objective, _ in FORMULAS], ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_device_twins(objective: Objective, dtype: torch.dtype) -> None:
    device = "cuda" if HAS_GPU else "cpu"
    log_odds, negentropy = rows()
    ends = torch.tensor([-1e30, -104.0, 104.0, 1e30], dtype=torch.float64)
    log_odds, negentropy = torch.cat((log_odds, ends)), torch.cat((negentropy, -torch.ones(4, dtype=torch.float64)))
    values = evaluated(torch.stack((log_odds, negentropy)).to(dtype).to(device), *device_twin(objective))
    true = objective.rows(log_odds.to(dtype).double(), negentropy.to(dtype).double())
    tolerance = {"rtol": 1e-10, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-7}
    for got, expected in zip(values, true, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [0.0, 1e-20, 1e-7, 1.0, 1e30])
def test_device_twins_at_any_eps_and_confidence(eps: float, dtype: torch.dtype) -> None:
    log_odds = torch.tensor([-math.inf, -1e30, -710.0, -90.0, -20.0, 0.0, 20.0, 1e30, math.inf, math.nan], dtype=dtype)
    objective = ComplementEntropyObjective(1.0, eps)
    stacked = torch.stack((log_odds, torch.full_like(log_odds, -2))).to("cuda" if HAS_GPU else "cpu")
    loss, d_log_odds, d_negentropy = evaluated(stacked, *device_twin(objective))
    true = objective.rows(log_odds.double(), torch.full((10,), -2.0, dtype=torch.float64))
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(loss, true.loss, **tolerance)
    torch.testing.assert_close(d_negentropy[:9], true.d_negentropy[:9], **tolerance)
    assert d_log_odds[:9].isfinite().all() and d_log_odds[9].isnan()


@pytest.mark.gpu
def test_device_arithmetic() -> None:
    """Of the numbers that it is for, and of what is none."""
    whole = 2 ** torch.arange(31, dtype=torch.float64)
    near = torch.cat([1 + whole[:20] * 2**-23, math.sqrt(2) * (1 + torch.arange(-3, 4) * 2**-23), whole, 3 * whole])
    x = torch.cat([near, torch.tensor([math.nan, math.inf])]).float()
    y = torch.cat([torch.linspace(0.01, 1e30, len(x) - 1), torch.tensor([math.nan])])
    device = "cuda" if HAS_GPU else "cpu"
    logarithm, quotient, inverse = evaluated(torch.stack((x, y)).to(device), arithmetic, (0.0, 0.0, 0.0))
    assert (logarithm[27:58] == torch.arange(31)).all()
    assert logarithm[-2:].isnan().all()
    torch.testing.assert_close(logarithm[:-2], x[:-2].double().log2(), rtol=2.5e-7, atol=0)
    torch.testing.assert_close(quotient[:-2], x[:-2].double() / y[:-2].double(), rtol=2.5e-7, atol=0)
    torch.testing.assert_close(inverse[:-1], 1 / y[:-1].double(), rtol=2.5e-7, atol=0)
    assert quotient[-1].isnan() and inverse[-1].isnan()


def test_an_objective_without_a_twin_is_refused() -> None:
    with pytest.raises(TypeError, match="no device function for int"):
        device_twin(3)  # type: ignore[arg-type]
