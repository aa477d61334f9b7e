"""Runs providers on cases: correctness first, then time and memory; a provider that cannot run costs only its rows."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from benchmarks import correctness, resources, roof, timing
from benchmarks.cases import DTYPES, Case
from benchmarks.outcome import LATE, message_of
from benchmarks.providers import Loss, Provider

# Never 1 alone: some implementations form the gradient for an upstream of 1 and pay when it is another.
UPSTREAMS = (1.0, 0.37)
COPY = "copy"


@dataclass(frozen=True)
class Settings:
    device: torch.device
    seconds: float  # of timing for each measurement
    rounds: int  # on the CPU, where providers take turns
    roof_bytes: int
    deadline: float = math.inf  # of time.monotonic()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Measurement:
    mode: str
    upstream: float | None  # a forward pass has none
    graph: bool

    def __str__(self) -> str:
        seed = "" if self.upstream is None else f", upstream {self.upstream:g}"
        return f"{self.mode}{seed}{', CUDA graph' if self.graph else ''}"


@dataclass(frozen=True)
class Row:
    """A line of the results: times in microseconds, memory in bytes. None where it was not, or cannot be, measured.

    ``status``: "ok"; "wrong" (not what it claims to compute), "failed" (it raised) or "skipped", with a ``message``.
    """

    provider: str
    case: str
    shape: tuple[int, ...]
    rows: int
    classes: int
    dtype: str
    mode: str
    upstream: float | None = None
    graph: bool = False
    status: str = "ok"
    message: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    samples: int = 0
    buffers: int = 0
    counted_bytes: int | None = None
    gbps: float | None = None
    copy_share: float | None = None
    peak_bytes: int | None = None
    held_bytes: int | None = None
    launches: int | None = None
    gradient_error: float | None = None
    loss_error: float | None = None
    row_error: float | None = None  # of the gradient of the worst row


def about(case: Case) -> dict[str, Any]:
    return {"case": case.name, "shape": case.shape, "rows": case.rows, "classes": case.classes}


@dataclass
class Ready:
    """A provider that computes what it claims, with what every row of it says."""

    provider: Provider
    loss: Loss
    errors: dict[str, Any]
    memory: resources.Memory
    alive: bool = True  # until a measurement raises


def measurements(on_gpu: bool) -> tuple[Measurement, ...]:
    return tuple(
        Measurement(mode, upstream, graph)
        for graph in ((False, True) if on_gpu else (False,))
        for mode in ("forward", "backward", "both")
        for upstream in ((None,) if mode == "forward" else UPSTREAMS)
    )


def free_bytes(device: torch.device) -> int:
    """What may be allocated: a GPU's free memory and what PyTorch keeps unused, or the machine's available memory."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def missing(providers: Sequence[Provider], device: torch.device) -> dict[str, str]:
    """The providers that this machine does not have, and why."""
    found = {}
    for provider in providers:
        if provider.gpu_only and device.type != "cuda":
            found[provider.name] = "runs on a GPU only"
            continue
        try:
            provider.load()
        except (Exception, SystemExit) as error:  # another package may raise anything while it is imported, and leave
            found[provider.name] = message_of(error)
    return found


