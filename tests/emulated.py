"""The Triton backend on a GPU that is not there: its kernels compiled for one, and executed on the CPU by :mod:`ptx`.

``EMULATED_GPU=sm_90 python -m pytest -m gpu tests/test_layouts.py`` runs tests of the kernels so, in place of Triton's
interpreter: see :mod:`conftest`. NVIDIA's targets only.
"""

from __future__ import annotations

from typing import Any

import ptx
import torch
from torch import Tensor
from triton.runtime.driver import driver

from benchmarks.launches import KERNELS, Driver
from cot_kernels.backends.triton import backend


class Emulated:
    """Stands for a kernel of the backend: where it would be launched it is compiled for that, and executed."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
            memory = ptx.Memory()
            allocated: dict[int, tuple[int, torch.UntypedStorage]] = {}
            values: list[int | float] = []
            for name, kind in compiled.src.signature.items():
                value = given[name]
                if kind == "constexpr":
                    continue
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    first = storage.data_ptr()
                    # Where a GPU would have it: on a boundary, as here.
                    assert first % 16 == 0
                    if first not in allocated:
                        allocated[first] = (memory.allocate(bytes(storage.tolist())), storage)
                    value = allocated[first][0] + value.data_ptr() - first
                values.append(float(value) if kind == "fp64" else int(value))
            # In place, accesses that rows share are read by one program and written by another: what that writes is
            # no part of the row that the first is after.
            in_place = self.kernel.__name__ == "gradient_kernel" and given["grad_pointer"] is given["logits_pointer"]
            compiled_for = compiled.metadata
            ptx.launch(
                compiled.asm["ptx"], memory, values, grid[0], compiled_for.num_warps, compiled_for.shared,
                ordered=not in_place,
            )  # fmt: skip
            for start, storage in allocated.values():
                content = bytearray(memory.bytes[start : start + storage.nbytes()].tobytes())
                if content:
                    storage.copy_(torch.frombuffer(content, dtype=torch.uint8).untyped_storage())

        return launch


def install(target: str) -> None:
    """From here on the Triton backend takes tensors on the CPU and computes as a GPU of the target would."""
    driver.set_active(Driver(target))
    setattr(backend, "_pairs", lambda device: target == "sm_100")  # noqa: B010
    for name in KERNELS:
        setattr(backend, name, Emulated(getattr(backend, name)))
