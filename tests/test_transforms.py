"""Derivatives of derivatives, forward mode, and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import CASES, Case, draw, on_each_backend
from torch import Tensor

import cot_kernels

Loss = Callable[[Tensor], Tensor]


def of_logits(case: Case, reduction: str, device: torch.device, classes: int = 6) -> tuple[Loss, Tensor]:
    logits, target = draw(4, classes, 1.0)
    target[2] = -100
    target = target.to(device)
    return lambda logits: case.loss(logits, target, reduction=reduction), logits.to(device)


def statistics(device: torch.device) -> tuple[Loss, Tensor]:
    logits, target = draw(4, 6, 1.0)
    target[2] = -100
    target = target.to(device)
    return lambda logits: torch.stack(tuple(cot_kernels.complement_statistics(logits, target))), logits.to(device)


@on_each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_derivatives_of_the_losses(case: Case, reduction: str, device: torch.device) -> None:
    loss, logits = of_logits(case, reduction, device)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(loss, (leaf,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (leaf,))


@on_each_backend
def test_all_derivatives_of_the_statistics(device: torch.device) -> None:
    function, logits = statistics(device)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(function, (leaf,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (leaf,))


@on_each_backend
def test_derivatives_of_class_major_logits(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    target = torch.randint(5, (2, 3), generator=generator).to(device)
    for loss in (cot_kernels.complement_entropy, cot_kernels.complement_statistics):
        assert torch.autograd.gradgradcheck(lambda logits, loss=loss: loss(logits, target), (leaf,))


def test_the_gradient_to_be_differentiated_is_the_gradient(device: torch.device) -> None:
    """With masked classes, an empty complement, an ignored row of NaN and saturated rows, in float32."""
    logits, target = draw(7, 9, None)
    logits = logits.float()
    logits[1, (target[1] + 1) % 9] = -torch.inf
    logits[2] = logits[2].masked_fill(torch.arange(9) != target[2], -torch.inf)
    logits[3, target[3]] += 60
    logits[4, target[4]] -= 60
    logits[5] = torch.nan
    target[5] = -100
    for case in CASES:
        leaf = logits.to(device).requires_grad_()
        loss = case.loss(leaf, target.to(device))
        (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (graphed,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert graphed.requires_grad and not plain.requires_grad
        torch.testing.assert_close(graphed.detach(), plain, rtol=3e-6, atol=1e-9)
        (second,) = torch.autograd.grad(graphed.square().sum(), leaf)
        assert bool(second.isfinite().all()), str(case)


@on_each_backend
def test_gradient_penalty_trains(device: torch.device) -> None:
    """What double backward is for: a penalty on the norm of the gradient with respect to the inputs."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 5).to(device)
    inputs = torch.randn(16, 8, device=device).requires_grad_()
    target = torch.randint(5, (16,), device=device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    norms = []
    for _ in range(20):
        loss = cot_kernels.cross_entropy(head(inputs), target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = gradient.square().mean()
        optimizer.zero_grad()
        penalty.backward(inputs=list(head.parameters()))
        optimizer.step()
        norms.append(penalty.item())
    assert norms[-1] < norms[0] / 2


@on_each_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_func(case: Case, device: torch.device) -> None:
    loss, logits = of_logits(case, "none", device)
    leaf = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)

    def total(logits: Tensor) -> Tensor:
        return loss(logits).sum()

    torch.testing.assert_close(torch.func.grad(total)(logits), gradient)
    jacobian = torch.autograd.functional.jacobian(loss, logits)
    torch.testing.assert_close(torch.func.jacrev(loss)(logits), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(loss)(logits), jacobian)
    hessian = torch.autograd.functional.hessian(total, logits)
    torch.testing.assert_close(torch.func.hessian(total)(logits), hessian)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(total))(logits), hessian)
    value, tangent = torch.func.jvp(loss, (logits,), (torch.ones_like(logits),))
    torch.testing.assert_close(value, loss(logits))
    torch.testing.assert_close(tangent, (jacobian * torch.ones_like(logits)).sum((1, 2)))


