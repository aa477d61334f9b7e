"""The kernels alone on a GPU, against the number of classes: what the predictions of :mod:`.widths` are held against.

``python -m benchmarks.kernels --output FILE`` times, between CUDA events, launches of the statistics and of the
gradient kernel for 2^28 logits: rows that adjoin, and class-major logits of 512 x 512 places. Of each it says the share
of the bandwidth of the fastest copy in the same run: one read forward, a read and a write backward; of both passes with
all launches of the loss, three passes over the logits. Of some widths the kernel of the linear losses is timed too,
which reads and writes private logits in place.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import reports, timing
from benchmarks.ahead import Job, compile_all, this_machine
from benchmarks.arguments import device_argument, duration, output_file
from benchmarks.cases import DTYPES
from benchmarks.environment import environment
from benchmarks.goals import COT
from benchmarks.outcome import GPU_MINUTES, LATE, message_of
from benchmarks.progress import progress
from benchmarks.runner import Settings, copy_bandwidth
from cot_kernels.objectives import ComplementEntropyObjective, CrossEntropyObjective

LOGITS = 1 << 28
PLACES = 512 * 512
ROWS = (
    10, 13, 21, 32, 33, 64, 100, 101, 128, 256, 257, 512, 1000, 1001, 2000, 2035, 2056, 3000, 4096, 8192, 16384, 32000,
    50257, 50264, 50304, 128256,
)  # fmt: skip
CLASS_MAJOR = (10, 21, 150)
IN_PLACE = (256, 1000, 2056, 4096, 50257, 128256)
LAYOUTS = {"rows": ROWS, "class-major": CLASS_MAJOR}
GPU_DTYPES = ("bf16", "fp32")

Case = tuple[str, int, str]  # layout, classes, dtype


def shape_of(layout: str, classes: int) -> tuple[int, ...]:
    """As near to so many logits as whole rows come, or planes."""
    if layout == "rows":
        return max(1, LOGITS // classes), classes
    return max(1, LOGITS // (classes * PLACES)), classes, PLACES


def measure(case: Case, device: torch.device, seconds: float, bandwidth: float) -> dict[str, Any]:
    """Medians of microseconds, and shares of the bandwidth, in bytes a second."""
    from cot_kernels.backends.triton import backend

    layout, classes, dtype = case
    shape = shape_of(layout, classes)
    logits = torch.randn(shape, device=device).to(DTYPES[dtype])
    target = torch.randint(classes, shape[:1] + shape[2:], device=device)
    objective = ComplementEntropyObjective(1.0, 1e-7)
    upstream = torch.ones((), device=device)
    backend.forward_plans.clear()
    backend.gradient_plans.clear()
    _, saved = backend.loss(logits, target, -100, objective, "mean")
    gradient = backend.gradient(logits, saved, upstream)
    (forward,), (backward,) = backend.forward_plans.values(), backend.gradient_plans.values()
    flat, state = saved
    assert forward.parts is None
    index = logits.get_device()
    steps: dict[str, timing.Step] = {
        "forward": lambda _: forward.rows[0](index, logits, flat, state, state),
        "backward": lambda _: backward(index, logits, flat, state, upstream, gradient),
        "loss": lambda _: backend.loss(logits, target, -100, objective, "mean"),
    }
    if layout == "rows" and classes in IN_PLACE:
        per_access = 16 // logits.itemsize
        private = logits.new_empty(shape[0], -(-classes // per_access) * per_access)[:, :classes].copy_(logits)
        mixed = CrossEntropyObjective(1.0, 0.5)
        # What it has written is read the next time: numbers like any other.
        steps["in_place"] = lambda _: backend.value_and_gradient(private, target, -100, mixed, None, True)
    times = {name: timing.quantile(timing.device_times(step, 1, seconds), 0.5) for name, step in steps.items()}
    size = logits.numel() * logits.itemsize
    return {
        "layout": layout,
        "classes": classes,
        "dtype": dtype,
        "rows": target.numel(),
        **{f"{name}_us": round(taken * 1e6, 2) for name, taken in times.items()},
        "forward_share": round(size / times["forward"] / bandwidth, 4),
        "backward_share": round(2 * size / times["backward"] / bandwidth, 4),
        **({"in_place_share": round(2 * size / times["in_place"] / bandwidth, 4)} if "in_place" in times else {}),
        "both_share": round(3 * size / (times["loss"] + times["backward"]) / bandwidth, 4),
    }


def run(
    cases: Sequence[Case], device: torch.device, seconds: float, bandwidth: float, deadline: float
) -> Iterator[dict[str, Any]]:
    """A row a case; one that fails, or for which no time is left, says so and costs no other."""
    machine = this_machine(device)
    ahead = [Job(machine, shape_of(layout, classes), dtype, COT) for layout, classes, dtype in cases]
    with progress(len(ahead) + len(cases)) as advance:
        compile_all(ahead, deadline, advance)
        for case in cases:
            advance("{}, {} classes, {}".format(*case))
            about = dict(zip(("layout", "classes", "dtype"), case, strict=True))
            if time.monotonic() > deadline:
                yield {**about, "message": LATE}
                continue
            try:
                yield measure(case, device, seconds, bandwidth)
            except Exception as error:  # out of memory, or whatever a compiler raises
                yield {**about, "message": message_of(error)}
            torch.cuda.empty_cache()


def draw(results: Sequence[dict[str, Any]], environment: dict[str, Any], path: Path) -> None:
    """Beside the predictions for that GPU, where the committed ones have it."""
    from benchmarks.plots import about, kernels, write  # Matplotlib: only where a figure is wanted

    predictions = reports.read(reports.RESULTS / "widths.json")["results"]
    of_this = [row for row in predictions if row["gpu"] in environment["device"].split()]
    write(kernels(results, of_this, about([environment])), path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--figure", type=output_file, help="PNG file to write")
    parser.add_argument("--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only this one (may be repeated)")
    parser.add_argument("--seconds", type=duration, default=0.05, help="of a measurement")
    parser.add_argument("--minutes", type=duration, default=GPU_MINUTES, help="start nothing after this long")
    options = parser.parse_args(arguments)
    device: torch.device = options.device
    if device.type != "cuda":
        parser.error("measures a GPU, and PyTorch sees none here: benchmarks.widths predicts without one")
    deadline = time.monotonic() + 60 * options.minutes
    copy = copy_bandwidth(Settings(device, options.seconds, 1, 1 << 30))
    cases = [
        (layout, classes, dtype)
        for dtype in options.dtype or GPU_DTYPES
        for layout, widths in LAYOUTS.items()
        for classes in widths
    ]
    results = list(run(cases, device, options.seconds, copy["roof"] * 1e9, deadline))
    about = {**environment(1, device), "copy_gbps": round(copy["roof"])}
    if options.output:
        reports.write(options.output, {"environment": about}, results)
    if options.figure:
        draw(results, about, options.figure)
    for row in results:
        said = row.get("message") or " ".join(
            f"{name} {row[f'{name}_share']:.2f}" for name in ("forward", "backward", "both")
        )
        print(f"{row['dtype']}, {row['layout']}, {row['classes']} classes: {said}")


if __name__ == "__main__":
    main()
