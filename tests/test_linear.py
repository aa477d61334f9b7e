"""Projection and loss in one, beside the loss of the projection's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_problems import each_loss, fused, gradients, problem, unfused
from meter import Meter
from oracle import relative_error
from torch import Tensor, nn
from torch.nn.functional import linear

import cot_kernels
from cot_kernels import LinearComplementCrossEntropy, LinearComplementEntropy, projection
from cot_kernels.backends import aten

# Bytes for logits: one row a chunk, a few, all.
budgets = pytest.mark.parametrize("memory_budget", [1, 37 * 8 * 5, None])


@each_loss
@budgets
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_loss_of_the_logits(
    name: str, memory_budget: int | None, reduction: str, biased: bool, device: torch.device
) -> None:
    *tensors, target = problem(device=device)
    tensors = tensors if biased else tensors[:2]
    upstream = torch.randn(13 if reduction == "none" else (), dtype=torch.float64).to(device)
    got = gradients(
        fused(name, reduction=reduction, memory_budget=memory_budget), *tensors, target=target, upstream=upstream
    )
    expected = gradients(unfused(name, reduction=reduction), *tensors, target=target, upstream=upstream)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(name: str, reduction: str) -> None:
    input, weight, bias, target = problem(rows=4, features=3, classes=5)
    leaves = [each.requires_grad_() for each in (input, weight, bias)]

    def loss(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused(name, reduction=reduction, memory_budget=80)(input, weight, target, linear_bias=bias)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves, atol=1e-4)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """At most twice the error of the unfused path of the same dtype, against float64."""
    *tensors, target = problem(rows=40, features=32, classes=300, device=device)
    tensors = [each.to(dtype) for each in tensors]
    tensors[0] /= 4
    _, true = gradients(unfused(name), *(each.double() for each in tensors), target=target)
    value, got = gradients(fused(name, memory_budget=300 * dtype.itemsize * 15), *tensors, target=target)
    other, expected = gradients(unfused(name), *tensors, target=target)
    assert value.dtype == torch.float32
    for fused_gradient, unfused_gradient, truth in zip(got, expected, true, strict=True):
        assert fused_gradient.dtype == dtype
        floor = 2e-6 if dtype == torch.float32 else 0.0
        assert relative_error(fused_gradient, truth) <= 2 * relative_error(unfused_gradient, truth) + floor
    torch.testing.assert_close(value, other, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-6)


def test_float16_gradients_survive_a_mean_over_many_rows() -> None:
    """A mean's 1 / N is applied after the products: before them it would underflow, as it does unfused."""
    input, weight, _, target = problem(rows=2000, features=4, classes=100)
    target = target.clamp(min=0)
    tensors = [each.half() for each in (input, weight)]
    for name in ("cross-entropy", "complement entropy"):
        _, (truth, _) = gradients(unfused(name), *(each.double() for each in tensors), target=target)
        _, (got, _) = gradients(fused(name), *tensors, target=target, upstream=torch.tensor(2.0**14))
        assert relative_error(got, truth * 2**14) < 2e-3


