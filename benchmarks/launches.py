"""The kernels that the backend launches, compiled for GPUs that need not be there.

The backend is called as the losses call it, on logits without data. What it launches is handed to Triton with the
very arguments, and compiled for what Triton specializes those on: integers that are 1 or that 16 divides, aligned
pointers, 32 or 64 bits. It must run without TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import FileCacheManager
from triton.runtime.driver import driver

from cot_kernels.backends.triton import backend, launch
from cot_kernels.backends.triton import layout as memory_layout
from cot_kernels.backends.triton.prepared import Plans
from cot_kernels.objectives import (
    ComplementEntropyObjective,
    CrossEntropyObjective,
    GuidedComplementEntropyObjective,
    Objective,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Not taken from benchmarks.cases: the compile report goes by a digest of this file, and that one holds much else.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
OBJECTIVES: dict[str, Objective] = {
    "complement_entropy": ComplementEntropyObjective(1.0, 1e-7),
    "guided_complement_entropy": GuidedComplementEntropyObjective(1.0, 1e-7, 0.2),
    "cross_entropy": CrossEntropyObjective(1.0, -0.5),
}
LOGITS = 2**28  # where rows are many: the size from which on memory is what a loss is held against
FEW = 64  # rows: of so few long ones, several programs share one

# How the logits lie. Rows of up to 4 KiB are read whole, on NVIDIA GPUs in 16 bits of up to 8 KiB, and those of up to
# 2 KiB several by a program; longer ones tile after tile, and few of them by several programs each.
Layout: TypeAlias = Literal[
    "short",  # each begins on a 16-byte boundary
    "short, odd",  # anywhere
    "short, sliced",  # of a wider tensor: each begins on a boundary, and none ends on one; long ones are as odd ones
    "long",
    "long, odd",
    "class-major",  # (N, K, d1, d2), sizes that 16 divides
    "class-major, odd",
]

# Of what the launch table holds, every number of lanes a row, with the most pieces, and with the fewest, of which the
# last one is nearly empty.
CLASSES: dict[Layout, tuple[int, ...]] = {
    "short": (8, 16, 32, 64, 128, 256, 264, 512, 520, 1000, 1032, 2048, 2056, 4096),
    "short, odd": (5, 9, 25, 57, 121, 249, 257, 505, 513, 1001, 1033, 2041, 2049, 4089),
    "short, sliced": (10, 1001, 2041),
    "long": (2056, 4096, 4104, 128256),
    "long, odd": (5001, 50257),
    "class-major": (21,),
    "class-major, odd": (21,),
}

# What the losses do: a reduction, forward and backward; the differentiable statistics; and, for private logits, whose
# rows all begin on a boundary, both passes in place, with an upstream gradient or without, or the values alone.
Call: TypeAlias = Literal["mean", "sum", "none", "statistics", "in place", "in place, upstream", "values"]


@dataclass(frozen=True)
class Case:
    """A call of the backend."""

    call: Call
    layout: Layout
    classes: int
    dtype: str
    target: str
    objective: str
    few: bool = False  # rows

    @property
    def rows(self) -> int:
        return FEW if self.few else -(-LOGITS // self.classes // 16) * 16


@dataclass(frozen=True)
class Launch:
    """A kernel that was launched: what was compiled, and the arguments and constants it was given."""

    kernel: str
    arguments: dict[str, Any]
    hash: str  # Triton's, of all that it is compiled from, and of the compiler
    compiled: Any  # triton.compiler.CompiledKernel; None of one that is known


def cases(target: str) -> Iterator[Case]:
    """Each tile and dtype under one objective; each objective and call on a short and a long row.

    fp16 takes the tiles of bf16, and fp64, which is for checking gradients, is compiled for one target: one number of
    classes of each layout. What follows a row's statistics depends on the logits only through the precision it is
    computed in, so bf16 and fp64 stand for all dtypes there.
    """
    for dtype in DTYPES if target == "sm_90" else [each for each in DTYPES if each != "fp64"]:
        for layout in CLASSES:
            every = _fitting(layout, dtype, target)
            for classes in every if dtype in ("fp32", "bf16") else every[-1:]:
                yield Case("mean", layout, classes, dtype, target, "complement_entropy")
                whole = layout in ("short", "short, odd") and classes in _fitting(layout, dtype, target, in_place=True)
                if whole or layout in ("long", "long, odd"):
                    yield Case("in place", layout, classes, dtype, target, "cross_entropy")
        for layout in ("long", "long, odd"):
            yield Case("mean", layout, CLASSES[layout][-1], dtype, target, "complement_entropy", few=True)
        if dtype in ("bf16", "fp64"):
            yield from _calls(dtype, target)


def _fitting(layout: Layout, dtype: str, target: str, *, in_place: bool = False) -> list[int]:
    """The numbers of classes of which rows are short in one dtype, or on one target, are long in or on another."""
    itemsize = DTYPES[dtype].itemsize
    most = launch.longest_whole(itemsize, TARGETS[target].warp_size, in_place=in_place) // itemsize
    if layout.startswith("short"):
        return [classes for classes in CLASSES[layout] if classes <= most]
    return [classes for classes in CLASSES[layout] if classes > most or layout != "long"]


def _calls(dtype: str, target: str) -> Iterator[Case]:
    short, long = 1000 if dtype == "bf16" else _fitting("short", dtype, target)[-1], CLASSES["long"][-1]
    for objective in OBJECTIVES:
        for usual in (
            Case("mean", "short", short, dtype, target, objective),
            Case("mean", "long", long, dtype, target, objective),
            Case("mean", "long", long, dtype, target, objective, few=True),
        ):
            yield usual
            yield replace(usual, call="none")
            if not usual.few:
                yield replace(usual, call="in place")
                yield replace(usual, call="in place, upstream")
    for usual in (
        Case("statistics", "short", short, dtype, target, "complement_entropy"),
        Case("statistics", "long", long, dtype, target, "complement_entropy"),
    ):
        yield from (usual, replace(usual, call="sum"), replace(usual, call="values"))
    yield Case("statistics", "long", long, dtype, target, "complement_entropy", few=True)


def _logits(case: Case) -> Tensor:
    shape: tuple[int, ...] = (case.rows, case.classes)
    if case.layout.startswith("class-major"):
        shape = (8, case.classes, 512 * 512 if case.layout == "class-major" else 511 * 511)
    logits = torch.empty(shape, dtype=DTYPES[case.dtype], device="meta")
    private = case.call.startswith("in place") or case.call == "values"
    if not private and not case.layout.endswith("sliced"):
        return logits
    per_access = 16 // logits.itemsize
    wide = -(-case.classes // per_access) * per_access
    return logits.new_empty((case.rows, wide))[:, : case.classes]


def _call(case: Case) -> None:
    logits = _logits(case)
    rows = logits.shape[0] * (logits.shape[2] if logits.dim() == 3 else 1)
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    objective = OBJECTIVES[case.objective]
    if case.call in ("mean", "sum", "none"):
        loss, saved = backend.loss(logits, target, -100, objective, case.call)
        backend.gradient(logits, saved, torch.empty_like(loss))
    elif case.call == "statistics":
        *outputs, kept = backend.statistics(logits, target, -100)
        backend.statistics_gradient(logits, kept, *outputs)
    else:
        upstream = torch.empty(rows, device="meta") if case.call == "in place, upstream" else None
        backend.value_and_gradient(logits, target, -100, objective, upstream, case.call != "values")


class Driver:
    """Stands for a GPU of a target: Triton's compiler asks the driver for no more than this."""

    def __init__(self, target: GPUTarget, number: int = 0) -> None:
        self.target, self.number = target, number

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiling:
    """Stands for a kernel of the backend, and compiles it where it would be launched."""

    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
            name = self.kernel.__name__.removesuffix("_kernel")
            try:
                compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            except _KnownError as known:
                self.found.append(Launch(name, given, known.hash, None))
            else:
                self.found.append(Launch(name, given, compiled.hash, compiled))

        return launch


