"""What a loss takes beside time: bytes held between the passes and at the peak, and launches on the GPU."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.providers import Loss

REPETITIONS = 3  # of a count


@dataclass(frozen=True)
class Memory:
    """Bytes above logits and target; the gradient is counted from when it is made."""

    held: int  # alive after the forward pass
    forward_peak: int
    peak: int  # of both passes


def memory(loss: Loss, logits: Tensor, target: Tensor) -> Memory:
    """Counted by the allocator, on a GPU, or from the profiler's record of each allocation, on the CPU."""
    count = _on_gpu if logits.is_cuda else _on_cpu
    loss(logits, target)  # what is loaded or compiled on the first call is not the loss's

    def forward() -> Tensor:
        return loss(logits, target)

    def both() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(logits, target), logits)
        return gradient

    held, forward_peak = _least(count(forward) for _ in range(REPETITIONS))
    _, peak = _least(count(both) for _ in range(REPETITIONS))
    return Memory(held, forward_peak, peak)


def _least(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Whatever else a process allocates meanwhile, in other threads or for good, only ever adds to a count."""
    alive, peak = zip(*counts, strict=True)
    return min(alive), min(peak)


def _on_gpu(step: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes alive at the end, with the result, and at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated() - before
    del result
    return after, torch.cuda.max_memory_allocated() - before


def _on_cpu(step: Callable[[], Tensor]) -> tuple[int, int]:
    """The same, of all that PyTorch allocates; these losses allocate a number for each block of rows beside it."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = step()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    found = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    del result
    return alive, peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Some builds of PyTorch report each start of the profiler on the standard error stream, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def launches(step: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that a step puts on the GPU; None where the machine's profiler sees none."""
    step()
    torch.cuda.synchronize()
    with _quiet(), profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    events = record.events() or []
    return sum(event.device_type == DeviceType.CUDA for event in events) or None
