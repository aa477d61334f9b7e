"""Where a linear loss is put: traces, compiled code, autocast, checkpointing, other processes, transforms."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_problems import fused, gradients, problem, unfused
from oracle import relative_error
from torch import Tensor, nn

import cot_kernels


def test_a_traced_loss_can_be_differentiated_twice() -> None:
    """Or the gradient of a gradient penalty would be that of the loss alone, without a word."""
    input, weight, _, target = problem(rows=6, features=5, classes=9)

    def penalised(loss: Any) -> list[Tensor]:
        leaves = [each.detach().clone().requires_grad_() for each in (input, weight)]
        value = loss(*leaves)
        (gradient,) = torch.autograd.grad(value, leaves[0], create_graph=True)
        return list(torch.autograd.grad(value + gradient.square().sum(), leaves))

    def loss(input: Tensor, weight: Tensor) -> Any:
        return cot_kernels.linear_complement_cross_entropy(input, weight, target)

    expected = penalised(loss)
    for got, true in zip(penalised(torch.jit.trace(loss, (input, weight))), expected, strict=True):  # type: ignore[no-untyped-call]
        torch.testing.assert_close(got, true)


def test_any_budget_in_compiled_code() -> None:
    input, weight, _, target = problem(rows=6, features=5, classes=9)
    loss = partial(cot_kernels.linear_complement_cross_entropy, target=target, memory_budget=2**70)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input, weight), loss(input, weight))


@pytest.mark.parametrize("wide", [0, 1])
def test_autocast_leaves_float64_as_it_is(wide: int) -> None:
    """As torch.nn.functional.linear does, which then refuses other factors."""
    tensors = list(problem(rows=6, features=5, classes=9, dtype=torch.float32)[:2])
    tensors[wide] = tensors[wide].double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="which casts all but float64"):
        cot_kernels.linear_complement_cross_entropy(*tensors, torch.zeros(6, dtype=torch.int64))


def test_autocast() -> None:
    """The products in bfloat16, the sum of the weight's gradient in the weight's own float32."""
    *tensors, target = problem(rows=64, classes=200, dtype=torch.float32)
    _, true = gradients(unfused("complement cross-entropy"), *(each.double() for each in tensors), target=target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, got = gradients(fused("complement cross-entropy", memory_budget=200 * 2 * 16), *tensors, target=target)
        other, expected = gradients(unfused("complement cross-entropy"), *tensors, target=target)
    assert value.dtype == torch.float32 and all(each.dtype == torch.float32 for each in got)
    torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-3)
    for mine, others, truth in zip(got, expected, true, strict=True):
        assert 1e-5 < relative_error(mine, truth) <= 2 * relative_error(others, truth)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    input, weight, bias, target = problem()

    def loss(input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
        call = fused("complement cross-entropy")
        return torch.utils.checkpoint.checkpoint(
            lambda *args: call(*args[:2], target, linear_bias=args[2]),
            input,
            weight,
            linear_bias,
            use_reentrant=reentrant,
        )

    expected = gradients(fused("complement cross-entropy"), input, weight, bias, target=target)
    leaves = [each.requires_grad_() for each in (input, weight, bias)]
    value = loss(input, weight, target, bias)
    value.backward()
    torch.testing.assert_close((value, tuple(each.grad for each in leaves)), expected)


class LanguageModel(nn.Module):
    """An embedding that is the projection as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(37, 8)
        self.mix = nn.Linear(8, 8)
        self.double()

    def forward(self, words: Tensor, target: Tensor, fuse: bool) -> Tensor:
        hidden = self.mix(self.embedding(words)).tanh()
        loss = (fused if fuse else unfused)("complement cross-entropy")(hidden, self.embedding.weight, target)
        assert isinstance(loss, Tensor)
        return loss


def batch_of(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    words, target = (torch.randint(37, (9,), generator=generator) for _ in range(2))
    target[2:6:2] = -100  # as many on every rank: DistributedDataParallel averages the ranks' means
    return words, target


def _rank(rank: int, meeting_point: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=2)
    try:
        parallel = nn.parallel.DistributedDataParallel(LanguageModel())
        parallel(*batch_of(rank), fuse=True).backward()
        alone = LanguageModel()
        alone(*(torch.cat(each) for each in zip(batch_of(0), batch_of(1), strict=True)), fuse=False).backward()
        for got, expected in zip(parallel.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed support")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """The gradients of two processes are those of one with both batches; the weight is tied."""
    torch.multiprocessing.spawn(_rank, args=(f"file://{tmp_path}/meeting_point",), nprocs=2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(backend: str, reduction: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fused("complement cross-entropy", reduction=reduction), fullgraph=True, backend=backend)
    for rows in (9, 13):
        *tensors, target = problem(rows=rows, dtype=torch.float32)
        upstream = None if reduction == "mean" else torch.rand(rows)
        torch.testing.assert_close(
            gradients(compiled, *tensors, target=target, upstream=upstream),
            gradients(
                unfused("complement cross-entropy", reduction=reduction), *tensors, target=target, upstream=upstream
            ),
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False], [False, False, False]])
def test_the_operator_follows_its_own_rules(wanted: list[bool]) -> None:
    *tensors, target = problem(dtype=torch.float32)
    tensors = [each.requires_grad_(any(wanted)) for each in tensors] if all(wanted) or not any(wanted) else tensors
    arguments = (*tensors, target, None, -100, "cross_entropy", [1.0, 0.5], 4096, torch.float32, wanted)
    torch.library.opcheck(torch.ops.cot_kernels.linear_loss.default, arguments)


def test_transforms_take_the_unfused_way() -> None:
    input, weight, _, target = problem()
    loss = cot_kernels.linear_complement_cross_entropy
    torch.testing.assert_close(
        torch.func.grad(loss, argnums=(0, 1))(input, weight, target), gradients(loss, input, weight, target=target)[1]
    )
    rows = torch.func.vmap(partial(loss, reduction="sum"), in_dims=(0, None, 0))(input, weight, target)
    torch.testing.assert_close(rows, loss(input, weight, target, reduction="none"))
    _, derivative = torch.func.jvp(lambda x: loss(x, weight, target), (input,), (torch.ones_like(input),))
    torch.testing.assert_close(derivative, gradients(loss, input, weight, target=target)[1][0].sum())
    assert loss(input.to("meta"), weight.to("meta"), target.to("meta")).shape == ()
    parts = torch.func.vmap(partial(loss, reduction="sum", return_parts=True), in_dims=(0, None, 0))(
        input, weight, target
    )
    torch.testing.assert_close(parts.cross_entropy, loss(input, weight, target, gamma=0, reduction="none"))