@on_each_backend
@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 6, 3)], ids=str)
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (0, None), (None, 0), (-1, -1)], ids=str)
def test_vmap(shape: tuple[int, ...], in_dims: tuple[int | None, int | None], device: torch.device) -> None:
    """Values, per-sample gradients and statistics of a batch of problems are those of each problem."""
    generator = torch.Generator().manual_seed(0)
    classes = shape[0] if len(shape) == 1 else shape[1]
    rows = () if len(shape) == 1 else (shape[0], *shape[2:])
    logits = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for _ in range(3)]
    target = [torch.randint(classes, rows, generator=generator).to(device) for _ in range(3)]
    if in_dims[0] is None:
        logits = logits[:1] * 3
    if in_dims[1] is None:
        target = target[:1] * 3
    batch = tuple(
        each[0] if dim is None else torch.stack(each, dim if len(shape) > 1 or each is logits else 0)
        for each, dim in zip((logits, target), in_dims, strict=True)
    )

    def value(logits: Tensor, target: Tensor) -> Tensor:
        return cot_kernels.complement_entropy(logits, target)

    def negentropy(logits: Tensor, target: Tensor) -> Tensor:
        return cot_kernels.complement_statistics(logits, target).negentropy

    for function in (value, negentropy, torch.func.grad(value), torch.func.jacrev(negentropy)):
        expected = torch.stack([function(*each) for each in zip(logits, target, strict=True)])
        torch.testing.assert_close(torch.func.vmap(function, in_dims)(*batch), expected)


def test_vmap_over_no_problems() -> None:
    logits, target = torch.randn(0, 3, 5), torch.zeros(0, 3, dtype=torch.long)
    loss = cot_kernels.complement_entropy
    assert torch.func.vmap(loss)(logits, target).shape == (0,)
    assert torch.func.vmap(torch.func.grad(loss))(logits, target).shape == (0, 3, 5)
    assert torch.func.vmap(torch.func.jacrev(cot_kernels.complement_statistics))(logits, target)[0].shape == (
        0,
        3,
        3,
        5,
    )


def test_many_upstream_gradients_at_once(device: torch.device) -> None:
    """torch.autograd.grad(is_grads_batched=True), which jacobian(vectorize=True) and others are built on."""
    for case in CASES:
        loss, logits = of_logits(case, "none", device)
        leaf = logits.requires_grad_()
        rows = loss(leaf)
        one_by_one = [torch.autograd.grad(row, leaf, retain_graph=True)[0] for row in rows]
        (together,) = torch.autograd.grad(rows, leaf, torch.eye(len(rows)).to(rows), is_grads_batched=True)
        torch.testing.assert_close(together, torch.stack(one_by_one))
    function, logits = statistics(device)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(function, logits, vectorize=True),
        torch.autograd.functional.jacobian(function, logits),
    )


def test_compiled_transforms() -> None:
    """Per-sample gradients, compiled."""
    logits, target = draw(5, 7, None)
    per_sample = torch.func.vmap(torch.func.grad(cot_kernels.complement_entropy))
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), per_sample(logits, target))


def test_forward_mode_marks_targets_out_of_range() -> None:
    """Nothing looks at values there, on a CPU either."""
    logits, target = draw(3, 5, None)
    target[1] = 9
    for function in (
        lambda logits: cot_kernels.complement_entropy(logits, target, reduction="none"),
        lambda logits: cot_kernels.complement_statistics(logits, target).negentropy,
    ):
        value, _ = torch.func.jvp(function, (logits,), (torch.ones_like(logits),))
        assert value.isnan().tolist() == [False, True, False]


def test_an_empty_complement_under_forward_mode() -> None:
    logits = torch.tensor([[2.0, -torch.inf, -torch.inf], [1.0, 2.0, 3.0]])
    target = torch.zeros(2, dtype=torch.long)
    expected = cot_kernels.complement_statistics(logits, target)
    got, _ = torch.func.jvp(lambda z: tuple(cot_kernels.complement_statistics(z, target)), (logits,), (logits * 0,))
    assert expected.complement_lse[0] == -torch.inf
    torch.testing.assert_close(got, tuple(expected))
