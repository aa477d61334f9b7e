"""The copy that bounds every kernel that streams: its bandwidth is the roof of the run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

_BLOCK = 8192

Copy = Callable[[Tensor, Tensor], object]


def library_copy(destination: Tensor, source: Tensor) -> Tensor:
    return destination.copy_(source)


def kernel_copy() -> Copy:
    """A Triton kernel that does nothing but copy: how far Triton's own streaming loop gets.

    Triton is looked up when it is asked for: the CPU suite runs without it.
    """
    triton = importlib.import_module("triton")
    kernel: Any = importlib.import_module("benchmarks.copy_kernel").copy_kernel

    def copy(destination: Tensor, source: Tensor) -> None:
        count = source.numel()
        kernel[(triton.cdiv(count, _BLOCK),)](destination, source, count, BLOCK=_BLOCK, num_warps=8)

    return copy
