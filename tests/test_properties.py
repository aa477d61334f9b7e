"""Random shapes, strides, masks, ignored rows and options, against the published formula in float64."""

from __future__ import annotations

import pytest
import torch
from oracle import CASES, Case

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DTYPES = {torch.float64: 1e-7, torch.float32: 5e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (N, K), some classes of each row masked by -inf but never the target and one other, and targets."""
    rows, classes = draw(st.integers(1, 9)), draw(st.integers(3, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 1.0, 8.0]))
    logits = torch.randn(rows, classes, generator=generator) * spread + draw(st.sampled_from([0.0, -7.0]))
    target = torch.randint(classes, (rows,), generator=generator)
    masked = torch.rand(rows, classes, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    for kept in (target, (target + 1) % classes, (target + 2) % classes):
        masked.scatter_(1, kept[:, None], False)
    ignored = torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    return logits.masked_fill(masked, -torch.inf), target, ignored


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    problem=problems(),
    case=st.sampled_from([case for case in CASES if case.name != "complement_cross_entropy"]),
    dtype=st.sampled_from(list(DTYPES)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    transposed=st.booleans(),
)
def test_any_problem(
    problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    case: Case,
    dtype: torch.dtype,
    reduction: str,
    transposed: bool,
    device: torch.device,
) -> None:
    logits, target, ignored = problem
    logits = logits.to(dtype)
    if transposed:
        logits = logits.t().contiguous().t()
    leaf = logits.to(device).requires_grad_()
    loss = case.loss(leaf, torch.where(ignored, -100, target).to(device), reduction=reduction)
    upstream = torch.linspace(0.5, 2.0, max(loss.numel(), 1), dtype=loss.dtype).view(loss.shape).to(device)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    assert gradient.dtype == dtype and gradient.shape == logits.shape

    # The oracle's autograd makes NaN of a probability of 0: give it the lowest logit whose probability is not.
    plain = logits.double().clamp(min=-300.0)[~ignored].requires_grad_()
    true = case.published(plain, target[~ignored], reduction=reduction)
    shown = loss.cpu().double() if reduction != "none" else loss.cpu().double()[~ignored]
    torch.testing.assert_close(shown, true.detach(), rtol=2e-6, atol=2e-6, equal_nan=True)
    if not (~ignored).any():
        assert gradient.abs().max().item() == 0
        return
    weights = upstream.cpu().double()
    (true_gradient,) = torch.autograd.grad(true, plain, weights[~ignored] if reduction == "none" else weights)
    error = gradient.cpu().double()[~ignored] - true_gradient
    scale = true_gradient.norm(dim=1, keepdim=True)
    # Where the complement is one class, what remains is rounding of the size of the published epsilon.
    floor = 1e-7 * weights.max() + (2**-23 if dtype == torch.float16 else 0.0)
    assert bool((error.abs() <= DTYPES[dtype] * scale + floor).all())
    assert gradient[ignored.to(device)].abs().sum().item() == 0
