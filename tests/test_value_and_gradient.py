"""What a backend makes of a private chunk of logits: values of its rows, and their gradient in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import relative_error
from torch import Tensor

from cot_kernels import autograd, differentiable, projection
from cot_kernels.backends import accumulation_dtype
from cot_kernels.backends.triton import launch
from cot_kernels.objectives import ComplementEntropyObjective, CrossEntropyObjective, Objective, cross_entropy_of

OBJECTIVES: list[Objective] = [ComplementEntropyObjective(1.0, 1e-7), CrossEntropyObjective(1.0, 0.5)]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: type(each).__name__)


@pytest.fixture
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether long rows, which are few here, are split among programs as they would be, or have one each."""
    if request.param == "whole":
        monkeypatch.setattr(launch, "choose_splits", lambda *sizes: 1)


on_triton = [pytest.param("triton", sharing, marks=pytest.mark.gpu) for sharing in ("whole", "split")]
on_all_ways = pytest.mark.parametrize(
    ("device", "sharing"),
    [*((backend, "whole") for backend in ("native", "aten", "aten-blocks")), *on_triton],
    indirect=True,
)


def chunk(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits in a buffer as projections use, and targets of which one is ignored."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2
    logits = projection._buffer(rows, classes, values.to(device), dtype).copy_(values)
    target = torch.randint(classes, (rows,), generator=generator)
    target[1] = -100
    return logits, target.to(device)


def expected(logits: Tensor, target: Tensor, objective: Objective, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in float64, from the gradient that autograd derives."""
    leaf = logits.detach().cpu().to(torch.float64, copy=True).requires_grad_()
    target = target.cpu()
    z_g, lse, negentropy = differentiable.statistics(leaf, target, -100)
    log_odds = lse - z_g
    wanted = target.unsqueeze(1) != -100
    values = [objective.rows(log_odds.detach(), negentropy.detach())[0], cross_entropy_of(log_odds), negentropy]
    loss = differentiable.loss(leaf, target, -100, objective).squeeze(1)
    (gradient,) = torch.autograd.grad(
        loss, leaf, torch.ones_like(loss) if upstream is None else upstream.double().cpu()
    )
    return torch.cat([value.detach() * wanted for value in values], 1).t(), gradient


@on_all_ways
@each_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [5, 100, 1024, 1031, 3001, 5000])
@pytest.mark.parametrize("scaled", [False, True])
def test_values_and_gradient(
    objective: Objective, dtype: torch.dtype, classes: int, scaled: bool, device: torch.device, sharing: None
) -> None:
    logits, target = chunk(5, classes, dtype, device)
    upstream = torch.linspace(-1, 2, 5, dtype=accumulation_dtype(dtype)) if scaled else None
    true_values, true_gradient = expected(logits, target, objective, upstream)
    backend: Any = autograd.backend_for(logits)
    values = backend.value_and_gradient(
        logits, target, -100, objective, None if upstream is None else upstream.to(device), True
    )
    assert values.dtype == accumulation_dtype(dtype)
    torch.testing.assert_close(values.cpu().double(), true_values, rtol=2e-6, atol=2e-6)
    assert relative_error(logits, true_gradient) < {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 8e-3)
    assert logits[1].eq(0).all()


@on_all_ways
@each_objective
@pytest.mark.parametrize("classes", [100, 3000])
def test_values_alone_are_the_same(objective: Objective, classes: int, device: torch.device, sharing: None) -> None:
    backend: Any = autograd.backend_for(torch.empty(0, device=device))
    both, alone = (
        backend.value_and_gradient(*chunk(4, classes, torch.float32, device), -100, objective, None, wanted)
        for wanted in (True, False)
    )
    assert torch.equal(both, alone)


@on_all_ways
@each_objective
@pytest.mark.parametrize("classes", [100, 3000])
def test_rows_that_hold_anything(objective: Objective, classes: int, device: torch.device, sharing: None) -> None:
    """Masked classes, an empty complement, saturated rows, and NaN in the logits and upstream of an ignored one."""
    logits, target = chunk(6, classes, torch.float32, device)
    target[1:2] = 0
    logits[0, 7:50] = -torch.inf
    logits[0, target[0]] = 1.0
    logits[2] = logits[2].masked_fill(torch.arange(classes, device=device) != target[2], -torch.inf)
    logits[3, target[3]] = 60.0
    logits[4, target[4]] = -60.0
    target[5] = -100
    logits[5, ::2] = torch.nan
    upstream = torch.ones(6, device=device)
    true_values, true_gradient = expected(logits.nan_to_num(nan=0.0, neginf=-torch.inf), target, objective, upstream)
    upstream[5] = torch.nan
    backend: Any = autograd.backend_for(logits)
    values = backend.value_and_gradient(logits, target, -100, objective, upstream, True)
    kept = torch.isfinite(true_values)
    torch.testing.assert_close(values.cpu().double()[kept], true_values[kept], rtol=2e-6, atol=2e-6)
    assert logits.isfinite().all() and logits[5].eq(0).all()
    assert relative_error(logits, true_gradient) < 2e-6


@pytest.mark.parametrize(("device", "sharing"), on_triton, indirect=True)
@pytest.mark.parametrize("classes", [100, 3000])
def test_targets_out_of_range_mark_their_rows(classes: int, device: torch.device, sharing: None) -> None:
    logits, target = chunk(4, classes, torch.float32, device)
    target[2] = classes
    backend: Any = autograd.backend_for(logits)
    values = backend.value_and_gradient(logits, target, -100, OBJECTIVES[1], None, True)
    assert values.isnan().all(0).tolist() == values.isnan().any(0).tolist() == [False, False, True, False]
    assert logits.isnan().any(1).tolist() == [False, False, True, False]
