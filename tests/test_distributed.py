"""DTensor logits over two processes: replicated or sharded rows as on one; sharded classes refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cot_kernels

pytest.importorskip("torch.distributed.tensor")
if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed support", allow_module_level=True)

WORLD = 2
# Odd sizes, so that the ranks hold different numbers of rows, one of them none.
SHAPES = [(5, 7), (3, 7, 5), (1, 7), (7,)]
LOSSES = (cot_kernels.complement_entropy, cot_kernels.complement_cross_entropy)


def _problem(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    target = torch.randint(7, rows, generator=generator)
    if target.numel() > 1:
        target.view(-1)[1] = -100
    return logits, target


def _equal_to_one_process(shape: tuple[int, ...], reduction: str, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    logits, target = _problem(shape)
    placements: list[Any] = [Replicate(), Partial(), *(Shard(dim) for dim in range(len(shape)) if dim != 1)]
    if len(shape) == 1:
        del placements[2:]
    for loss in LOSSES:
        leaf = logits.clone().requires_grad_()
        expected = loss(leaf, target, reduction=reduction)
        (gradient,) = torch.autograd.grad(expected.sum(), leaf)
        for placement in placements:
            if placement.is_partial():
                spread = DTensor.from_local(logits / WORLD, mesh, [placement])
            else:
                spread = distribute_tensor(logits, mesh, [placement])
            spread.requires_grad_()
            value = loss(spread, distribute_tensor(target, mesh, [Replicate()]), reduction=reduction)
            value.sum().backward()
            torch.testing.assert_close(value.full_tensor(), expected)
            torch.testing.assert_close(spread.grad.full_tensor(), gradient)
            # The gradient stays where the logits are; torch 2.8 gathers one that is sharded along the last dimension.
            if placement.is_shard() and torch.__version__ >= (2, 9):
                assert spread.grad.placements == spread.placements
            if reduction != "none":
                assert value.placements == (Replicate(),)
    statistics = cot_kernels.complement_statistics(spread.detach(), distribute_tensor(target, mesh, [Replicate()]))
    for value, expected in zip(statistics, cot_kernels.complement_statistics(logits, target), strict=True):
        torch.testing.assert_close(value.full_tensor(), expected)


def _compiled(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    logits, target = (distribute_tensor(each, mesh, [Shard(0)]) for each in _problem((5, 7)))
    leaf = logits.requires_grad_()
    loss = torch.compile(cot_kernels.complement_entropy, fullgraph=True, backend="aot_eager")(leaf, target)
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = cot_kernels.complement_entropy(leaf, target)
    torch.testing.assert_close(loss.full_tensor(), expected.full_tensor())
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(gradient.full_tensor(), expected_gradient.full_tensor())


def _refusals(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    logits, target = torch.randn(4, 8), torch.arange(4)
    spread = distribute_tensor(target, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"input must not be sharded along its classes, dimension 1, got placements"):
        cot_kernels.complement_entropy(distribute_tensor(logits, mesh, [Shard(1)]), spread)
    with pytest.raises(ValueError, match="dimension 0, got placements"):
        cot_kernels.cross_entropy(distribute_tensor(logits[0], mesh, [Shard(0)]), distribute_tensor(target[0], mesh))
    with pytest.raises(TypeError, match="target must be a DTensor where the other argument is one, got Tensor"):
        cot_kernels.complement_entropy(distribute_tensor(logits, mesh, [Shard(0)]), target)
    other = init_device_mesh("cpu", (1, WORLD))
    with pytest.raises(ValueError, match="input and target must be on one device mesh, got "):
        cot_kernels.complement_entropy(distribute_tensor(logits, other, [Replicate()] * 2), spread)
    with pytest.raises(TypeError, match="input must be a DTensor where the other argument is one, got Tensor"):
        cot_kernels.complement_statistics(logits, spread)


def _rank(rank: int, meeting_point: str) -> None:
    from torch.distributed.tensor import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=WORLD)
    try:
        mesh = init_device_mesh("cpu", (WORLD,))
        for shape in SHAPES:
            for reduction in ("mean", "sum", "none"):
                _equal_to_one_process(shape, reduction, mesh)
        _compiled(mesh)
        _refusals(mesh)
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(f"file://{tmp_path}/meeting_point",), nprocs=WORLD)
