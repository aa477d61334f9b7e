"""The Triton backend on a GPU that is not there: its kernels compiled for one, and executed on the CPU by :mod:`ptx`.

``EMULATED_GPU=sm_90 python -m pytest -m gpu tests/test_layouts.py`` runs tests of the kernels so, in place of Triton's
interpreter: see :mod:`conftest`. NVIDIA's targets only.
"""

from __future__ import annotations

from typing import Any

import ptx
import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from benchmarks.launches import KERNELS, TARGETS, Driver
from cot_kernels.backends.triton import backend, layout


class Emulated:
    """Stands for a kernel of the backend: where it would be launched it is compiled for that, and executed."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
            memory = ptx.Memory()
            allocated: dict[int, tuple[int, Tensor]] = {}
            values: list[int | float] = []
            for name, kind in compiled.src.signature.items():
                value = given[name]
                if kind == "constexpr":
                    continue
                if isinstance(value, Tensor):
                    storage = _bytes(value)
                    first = storage.data_ptr()
                    # Where a GPU would have it: on a boundary, as here.
                    assert first % 16 == 0
                    if first not in allocated:
                        allocated[first] = (memory.allocate(storage.numpy().tobytes()), storage)
                    value = allocated[first][0] + value.data_ptr() - first
                values.append(float(value) if kind == "fp64" else int(value))
            # In place, accesses that rows share are read by one program and written by another: what that writes is
            # no part of the row that the first is after. Nor do the two warps of one row wait for each other: what is
            # written class by class at its ends is written by a thread that has read it itself.
            in_place = self.kernel.__name__ == "gradient_kernel" and given["grad_pointer"] is given["logits_pointer"]
            compiled_for = compiled.metadata
            ptx.launch(
                compiled.asm["ptx"], memory, values, grid[0], compiled_for.num_warps, compiled_for.shared,
                ordered=not in_place,
            )  # fmt: skip
            for start, storage in allocated.values():
                storage.copy_(torch.from_numpy(memory.bytes[start : start + len(storage)]))

        return launch


def _bytes(tensor: Tensor) -> Tensor:
    """All that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _without_assembler(*stages: Any) -> tuple[str, str]:
    """Triton's hook into its pipeline, asked for a name of what it does, and then to do it: PTX is all that is needed,
    and the assembler takes as long as the rest."""
    if stages:
        stages[1]["cubin"] = lambda ptx, metadata: b""
    return "no assembler", "no assembler"


def install(target: str) -> None:
    """From here on the Triton backend takes tensors on the CPU and computes as a GPU of the target would."""
    if hasattr(knobs.runtime, "add_stages_inspection_hook"):  # from Triton 3.5 on
        knobs.runtime.add_stages_inspection_hook = _without_assembler
    driver.set_active(Driver(TARGETS[target]))
    setattr(layout, "_pairs", lambda device: target == "sm_100")  # noqa: B010
    for name in KERNELS:
        setattr(backend, name, Emulated(getattr(backend, name)))