@each_loss
def test_parts_are_those_of_the_logits(name: str, device: torch.device) -> None:
    input, weight, bias, target = problem(device=device)
    logits = linear(input, weight, bias)
    for reduction in ("mean", "sum", "none"):
        parts = fused(name, linear_bias=bias.requires_grad_(), reduction=reduction, return_parts=True)(
            input, weight, target
        )
        assert isinstance(parts, cot_kernels.LinearLoss)
        torch.testing.assert_close(
            parts.cross_entropy, cot_kernels.cross_entropy(logits, target, reduction=reduction), rtol=1e-10, atol=1e-12
        )
        entropy = -cot_kernels.complement_statistics(logits, target).negentropy
        kept = target != -100
        expected = {"none": entropy, "sum": entropy.sum(), "mean": entropy[kept].mean()}[reduction]
        torch.testing.assert_close(parts.complement_entropy, expected, rtol=1e-10, atol=1e-12)
        assert parts.loss.requires_grad
        assert not parts.cross_entropy.requires_grad and not parts.complement_entropy.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_backward_pass_is_right(reduction: str, device: torch.device) -> None:
    """The first gives its gradients away; the second forms them again, to the bit."""
    input, weight, bias, target = (each for each in problem(device=device))
    leaves = [each.requires_grad_() for each in (input, weight, bias)]
    loss = fused("complement cross-entropy", reduction=reduction, memory_budget=37 * 8 * 5)(
        input, weight, target, linear_bias=bias
    )
    upstream = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    kept = [each.clone() for each in first]
    second, third = (torch.autograd.grad(loss, leaves, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))  # nobody wrote to what was given away
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(first, second, third, strict=True))
    expected = gradients(
        unfused("complement cross-entropy", reduction=reduction), input, weight, bias, target=target, upstream=upstream
    )[1]
    torch.testing.assert_close(first, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_upstream_gradients_at_once(reduction: str, device: torch.device) -> None:
    input, weight, _, target = problem(device=device)
    leaves = [each.requires_grad_() for each in (input, weight)]
    loss = fused("complement cross-entropy", reduction=reduction)(*leaves, target)
    many = torch.randn(3, *loss.shape, dtype=loss.dtype, device=device)
    together = torch.autograd.grad(loss, leaves, many, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(loss, leaves, upstream, retain_graph=True) for upstream in many]
    torch.testing.assert_close(together, tuple(torch.stack(each) for each in zip(*apart, strict=True)))


@pytest.mark.parametrize("frozen", ["input", "weight", "both"])
def test_nothing_is_computed_for_what_is_frozen(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    input, weight, _, target = problem()
    input.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "input")
    asked: list[Any] = []
    compute = projection.compute
    monkeypatch.setattr(projection, "compute", lambda *args: (asked.append(args[-1]), compute(*args))[1])
    loss = cot_kernels.linear_complement_cross_entropy(input, weight, target)
    assert [list(each) for each in asked] == [[frozen == "weight", frozen == "input", False]]
    if frozen != "both":
        leaf = weight if frozen == "input" else input
        (got,) = torch.autograd.grad(loss, leaf)
        reference = cot_kernels.complement_cross_entropy(linear(input, weight), target)
        (expected,) = torch.autograd.grad(reference, leaf)
        torch.testing.assert_close(got, expected)


def test_without_gradients_none_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[bool] = []
    compute = projection.compute
    monkeypatch.setattr(projection, "compute", lambda *given: wanted.extend(given[-1]) or compute(*given))
    input, weight, _, target = problem()
    leaves = [each.requires_grad_() for each in (input, weight)]
    with torch.no_grad():
        loss = cot_kernels.linear_complement_cross_entropy(*leaves, target)
    assert not loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(cot_kernels.linear_complement_cross_entropy(*leaves, target), loss)
    assert wanted == 6 * [False]
    cot_kernels.linear_complement_cross_entropy(*leaves, target)
    assert wanted[6:] == [True, True, False]


def test_tied_weights() -> None:
    """One parameter as embedding and as projection."""
    _, weight, _, target = problem()
    words = target.clamp(min=0)
    results = []
    for loss in (fused("complement cross-entropy"), unfused("complement cross-entropy")):
        leaf = weight.detach().clone().requires_grad_()
        loss(nn.functional.embedding(words, leaf).tanh(), leaf, target).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("features", [16, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype: torch.dtype, features: int) -> None:
    """The budget or the rounded copy of dW, the gradients with dW in float32, and what a block of the loss takes."""
    input, weight, _, target = problem(rows=512, features=features, classes=30_000, dtype=dtype)
    leaves = [each.requires_grad_() for each in (input, weight)]
    budget, logits = 4 << 20, 512 * 30_000 * dtype.itemsize
    gradients = input.nbytes + 4 * weight.numel()
    rounded = 0 if dtype == torch.float32 else 2 * weight.numel()  # in the backward pass, when the logits are gone
    scratch = 3 * 2 * aten.BLOCK_BYTES + 64 * 512 + (0 if dtype == torch.float32 else 2 * projection.CONVERTED)
    with Meter() as meter:
        loss = cot_kernels.linear_complement_cross_entropy(*leaves, target, memory_budget=budget)
        assert meter.alive <= gradients + 64 * 512
        loss.backward()
    assert gradients < meter.peak <= max(budget + scratch, rounded) + gradients + 64 * 512
    with Meter() as whole:
        unfused("complement cross-entropy")(*leaves, target).backward()
    assert logits < whole.peak
    assert features > 16 or meter.peak < whole.peak / 5


def test_memory_under_autocast() -> None:
    """A copy of the weight in the dtype of the products as well."""
    input, weight, _, target = problem(rows=256, features=128, classes=30_000, dtype=torch.float32)
    leaves = [each.requires_grad_() for each in (input, weight)]
    budget, gradients = 4 << 20, input.nbytes + weight.nbytes
    scratch = 2 * projection.CONVERTED + 64 * 512
    with torch.autocast("cpu", torch.bfloat16), Meter() as meter:
        cot_kernels.linear_complement_cross_entropy(*leaves, target, memory_budget=budget).backward()
    assert gradients + weight.nbytes // 2 < meter.peak <= budget + gradients + weight.nbytes // 2 + scratch


def test_shapes(device: torch.device) -> None:
    input, weight, bias, target = problem(rows=12, device=device)
    flat = cot_kernels.linear_complement_entropy(input, weight, target, linear_bias=bias, reduction="none")
    shaped = cot_kernels.linear_complement_entropy(
        input.view(3, 4, 8), weight, target.view(3, 4), linear_bias=bias, reduction="none"
    )
    assert torch.equal(shaped, flat.view(3, 4))
    one = cot_kernels.linear_complement_entropy(input[0], weight, target[0], linear_bias=bias, reduction="none")
    assert one.shape == () and torch.allclose(one, flat[0])
    strided = input.t().contiguous().t()
    assert not strided.is_contiguous()
    backwards = weight.t().contiguous().t()
    got = gradients(fused("complement entropy"), strided, backwards, target=target)
    torch.testing.assert_close(got, gradients(unfused("complement entropy"), input, weight, target=target))


@each_loss
def test_no_rows_and_none_that_count(name: str, device: torch.device) -> None:
    input, weight, bias, target = problem(device=device)
    for x, t in ((input[:0], target[:0]), (input, torch.full_like(target, -100))):
        value, got = gradients(fused(name), x, weight, bias, target=t)
        assert value.isnan() and not any(each.any() for each in got)
        value, got = gradients(fused(name, reduction="sum"), x, weight, bias, target=t)
        assert value == 0 and not any(each.any() for each in got)
        assert [each.shape for each in got] == [x.shape, weight.shape, bias.shape]


def test_targets_out_of_range() -> None:
    input, weight, _, target = problem()
    target[0] = 37
    with pytest.raises(IndexError, match="target 37 is out of bounds for 37 classes"):
        cot_kernels.linear_complement_cross_entropy(input, weight, target)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (LinearComplementCrossEntropy, cot_kernels.linear_complement_cross_entropy),
        (LinearComplementEntropy, cot_kernels.linear_complement_entropy),
    ],
)
def test_modules_are_their_functions(module: Any, function: Callable[..., Any]) -> None:
    input, weight, bias, target = problem()
    for arguments in ({}, {"reduction": "none", "normalization": "none", "ignore_index": 3, "memory_budget": 999}):
        criterion = module(**arguments)
        assert torch.equal(
            criterion(input, weight, target.clamp(min=0), linear_bias=bias),
            function(input, weight, target.clamp(min=0), linear_bias=bias, **arguments),
        )
        assert not list(criterion.parameters()) and "num_classes" not in repr(criterion)


