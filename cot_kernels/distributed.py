"""Logits that are DTensors: every rank computes the rows it holds, and only a reduction communicates.

Rows are independent, so logits that are replicated or sharded along any dimension but the classes' need no more than
that. Nothing here imports torch.distributed before a DTensor has been seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def check(input: Any, target: Any) -> None:
    """Raises unless both are DTensors on one mesh and each row of the logits is whole on some rank."""
    for name, tensor, other in (("target", target, input), ("input", input, target)):
        if not is_dtensor(tensor):
            raise TypeError(
                f"{name} must be a DTensor where the other argument is one, got {type(tensor).__name__}: distribute it "
                f"over the same mesh, distribute_tensor({name}, {other.device_mesh}, ...)"
            )
    if input.device_mesh != target.device_mesh:
        raise ValueError(
            f"input and target must be on one device mesh, got {input.device_mesh} and {target.device_mesh}"
        )
    classes = min(1, input.dim() - 1)
    if any(_dim(placement, input) == classes for placement in input.placements):
        raise ValueError(
            f"input must not be sharded along its classes, dimension {classes}, got placements "
            f"{tuple(input.placements)}: each row must be whole on one rank. Shard the rows instead, or gather the "
            "classes with input.redistribute(placements=[Replicate()])"
        )


def by_rows(function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], input: Any, target: Any) -> tuple[Any, Any]:
    """``function`` of each rank's rows: its results, shaped like the target, as DTensors, and the target too."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = input.device_mesh
    # A sum that is still spread over the ranks is made whole; what is sharded stays where it is, its target with it.
    kept = [Replicate() if placement.is_partial() else placement for placement in input.placements]
    dims = [_dim(placement, input) for placement in kept]
    placements = [Replicate() if dim is None else Shard(max(dim - 1, 0)) for dim in dims]
    input, target = input.redistribute(placements=kept), target.redistribute(placements=placements)
    values = function(input.to_local(), target.to_local())
    layout = {"shape": target.shape, "stride": target.stride()}
    return tuple(DTensor.from_local(value, mesh, placements, run_check=False, **layout) for value in values), target


def replicate(tensor: Any) -> Any:
    """The sum of what the ranks hold, on every rank."""
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def _dim(placement: Any, tensor: Tensor) -> int | None:
    """The dimension that a placement shards, if it does."""
    dim = getattr(placement, "dim", None)
    return None if dim is None else int(dim) % tensor.dim()
