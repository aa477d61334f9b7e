"""How time and memory grow with the number of rows and of classes, over four orders of magnitude, on this CPU.

``python -m benchmarks.growth --output FILE --figure FILE`` measures forward and backward in float32 along rows, at 100
classes, and along classes, at 100 rows. What is linear has a slope of 1 on the figure's axes; small problems lie above
it, at what a call costs by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from torch.nn import functional as F

import cot_kernels
from benchmarks import reports, resources, timing
from benchmarks.arguments import THREADS, duration, output_file, thread_count
from benchmarks.cases import Case
from benchmarks.environment import environment
from benchmarks.progress import progress
from benchmarks.providers import Loss
from cot_kernels import reference

SIZES = tuple(round(10 ** (quarter / 4)) for quarter in range(4, 21))  # 10 to 100,000
FIXED = 100  # classes along rows, rows along classes
ROUNDS = 5
SECONDS = 0.3

LOSSES: dict[str, Loss] = {
    "published": reference.complement_entropy,
    "F.cross_entropy": F.cross_entropy,
    "complement_entropy": cot_kernels.complement_entropy,
}


def case_of(along: str, size: int) -> Case:
    return Case(size, FIXED) if along == "rows" else Case(FIXED, size)


def measure(along: str, size: int, seconds: float) -> list[dict[str, Any]]:
    """Microseconds of forward and backward, peak bytes beside the logits and page faults a call, of each loss."""
    case = case_of(along, size)
    buffers = timing.make_buffers(case, torch.float32, torch.device("cpu"))
    steps = {name: timing.make_step(loss, buffers, "both", 0.37) for name, loss in LOSSES.items()}
    times = timing.host_times(steps, len(buffers), ROUNDS, seconds)
    found: list[dict[str, Any]] = []
    for name, loss in LOSSES.items():
        memory = resources.memory(loss, buffers.logits[0], buffers.target[0])
        faults = page_faults(steps[name])
        quantiles = {f"p{share}": timing.quantile(times[name], share / 100) * 1e6 for share in (20, 50, 80)}
        about = {"provider": name, "along": along, "rows": case.rows, "classes": case.classes}
        weighed = {"peak_bytes": memory.peak, "held_bytes": memory.held, "page_faults": faults}
        found.append({**about, **quantiles, **weighed})
    return found


def page_faults(step: timing.Step, calls: int = 3) -> int:
    """Pages a call that the system gives anew, without reading a disk: it writes zeros to each first.

    Memory that the allocator keeps costs none. What glibc keeps is never of a tensor of more than 32 MiB.
    """
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        step(0)
    return round((getrusage(RUSAGE_SELF).ru_minflt - before) / calls)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--figure", type=output_file, help="PNG file to write")
    parser.add_argument("--threads", type=thread_count, default=THREADS)
    parser.add_argument("--seconds", type=duration, default=SECONDS, help="for each loss at each size")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    points = [(along, size) for along in ("rows", "classes") for size in SIZES]
    results: list[dict[str, Any]] = []
    with progress(len(points)) as advance:
        for along, size in points:
            advance(case_of(along, size).name)
            results.extend(measure(along, size, options.seconds))
    measured_on = environment(options.threads)
    if options.output:
        reports.write(options.output, {"environment": measured_on}, results)
    if options.figure:
        from benchmarks.plots import about, growth, write  # Matplotlib: only where a figure is wanted

        write(growth(results, about([measured_on])), options.figure)


if __name__ == "__main__":
    main()