def copy_bandwidth(settings: Settings) -> dict[str, float | int]:
    """Gigabytes a second, read and written, of the copies of :mod:`.roof`; the faster one is the roof."""
    source = torch.randn(settings.roof_bytes // 2, device=settings.device).to(torch.bfloat16)
    destination = torch.empty_like(source)
    copies: dict[str, roof.Copy] = {"library": roof.library_copy}
    if settings.on_gpu:
        copies["kernel"] = roof.kernel_copy()
    found: dict[str, float | int] = {"bytes": settings.roof_bytes}
    for name, copy in copies.items():

        def step(_: int, copy: roof.Copy = copy) -> object:
            return copy(destination, source)

        times = _times({name: step}, 1, settings)[name]
        found[name] = 2 * source.numel() * source.itemsize / timing.quantile(times, 0.5) / 1e9
    return {**found, "roof": max(found[name] for name in copies)}


def _times(steps: Mapping[str, timing.Step], buffers: int, settings: Settings) -> dict[str, list[float]]:
    if settings.on_gpu:
        return {name: timing.device_times(step, buffers, settings.seconds) for name, step in steps.items()}
    return timing.host_times(steps, buffers, settings.rounds, settings.seconds)


class StepError(Exception):
    """A provider raised while it was timed, in turn with others."""

    def __init__(self, provider: str, error: Exception) -> None:
        super().__init__(provider)
        self.provider, self.error = provider, error


def _named(provider: str, step: timing.Step) -> timing.Step:
    def run(index: int) -> object:
        try:
            return step(index)
        except Exception as error:
            raise StepError(provider, error) from error

    return run


class CaseRun:
    """One case in one dtype: buffers, the truths that providers share, and the rows."""

    def __init__(self, case: Case, dtype: str, settings: Settings, bandwidth: float) -> None:
        self.case, self.dtype, self.settings, self.bandwidth = case, dtype, settings, bandwidth
        self.torch_dtype = DTYPES[dtype]
        self.size = case.logits_bytes(self.torch_dtype)
        self.buffers = timing.make_buffers(case, self.torch_dtype, settings.device)
        logits, target = self.buffers.logits[0], self.buffers.target[0]
        # It must not hold this object, whose buffers would then wait for the collector of reference cycles.
        self.truth = functools.cache(lambda formula: correctness.truth(formula, logits, target))

    def row(self, provider: str, mode: str, **values: Any) -> Row:
        return Row(provider=provider, dtype=self.dtype, mode=mode, **about(self.case), **values)

    def rows(self, providers: Sequence[Provider], advance: Callable[[str], None]) -> Iterator[Row]:
        ready: list[Ready] = []
        for provider in providers:
            advance(f"{self.case.name} {self.dtype}: {provider.name}")
            found = self.prepare(provider)
            if isinstance(found, Row):
                yield found
            elif self.settings.on_gpu:
                yield from self._in_turn([found])
            else:
                ready.append(found)
        yield from self._in_turn(ready)

    def prepare(self, provider: Provider) -> Ready | Row:
        """Loads, checks and weighs a provider; a row that says why where it cannot be timed."""
        if provider.rows_only and self.case.trailing:
            return self.row(provider.name, "both", status="skipped", message="takes (N, K) logits alone")
        if time.monotonic() > self.settings.deadline:
            return self.row(provider.name, "both", status="skipped", message=LATE)
        estimate = (provider.tensors + 1) * self.size
        if estimate > free_bytes(self.settings.device):
            text = f"would need about {estimate / 1e9:.0f} GB of memory"
            return self.row(provider.name, "both", status="skipped", message=text)
        logits, target = self.buffers.logits[0], self.buffers.target[0]
        try:
            loss = provider.load()
            found = correctness.errors(loss, logits, target, self.truth(provider.formula))
            errors = {"gradient_error": found.gradient, "loss_error": found.loss, "row_error": found.row}
            if not found.within(correctness.tolerance(self.torch_dtype, provider.rounds_operations)):
                text = "off its formula in float64, or not finite"
                return self.row(provider.name, "both", status="wrong", message=text, **errors)
            memory = resources.memory(loss, logits, target)
        except Exception as error:  # whatever another package raises, out of memory included
            return self.row(provider.name, "both", status="failed", message=message_of(error))
        finally:
            if provider.overwrites:
                self.buffers.refill()
        return Ready(provider, loss, errors, memory)

    def launches(self, providers: Sequence[Provider]) -> dict[str, int | None]:
        """Of both passes; None where the machine's profiler does not see them."""
        return {provider.name: self._launches(provider) for provider in providers}

    def _launches(self, provider: Provider) -> int | None:
        try:
            step = timing.make_step(provider.load(), self.buffers, "both", UPSTREAMS[1])
            return resources.launches(lambda: step(0))
        except Exception:  # it was timed, and its times stand
            return None
        finally:
            torch.cuda.empty_cache()

    def _in_turn(self, ready: list[Ready]) -> Iterator[Row]:
        for measurement in measurements(self.settings.on_gpu):
            yield from self._measure(measurement, [each for each in ready if each.alive])
        if self.settings.on_gpu:
            torch.cuda.empty_cache()  # the pools of the graphs

    def _measure(self, measurement: Measurement, ready: list[Ready]) -> Iterator[Row]:
        late = time.monotonic() > self.settings.deadline
        steps: dict[str, timing.Step] = {}
        times: dict[str, list[float]] = {}
        taking_part = {each.provider.name: each for each in ready if measurement.mode in each.provider.modes}
        for name, each in taking_part.items():
            if each.provider.overwrites:
                self.buffers.refill()
            make = functools.partial(
                timing.make_step, each.loss, self.buffers, measurement.mode, measurement.upstream or 1.0
            )
            try:
                if late:
                    raise TimeoutError(LATE)
                if measurement.graph:
                    times[name] = timing.graph_times(make, len(self.buffers), self.settings.seconds)
                    continue
                steps[name] = _named(name, make())
                steps[name](0)
            except Exception as error:
                steps.pop(name, None)
                each.alive = each.alive and measurement.graph  # what cannot be captured is still timed elsewhere
                status, text = "skipped" if late else "failed", message_of(getattr(error, "error", error))
                yield self._timed(each, measurement, None, status=status, message=text)
        while steps:
            try:
                times |= _times(steps, len(self.buffers), self.settings)
                break
            except StepError as error:  # on its second or hundredth call: the others are timed without it
                del steps[error.provider]
                each = taking_part[error.provider]
                each.alive = False
                yield self._timed(each, measurement, None, status="failed", message=message_of(error.error))
        for name, taken in times.items():
            yield self._timed(taking_part[name], measurement, taken)
        if any(each.provider.overwrites for each in ready):
            self.buffers.refill()

    def _timed(self, each: Ready, measurement: Measurement, times: list[float] | None, **values: Any) -> Row:
        memory = each.memory
        return self.row(
            each.provider.name,
            measurement.mode,
            upstream=measurement.upstream,
            graph=measurement.graph,
            peak_bytes=memory.forward_peak if measurement.mode == "forward" else memory.peak,
            held_bytes=memory.held,
            **each.errors,
            **self._speed(times, each.provider.passes(measurement.mode)),
            **values,
        )

    def _speed(self, times: list[float] | None, passes: int) -> dict[str, Any]:
        counted = passes * self.size
        if times is None:
            return {"counted_bytes": counted}
        median = timing.quantile(times, 0.5)
        quantiles = {f"p{share}": timing.quantile(times, share / 100) * 1e6 for share in (20, 50, 80)}
        gbps = counted / median / 1e9
        return {
            **quantiles,
            "samples": len(times),
            "buffers": len(self.buffers),
            "counted_bytes": counted,
            "gbps": gbps,
            "copy_share": gbps / self.bandwidth,
        }

    def copy(self) -> Iterator[Row]:
        copy = roof.kernel_copy() if self.settings.on_gpu else roof.library_copy
        sources = [logits.detach() for logits in self.buffers.logits]
        destinations = [torch.empty_like(source) for source in sources]

        def step(index: int) -> object:
            return copy(destinations[index], sources[index])

        times = _times({COPY: step}, len(sources), self.settings)[COPY]
        yield self.row(COPY, COPY, **self._speed(times, passes=2))
        if self.settings.on_gpu:
            times = timing.graph_times(lambda: step, len(sources), self.settings.seconds)
            yield self.row(COPY, COPY, graph=True, **self._speed(times, passes=2))


def run(
    cases: Sequence[Case],
    dtypes: Sequence[str],
    providers: Sequence[Provider],
    settings: Settings,
    advance: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The report: what is missing, the copy's bandwidth, and the rows. ``save`` is given it after every case, and last.

    All cases in one dtype, then in the next: where time runs out, no case is missing in the first. On a GPU providers
    that are slow to get ready come after the others of their dtype; on a CPU, where providers take turns, with them.
    """
    absent = missing(providers, settings.device)
    present = [provider for provider in providers if provider.name not in absent]
    copy = copy_bandwidth(settings)
    rows: list[Row] = []
    report = {"missing": absent, "copy_bandwidth": copy, "results": rows}
    slow = [provider for provider in present if settings.on_gpu and provider.slow]
    turns = [[provider for provider in present if provider not in slow], slow]
    for dtype, (turn, some), case in itertools.product(dtypes, enumerate(turns if slow else turns[:1]), cases):
        if time.monotonic() > settings.deadline:
            late: dict[str, Any] = {"dtype": dtype, "status": "skipped", "message": LATE, **about(case)}
            rows.extend([Row(COPY, mode=COPY, **late)] if turn == 0 else [])
            rows.extend(Row(provider.name, mode="both", **late) for provider in some)
            continue
        rows.extend(_rows_of(case, dtype, some, settings, copy["roof"], turn == 0, advance))
        save(report)
    names, providers_in_order = [case.name for case in cases], [COPY, *(provider.name for provider in present)]
    rows.sort(key=lambda row: (dtypes.index(row.dtype), names.index(row.case), providers_in_order.index(row.provider)))
    if settings.on_gpu:
        # Last: where it has looked once, the profiler slows every launch after.
        _count_launches(rows, cases, dtypes, present, settings)
    save(report)  # with the cases that there was no time for
    return report


def _rows_of(
    case: Case,
    dtype: str,
    providers: Sequence[Provider],
    settings: Settings,
    bandwidth: float,
    with_copy: bool,
    advance: Callable[[str], None],
) -> list[Row]:
    rows: list[Row] = []
    try:
        of_case = CaseRun(case, dtype, settings, bandwidth)
        rows.extend(of_case.copy() if with_copy else ())
        # A compiled backward pass must be able to run again on what its forward pass saved.
        with torch._functorch.config.patch(donated_buffer=False):
            rows.extend(of_case.rows(providers, advance))
    except torch.OutOfMemoryError as error:  # the logits themselves, or what a copy is written to
        failed: dict[str, Any] = {"dtype": dtype, "status": "failed", "message": message_of(error), **about(case)}
        there = {row.provider for row in rows}
        rows.extend([Row(COPY, mode=COPY, **failed)] if with_copy and COPY not in there else [])
        rows.extend(Row(each.name, mode="both", **failed) for each in providers if each.name not in there)
    return rows


def _count_launches(
    rows: list[Row], cases: Sequence[Case], dtypes: Sequence[str], providers: Sequence[Provider], settings: Settings
) -> None:
    """Adds them to the rows that have a time, as long as there is time."""
    for dtype in dtypes:
        for case in cases:
            of_case = [row for row in rows if (row.case, row.dtype) == (case.name, dtype)]
            timed = {row.provider for row in of_case if row.p50 is not None}
            if not timed or time.monotonic() > settings.deadline:
                continue
            of_timed = [each for each in providers if each.name in timed]
            found = CaseRun(case, dtype, settings, math.inf).launches(of_timed)
            for index, row in enumerate(rows):
                if (row.case, row.dtype) == (case.name, dtype) and row.p50 is not None:
                    rows[index] = replace(row, launches=found.get(row.provider))
