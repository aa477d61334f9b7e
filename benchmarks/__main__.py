"""The benchmark suite: the losses beside the published operations, cross-entropies and a copy.

``python -m benchmarks --output FILE`` measures on the GPU where there is one, else on the CPU; a provider is timed only
after its loss and gradient have been held against float64. docs/performance.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import reports
from benchmarks.ahead import Job, compile_all, jobs, this_machine
from benchmarks.arguments import THREADS, device_argument, duration, output_file, thread_count
from benchmarks.cases import DTYPES, GPU_PARTS, PARTS, Case
from benchmarks.environment import environment
from benchmarks.gpu_state import state
from benchmarks.outcome import GPU_MINUTES
from benchmarks.progress import progress
from benchmarks.providers import PROVIDERS
from benchmarks.runner import Row, Settings, copy_bandwidth, run

# What is trained in comes first: a run that is out of time lacks the others.
GPU_DTYPES = ("bf16", "fp32", "fp16")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [provider.name for provider in PROVIDERS]
    parser.add_argument("--output", type=output_file, help="JSON file to write; FILE.partial until all cases are there")
    parser.add_argument("--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--part", choices=("small", "widths", "tokens", "cpu", "all"), default="all", help="which cases"
    )
    parser.add_argument("--quick", action="store_true", help="tiny cases, in seconds: does everything run?")
    parser.add_argument("--provider", choices=names, action="append", help="only this one (may be repeated)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only this one (may be repeated)")
    parser.add_argument("--threads", type=thread_count, default=THREADS, help="of PyTorch on the CPU")
    parser.add_argument("--seconds", type=duration, help="of a measurement; on a GPU 0.05, on the CPU 0.7")
    parser.add_argument("--minutes", type=duration, help=f"start nothing after this long; on a GPU {GPU_MINUTES:g}")
    return parser.parse_args(arguments)


def cases_of(part: str, quick: bool, on_gpu: bool) -> tuple[Case, ...]:
    if quick:
        return PARTS["quick"]
    if part != "all":
        return PARTS[part]
    return sum((PARTS[each] for each in GPU_PARTS), ()) if on_gpu else PARTS["cpu"]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device: torch.device = options.device
    on_gpu = device.type == "cuda"
    minutes = options.minutes if options.minutes is not None else GPU_MINUTES if on_gpu else math.inf
    settings = Settings(
        device,
        seconds=options.seconds or (0.005 if options.quick else 0.05 if on_gpu else 0.7),
        rounds=2 if options.quick else 7,
        roof_bytes=16 << 20 if options.quick else 1 << 30 if on_gpu else 256 << 20,
        deadline=time.monotonic() + 60 * minutes,
    )
    cases = cases_of(options.part, options.quick, on_gpu)
    dtypes = options.dtype or (GPU_DTYPES if on_gpu else ("fp32",))
    providers = [each for each in PROVIDERS if not options.provider or each.name in options.provider]
    about: dict[str, Any] = dict(environment(options.threads, options.device))
    if before := state(device):
        about["gpu_before"] = before

    written: set[tuple[str, str]] = set()  # cases, each in one dtype
    partial: Path | None = reports.beside(options.output) if options.output else None

    def save(report: dict[str, Any]) -> None:
        if partial:
            head = {key: value for key, value in report.items() if key != "results"}
            reports.write(partial, {"environment": about, **head}, map(_plain, report["results"]))
            written.update((row.case, row.dtype) for row in report["results"])

    ahead: list[Job] = []
    if on_gpu:
        ahead = jobs(this_machine(device), [case.shape for case in cases], dtypes, providers)
    try:
        with progress(len(ahead) + len(cases) * len(dtypes) * len(providers)) as advance:
            compile_all(ahead, settings.deadline, advance)
            report = run(cases, dtypes, providers, settings, advance, save)
        # The roof was measured before the first case: by how much has it moved?
        with contextlib.suppress(torch.OutOfMemoryError):
            report["copy_bandwidth_after"] = copy_bandwidth(settings)
        if after := state(device):
            about["gpu_after"] = after
        save(report)
    except KeyboardInterrupt:
        said = (
            f"{len(written)} of {len(cases) * len(dtypes)} cases are in {partial}" if written else "nothing is written"
        )
        print(f"stopped; {said}", file=sys.stderr)
        raise SystemExit(130) from None
    if partial:
        partial.replace(options.output.resolve())
    print("\n".join(table(report["results"])))
    for name, reason in report["missing"].items():
        print(f"missing: {name} ({reason})")
    return {"environment": about, **report}


def _plain(row: Row) -> dict[str, Any]:
    """As it is written: to five digits."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in asdict(row).items()}


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Forward and backward in eager mode, and whatever went wrong."""
    heads = ("case", "dtype", "provider", "p50 us", "of copy", "peak / logits", "error", "")
    shown = [heads]
    for row in rows:
        if row.status != "ok":
            shown.append((row.case, row.dtype, row.provider, "-", "-", "-", _short(row.gradient_error), _what(row)))
        elif row.mode == "both" and not row.graph and row.upstream != 1 and row.p50 and row.copy_share:
            size = row.rows * row.classes * DTYPES[row.dtype].itemsize
            shown.append(
                (row.case, row.dtype, row.provider, f"{row.p50:.1f}", f"{row.copy_share:.3f}",
                 f"{(row.peak_bytes or 0) / size:.1f}", _short(row.gradient_error), "")
            )  # fmt: skip
    widths = [max(len(line[column]) for line in shown) for column in range(len(heads))]
    for line in shown:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _what(row: Row) -> str:
    return f"{row.status}: {row.message}"


if __name__ == "__main__":
    main()
