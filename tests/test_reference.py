"""The published formulas: known values, and agreement with the oracle of the other tests."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

import cot_kernels
from cot_kernels import reference


def test_complement_entropy_of_known_distributions() -> None:
    flat = torch.tensor([[2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    peaked = torch.tensor([[2.0, 40.0, 0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([0])
    assert reference.complement_entropy(flat, target).item() == pytest.approx(-math.log(3) / 4, rel=1e-6)
    assert reference.complement_entropy(peaked, target).item() == pytest.approx(0, abs=1e-7)


def test_worked_example() -> None:
    """p = (1/2, 1/4, 1/8, 1/8): q = (1/2, 1/4, 1/4), so H = 1.5 ln 2 and every loss follows by hand."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    target = torch.tensor([0])
    entropy = 1.5 * math.log(2)
    assert reference.complement_entropy(logits, target).item() == pytest.approx(-entropy / 4, rel=1e-6)
    guided = reference.guided_complement_entropy(logits, target).item()
    assert guided == pytest.approx(-(0.5 ** (1 / 3)) * entropy / math.log(4), rel=1e-6)
    both = reference.complement_cross_entropy(logits, target).item()
    assert both == pytest.approx(math.log(2) - entropy / 3, rel=1e-6)


@pytest.mark.parametrize("name", ["complement_entropy", "guided_complement_entropy", "complement_cross_entropy"])
@pytest.mark.parametrize("classes", [3, 1000, 20000])
def test_oracle_is_the_published_formula(name: str, classes: int) -> None:
    """The oracle leaves out the guard of the logarithm, which is worth at most K * 1e-10 a row, and nothing else."""
    options = {"gamma": -2.0} if name == "complement_cross_entropy" else {}
    scale = {"complement_entropy": classes, "guided_complement_entropy": 1.0, "complement_cross_entropy": classes / 2}
    for margin in (None, 0.0, 5.0, 10.0):
        logits, target = oracle.draw(5, classes, margin)
        published = getattr(reference, name)(logits, target, reduction="none", **options)
        true = getattr(oracle, name)(logits, target, reduction="none")
        assert (published - true).abs().max().item() * scale[name] <= 2 * classes * 1e-10
        plain = getattr(reference, name)(logits, target, reduction="none", log_eps=0.0, **options)
        torch.testing.assert_close(plain, true, rtol=1e-9, atol=1e-12)


def test_drop_in_value_and_gradient() -> None:
    """The package's default is the published value, guard and all, in float64."""
    logits, target = oracle.draw(50, 10, 3.0)
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = cot_kernels.ComplementEntropy(10)(leaf, target)
    published = reference.complement_entropy(other, target)
    ours.backward()
    published.backward()
    assert abs(ours.item() - published.item()) <= 1e-10
    assert leaf.grad is not None and other.grad is not None
    assert oracle.relative_error(leaf.grad, other.grad) <= 3e-8


def test_reductions() -> None:
    logits, target = oracle.draw(6, 4, None)
    rows = reference.complement_entropy(logits, target, reduction="none")
    assert rows.shape == (6,)
    torch.testing.assert_close(reference.complement_entropy(logits, target, reduction="sum"), rows.sum())
    torch.testing.assert_close(reference.complement_entropy(logits, target), rows.mean())
    with pytest.raises(ValueError, match="reduction must be"):
        reference.complement_entropy(logits, target, reduction="avg")


@pytest.mark.parametrize("classes", [10, 1000])
def test_published_operations_in_float32_lose_their_own_formula(classes: int) -> None:
    """What the README says of them, at a margin of 20: the gradient is off by more than 10 %, and here by < 5e-6."""
    logits, target = oracle.draw(64, classes, 20.0)
    logits = logits.float().double()
    weights = torch.ones(64, dtype=torch.float64)
    true = oracle.gradient_of(oracle.complement_entropy, logits, target, weights)[1]
    published = oracle.gradient_of(reference.complement_entropy, logits.float(), target, weights)[1]
    ours = oracle.gradient_of(cot_kernels.complement_entropy, logits.float(), target, weights)[1]
    assert oracle.relative_error(published, true) > 0.1
    assert oracle.relative_error(ours, true) < 5e-6