def test_chunks_fit_the_budget_and_are_even() -> None:
    assert projection.chunk_rows(4096, 50257, 4, 128 << 20) * 50257 * 4 <= 128 << 20
    assert projection.chunk_rows(1000, 10, 4, 400 * 40) == 334  # 3 chunks, not 400, 400 and 200
    assert projection.chunk_rows(10, 10, 4, 1) == 1 and projection.chunk_rows(0, 10, 4, 1) == 1


@pytest.mark.parametrize("rows", [64, 300])
def test_weight_gradients_in_bfloat16_are_rounded_once(rows: int, device: torch.device) -> None:
    """Sums rounded after each chunk are off by several times as much, a product rounded before 1 / N by up to twice."""
    loss, logits = fused("complement cross-entropy", memory_budget=rows * 100), unfused("complement cross-entropy")
    for seed in (5, 8, 11):
        generator = torch.Generator().manual_seed(seed)
        hidden = ((torch.randn(300, 16, generator=generator) + 3) / 4).bfloat16().to(device)
        weight = torch.randn(50, 16, generator=generator).bfloat16().to(device)
        target = torch.randint(50, (300,), generator=generator).to(device)
        _, (_, true) = gradients(logits, hidden.double(), weight.double(), target=target)
        (_, (_, got)), (_, (_, other)) = (gradients(each, hidden, weight, target=target) for each in (loss, logits))
        assert relative_error(got, true) <= 1.2 * relative_error(other, true)


def test_weight_gradients_of_many_rows_of_a_class_fit_float16(device: torch.device) -> None:
    """Their sum does not, and the mean is taken after the products."""
    hidden, weight, _, target = problem(rows=1024, classes=50, device=device)
    hidden, weight, target = (hidden + 80).half(), (weight / 100).half(), torch.zeros_like(target)
    _, (_, true) = gradients(unfused("complement cross-entropy"), hidden.double(), weight.double(), target=target)
    _, (_, got) = gradients(fused("complement cross-entropy"), hidden, weight, target=target)
    assert relative_error(got, true) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_features(dtype: torch.dtype, device: torch.device) -> None:
    """The logits are the bias."""
    *_, bias, target = problem(dtype=dtype, device=device)
    input, weight = (torch.zeros(len(each), 0, dtype=dtype, device=device) for each in (target, bias))
    losses = (each("complement cross-entropy") for each in (fused, unfused))
    (_, got), (_, expected) = (gradients(loss, input, weight, bias, target=target) for loss in losses)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-3)


def test_two_classes() -> None:
    hidden, weight, target = torch.randn(3, 4), torch.randn(2, 4), torch.tensor([0, 1, 1])
    with pytest.warns(UserWarning, match="linear_complement_entropy got 2 classes") as told:
        assert not cot_kernels.linear_complement_entropy(hidden, weight, target, eps=0.0)
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="linear_complement_cross_entropy got 2 classes.*cross_entropy alone") as told:
        loss = cot_kernels.linear_complement_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, target))
    assert told[0].filename == __file__
