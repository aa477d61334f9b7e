"""Forward and backward on this CPU: the fused losses beside the published operations and F.cross_entropy.

``python -m benchmarks.cpu --output FILE`` runs every provider in turn, several rounds in one process, and keeps the
median of each: single times on a shared machine say little, ratios of medians from one process say more.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import cot_kernels
from cot_kernels import reference

# (rows, classes, calls a round)
CASES = ((128, 10, 200), (256, 1000, 40), (4096, 100, 20), (1024, 1000, 15), (512, 32000, 3), (128, 151936, 3))
ROUNDS = 7

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

PROVIDERS: dict[str, Loss] = {
    "published": reference.complement_entropy,
    "F.cross_entropy": F.cross_entropy,
    "complement_entropy": cot_kernels.complement_entropy,
    "complement_entropy, eps=0": lambda input, target: cot_kernels.complement_entropy(input, target, eps=0.0),
    "complement_cross_entropy": cot_kernels.complement_cross_entropy,
}


def seconds(loss: Loss, logits: Tensor, target: Tensor, calls: int) -> list[float]:
    """Wall times of forward + backward; the first call of a round warms up and is not counted."""
    times = []
    for _ in range(calls + 1):
        logits.grad = None
        start = time.perf_counter()
        loss(logits, target).backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - start)
    return times[1:]


def measure(rows: int, classes: int, calls: int, providers: dict[str, Loss]) -> dict[str, float]:
    """Median microseconds of each provider."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(ROUNDS):
        for name, loss in providers.items():
            times[name] += seconds(loss, logits, target, calls)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def environment(threads: int) -> dict[str, str | int]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run(description: str, title: str, cases: tuple[tuple[int, int, int], ...], providers: dict[str, Loss]) -> None:
    """Measures every case, prints each provider's times beside the first one's, and writes them where told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measured = [
        (rows, classes, measure(rows, classes, calls, providers))
        for rows, classes, calls in track(cases, "measuring", console=Console(stderr=True))
    ]
    table = Table(title=title)
    table.add_column("rows x classes")
    for name in providers:
        table.add_column(name, justify="right")
    for rows, classes, times in measured:
        first = next(iter(times.values()))
        table.add_row(f"{rows} x {classes}", *(f"{first / value:.2f}" for value in times.values()))
    Console().print(table)
    if arguments.output:
        results = [{"rows": rows, "classes": classes, "microseconds": times} for rows, classes, times in measured]
        report = {"environment": environment(arguments.threads), "results": results}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    title = "forward + backward: times faster than the published operations (medians)"
    run(__doc__ or "", title, CASES, PROVIDERS)
