"""Compiles what a run is about to launch before anything is timed, on all cores.

Otherwise the kernels of a suite would be compiled one after the other, each when it is first called. Here they are
compiled for the GPU of this machine by processes that do not touch it, and found in Triton's cache later.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import DTYPES
from benchmarks.providers import PROVIDERS, Provider

if TYPE_CHECKING:
    from benchmarks.launches import Launch

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
    """Of one provider after the other: for one shape, they launch some of the same kernels."""
    names = [provider.name for provider in providers if provider.ours]
    return [Job(machine, shape, dtype, name) for name in names for dtype in dtypes for shape in shapes]


def kernels(job: Job, known: Container[str] = ()) -> list[Launch]:
    """Calls the loss on logits without data, and compiles where it would launch, but for what is known."""
    from benchmarks.launches import Driver, compiled_for  # Triton: only where there is a GPU
    from cot_kernels import autograd, dispatch
    from cot_kernels.backends.triton import backend, layout

    def both_passes(logits: Tensor, target: Tensor, *arguments: Any) -> Tensor:
        loss, saved = backend.loss(logits, target, *arguments)
        backend.gradient(logits, saved, torch.empty_like(loss))
        return loss

    (provider,) = (each for each in PROVIDERS if each.name == job.provider)
    logits = torch.empty(job.shape, dtype=DTYPES[job.dtype], device="meta")
    target = torch.empty(job.shape[:1] + job.shape[2:], dtype=torch.int64, device="meta")
    with (
        compiled_for(Driver(job.machine.target), known) as launched,
        mock.patch.object(layout, "multiprocessors", lambda _: job.machine.multiprocessors),
        mock.patch.object(dispatch, "_eager", lambda *_: True),
        mock.patch.object(autograd, "row_loss", both_passes),
    ):
        provider.load()(logits, target)
    return launched


def compile_job(job: Job) -> None:
    kernels(job)


def compile_all(work: Sequence[Job], deadline: float, advance: Callable[[str], None]) -> None:
    """What does not compile is left to the run, which will say so; and what is not begun by the deadline, of
    time.monotonic()."""
    left = deadline - time.monotonic()
    if not work or left <= 0:
        return
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(work))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        started = {pool.submit(compile_job, job): job for job in work}
        try:
            for each in as_completed(started, left if left < math.inf else None):
                advance(f"compiling {started[each].dtype}")
                with contextlib.suppress(Exception):
                    each.result()
        except TimeoutError:
            pool.shutdown(cancel_futures=True)