class _KnownError(Exception):
    """A kernel need not be compiled."""

    def __init__(self, hash: str) -> None:
        super().__init__(hash)
        self.hash = hash


def _manager_that_knows(known: Container[str]) -> type[FileCacheManager]:
    """Of Triton's cache, which is asked for a kernel by its hash before it is compiled."""

    class Manager(FileCacheManager):  # type: ignore[misc]
        def __init__(self, key: str, *arguments: Any, **options: Any) -> None:
            hash = base64.b32decode(key + "=" * (-len(key) % 8)).hex()
            if hash in known:
                raise _KnownError(hash)
            super().__init__(key, *arguments, **options)

    return Manager


KERNELS = (
    "statistics_kernel",
    "split_kernel",
    "merge_kernel",
    "fold_kernel",
    "reduce_kernel",
    "gradient_kernel",
    "value_and_gradient_kernel",
)


@contextlib.contextmanager
def compiled_for(instead: Driver, known: Container[str] = ()) -> Iterator[list[Launch]]:
    """What the backend launches meanwhile is compiled for a GPU that need not be there, and told; of kernels whose hash
    is known the hash alone."""
    found: list[Launch] = []
    replaced: dict[str, Any] = {name: _Compiling(getattr(backend, name), found) for name in KERNELS}
    hip = instead.target.backend == "hip"
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(backend, forward_plans=Plans(), gradient_plans=Plans(), **replaced))
        stack.enter_context(
            mock.patch.object(memory_layout, "_capability", lambda _: 0 if hip else instead.target.arch // 10)
        )
        stack.enter_context(mock.patch.object(torch.version, "hip", "7" if hip else None))
        if known:
            stack.enter_context(knobs.cache.scope())
            knobs.cache.manager_class = _manager_that_knows(known)
        driver.set_active(instead)  # for good: there may be no other to set back
        yield found


def launches(case: Case, known: Container[str] = ()) -> list[Launch]:
    """The kernels that a call launches, in their order; those whose hash is known are not compiled."""
    with compiled_for(Driver(TARGETS[case.target], list(TARGETS).index(case.target)), known) as found:
        _call(case)
    return found
