"""Calls and backward passes in surroundings that the other one of the two knew nothing of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import CASES, Case, draw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import cot_kernels
from cot_kernels import operators
from cot_kernels.backends.native import backend as native


@pytest.fixture(params=["loss", "unreduced", "statistics", "linear"])
def problem(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """What an eager call returns, and a leaf that it depends on."""
    logits, target = draw(6, 9, 1.0)
    leaf = logits.float().requires_grad_()
    if request.param == "loss":
        return cot_kernels.complement_entropy(leaf, target), leaf
    if request.param == "unreduced":
        return cot_kernels.complement_cross_entropy(leaf, target, reduction="none"), leaf
    if request.param == "statistics":
        return cot_kernels.complement_statistics(leaf, target).negentropy, leaf
    return cot_kernels.linear_complement_entropy(leaf, torch.eye(9), target), leaf


def gradient(value: Tensor, leaf: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, upstream, retain_graph=True)[0]


def test_a_backward_pass_in_functionalization(problem: tuple[Tensor, Tensor]) -> None:
    value, leaf = problem
    upstream = torch.rand_like(value)
    expected = gradient(value, leaf, upstream)
    got = torch.func.functionalize(lambda upstream: gradient(value, leaf, upstream))(upstream)
    torch.testing.assert_close(got, expected)


def test_a_backward_pass_in_forward_mode(problem: tuple[Tensor, Tensor], request: pytest.FixtureRequest) -> None:
    if "linear" in request.node.callspec.id:
        pytest.skip("PyTorch: a number times a float32 has a float64 tangent there, which no matrix product takes")
    value, leaf = problem
    upstream, tangent = torch.rand_like(value), torch.rand_like(value)
    expected = gradient(value, leaf, tangent)
    _, got = torch.func.jvp(lambda upstream: gradient(value, leaf, upstream), (upstream,), (tangent,))
    torch.testing.assert_close(got, expected)
    with forward_ad.dual_level():
        dual = gradient(value, leaf, forward_ad.make_dual(upstream, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)


def test_a_backward_pass_on_zeros_without_memory(problem: tuple[Tensor, Tensor]) -> None:
    value, leaf = problem
    zeros = torch._efficientzerotensor(value.shape)  # type: ignore[attr-defined]
    assert gradient(value, leaf, zeros).abs().sum() == 0


def test_a_backward_pass_among_fake_tensors(problem: tuple[Tensor, Tensor]) -> None:
    value, leaf = problem
    upstream = torch.rand_like(value)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert gradient(value, leaf, upstream).shape == leaf.shape


@pytest.mark.parametrize("case", CASES, ids=str)
def test_another_default_device(case: Case) -> None:
    """Tensors of the losses are where the logits are, not where the next tensor of the user will be."""
    logits, target = draw(6, 9, 1.0)
    leaf = logits.float().requires_grad_()
    expected = torch.autograd.grad(case.loss(leaf, target), leaf)[0]
    with torch.device("meta"):
        loss = case.loss(leaf, target)
        statistics = cot_kernels.complement_statistics(leaf, target)
        linear = cot_kernels.linear_complement_entropy(leaf, leaf.detach()[:3], target % 3)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)
    assert {each.device.type for each in (loss, linear, *statistics)} == {"cpu"}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_hooks_on_saved_tensors_may_change_how_they_lie(reduction: str, device: torch.device) -> None:
    logits, target = draw(6, 9, 1.0)
    leaf, target = logits.float().to(device).requires_grad_(), target.to(device)

    def loss_of() -> Tensor:
        return cot_kernels.complement_entropy(leaf, target, reduction=reduction).sum()

    expected = torch.autograd.grad(loss_of(), leaf)[0]

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous() if tensor.dim() > 1 else tensor

    def back(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1) if tensor.dim() > 1 else tensor

    def apart(tensor: Tensor) -> Tensor:
        """Each number beside one that is not to be read."""
        wide = torch.full((*tensor.shape, 2), -1, dtype=tensor.dtype, device=tensor.device)
        wide[..., 0] = tensor
        return wide[..., 0]

    for pack, unpack in ((turned, back), (lambda tensor: tensor, apart)):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = loss_of()
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)


def test_hooks_on_saved_tensors_that_give_back_something_else() -> None:
    logits, target = draw(6, 9, 1.0)
    leaf = logits.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.half(), lambda tensor: tensor):
        loss = cot_kernels.complement_entropy(leaf, target)
    with pytest.raises(RuntimeError, match="hooks on saved tensors must give back what they got"):
        torch.autograd.grad(loss, leaf)


def test_logits_without_memory_are_refused() -> None:
    logits, target = torch.randn(4, 20), torch.zeros(4, dtype=torch.int64)
    logits.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory"):
        native.loss(logits, target, -100, operators.objective_of("cross_entropy", [1.0, 0.0]), "mean")


def statistics_gradient(logits: Tensor, target: Tensor, state: Tensor, upstream: Tensor) -> Any:
    return operators.row_statistics_gradient(logits, target, -100, state, upstream, upstream, upstream)


def loss_gradient(logits: Tensor, target: Tensor, state: Tensor, upstream: Tensor) -> Any:
    return operators.row_loss_gradient(logits, target, -100, "cross_entropy", [1.0, 0.0], state, upstream)


@pytest.mark.parametrize("call", [loss_gradient, statistics_gradient])
def test_operators_look_before_kernels_read(call: Callable[..., Any]) -> None:
    """They are public, and may be called with anything."""
    logits, target = torch.randn(200, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target must have shape \(200,\)"):
        operators.row_loss(logits, target, -100, "cross_entropy", [1.0, 0.0])
    with pytest.raises(ValueError, match=r"target must have shape \(200,\)"):
        operators.row_statistics(logits, target, -100)
    with pytest.raises(ValueError, match=r"must have shape \(N, K\) or \(N, K, D\)"):
        operators.row_statistics(logits[0], target[0], -100)
    rows = torch.zeros(200, dtype=torch.int64)
    good = torch.ones(4, 200), torch.ones(200)
    with pytest.raises(ValueError, match=r"state must hold torch\.float32 on cpu for a target of shape"):
        call(logits, rows, torch.ones(4, 2), good[1])
    with pytest.raises(ValueError, match=r"torch\.float64"):
        call(logits, rows, good[0], good[1].double())
