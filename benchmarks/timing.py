"""Times of a step, in seconds: CUDA events and CUDA graphs on a GPU, the host's clock on the CPU.

A step is a function of the number of the buffer that it works on. On a GPU buffers rotate. Those of a large case are
together larger than the cache, so that no call finds its logits where the one before left them; those of a small case,
of which there are no more than MOST_BUFFERS, stay in it: at 256 x 1000 in bfloat16, 31 MiB of an H200's 50 MB.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.providers import Loss

Step: TypeAlias = Callable[[int], object]

# Bytes of logits in rotation on a GPU: several times an L2 cache of 50 to 126 MB. On the CPU there is one buffer: the
# layer before has just written the logits, and they are as much in the cache as they fit.
ROTATION_BYTES = 512 << 20
# Small problems would need thousands of buffers, and never leave the cache in training either.
MOST_BUFFERS = 64

# One event pair spans calls for at least this long, so that what the events cost does not count.
_SPAN_SECONDS = 2e-4


@dataclass(frozen=True)
class Buffers:
    """Logits (leaves of autograd) and targets, as many pairs as are in rotation."""

    logits: tuple[Tensor, ...]
    target: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.logits)

    def refill(self, seed: int = 0) -> None:
        """Logits from N(0, 1), again, for a provider may have overwritten them."""
        generator = torch.Generator(self.logits[0].device).manual_seed(seed)
        with torch.no_grad():
            for logits in self.logits:
                logits.normal_(generator=generator)


def make_buffers(case: Case, dtype: torch.dtype, device: torch.device) -> Buffers:
    wanted = math.ceil(ROTATION_BYTES / case.logits_bytes(dtype)) if device.type == "cuda" else 1
    count = min(MOST_BUFFERS, wanted)
    generator = torch.Generator(device).manual_seed(1)
    buffers = Buffers(
        tuple(torch.empty(case.shape, dtype=dtype, device=device).requires_grad_() for _ in range(count)),
        tuple(torch.randint(case.classes, case.target_shape, generator=generator, device=device) for _ in range(count)),
    )
    buffers.refill()
    return buffers


def make_step(loss: Loss, buffers: Buffers, mode: str, upstream: float) -> Step:
    """A pass, or both. Results are kept until the buffer's next turn, so that what is written rotates as well.

    An upstream gradient of 1 is left to autograd, as ``loss.backward()`` leaves it.
    """
    results: list[Tensor | None] = [None] * len(buffers)

    def seed(value: Tensor) -> Tensor | None:
        return None if upstream == 1 else torch.full_like(value, upstream)

    def forward(index: int) -> None:
        results[index] = loss(buffers.logits[index], buffers.target[index]).detach()

    if mode == "forward":
        return forward

    given = seed(loss(buffers.logits[0], buffers.target[0]).detach())

    def both(index: int) -> None:
        value = loss(buffers.logits[index], buffers.target[index])
        (results[index],) = torch.autograd.grad(value, buffers.logits[index], given)

    if mode == "both":
        return both

    values = [loss(logits, target) for logits, target in zip(buffers.logits, buffers.target, strict=True)]

    def backward(index: int) -> None:
        (results[index],) = torch.autograd.grad(values[index], buffers.logits[index], given, retain_graph=True)

    return backward


def host_times(
    steps: Mapping[str, Step], buffers: int, rounds: int, seconds: float, most_calls: int = 200
) -> dict[str, list[float]]:
    """Wall times of calls, the steps taking turns: what else the machine does falls on all of them.

    A round gives each step about ``seconds`` divided by ``rounds``; its first call warms up and is not counted.
    """
    calls = {name: min(most_calls, _calls(step, seconds / rounds)) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for call in range(calls[name] + 1):
                start = time.perf_counter()
                step(call % buffers)
                elapsed = time.perf_counter() - start
                if call:
                    times[name].append(elapsed)
    return times


def _calls(step: Step, seconds: float) -> int:
    step(0)
    start = time.perf_counter()
    step(0)
    return max(1, round(seconds / max(time.perf_counter() - start, 1e-7)))


def device_times(step: Step, buffers: int, seconds: float) -> list[float]:
    """Seconds a call between CUDA events, calls queued without a wait: the slower of the host and the device.

    For a small problem that is what the host takes to launch, for a large one what the device takes to run.
    """
    for call in range(3):
        step(call % buffers)
    torch.cuda.synchronize()
    (once,) = _events(step, buffers, spans=1, calls=5)
    # Until the clocks are those of work: calls that are not counted, for a quarter of the time of those that are.
    _events(step, buffers, spans=1, calls=max(1, round(seconds / 4 / once)))
    calls = max(1, math.ceil(_SPAN_SECONDS / once))
    spans = min(200, max(5, round(seconds / (calls * once))))
    return _events(step, buffers, spans, calls)


def _events(step: Step, buffers: int, spans: int, calls: int) -> list[float]:
    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    pairs = [(event(), event()) for _ in range(spans)]
    index = 0
    for start, end in pairs:
        start.record()
        for _ in range(calls):
            step(index % buffers)
            index += 1
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 / calls for start, end in pairs]


def graph_times(make: Callable[[], Step], buffers: int, seconds: float) -> list[float]:
    """Seconds a call in replays of a CUDA graph that holds one call for each buffer: no launch is waited for.

    ``make`` is called on the capturing stream, where the backward passes of what it builds will run too. A step that
    waits for the device raises before anything is captured: a capture that breaks off would leave PyTorch's allocator
    in it, and what is kept for reuse is not given up any more.
    """
    torch.cuda.empty_cache()  # within a capture nothing can be given up for it
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step = make()
        step(0)  # what is loaded or compiled on the first call may wait
        with _waiting_is_an_error():
            for call in range(3):
                step(call % buffers)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for index in range(buffers):
                step(index)
    torch.cuda.current_stream().wait_stream(stream)
    times = device_times(lambda _: graph.replay(), 1, seconds)
    return [each / buffers for each in times]


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two values beside it."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
