"""Compiles what a run is about to launch before anything is timed, on all cores.

One after the other, when each is first called, the kernels of a suite take minutes to compile. Here they are compiled
for the GPU of this machine by processes that do not touch it, and found in Triton's cache later.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import DTYPES
from benchmarks.providers import PROVIDERS, Provider

MOST_PROCESSES = 16  # each imports torch


@dataclass(frozen=True)
class Machine:
    """The GPU that is compiled for."""

    target: Any  # triton.backends.compiler.GPUTarget
    multiprocessors: int


@dataclass(frozen=True)
class Job:
    """The kernels of a loss, both passes, for contiguous logits."""

    machine: Machine
    shape: tuple[int, ...]
    dtype: str
    provider: str


def this_machine(device: torch.device) -> Machine:
    from triton.runtime.driver import driver  # Triton: only where there is a GPU

    with torch.cuda.device(device):
        target = driver.active.get_current_target()
    return Machine(target, torch.cuda.get_device_properties(device).multi_processor_count)


def jobs(
    machine: Machine, shapes: Iterable[tuple[int, ...]], dtypes: Sequence[str], providers: Sequence[Provider]
) -> list[Job]:
    names = [provider.name for provider in providers if provider.ours]
    return [Job(machine, shape, dtype, name) for dtype in dtypes for shape in shapes for name in names]


def compile_job(job: Job) -> None:
    """Calls the loss on logits without data, and compiles where it would launch."""
    from benchmarks.launches import Driver, compiled_for
    from cot_kernels import autograd, functional
    from cot_kernels.backends.triton import backend

    def both_passes(logits: Tensor, target: Tensor, *arguments: Any) -> Tensor:
        loss, saved = backend.loss(logits, target, *arguments)
        backend.gradient(logits, saved, torch.empty_like(loss))
        return loss

    (provider,) = (each for each in PROVIDERS if each.name == job.provider)
    logits = torch.empty(job.shape, dtype=DTYPES[job.dtype], device="meta")
    target = torch.empty(job.shape[:1] + job.shape[2:], dtype=torch.int64, device="meta")
    with (
        compiled_for(Driver(job.machine.target)),
        mock.patch.object(backend, "_multiprocessors", lambda _: job.machine.multiprocessors),
        mock.patch.object(functional, "_eager", lambda *_: True),
        mock.patch.object(autograd, "row_loss", both_passes),
    ):
        provider.load()(logits, target)


def compile_all(work: Sequence[Job], advance: Callable[[str], None]) -> None:
    """What does not compile is left to the run, which will say so."""
    if not work:
        return
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(work))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        started = {pool.submit(compile_job, job): job for job in work}
        for each in as_completed(started):
            advance(f"compiling {started[each].dtype}")
            with contextlib.suppress(Exception):
                each.result()
