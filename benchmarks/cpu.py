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

PROVIDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "published": reference.complement_entropy,
    "F.cross_entropy": F.cross_entropy,
    "complement_entropy": cot_kernels.complement_entropy,
    "complement_entropy, eps=0": lambda input, target: cot_kernels.complement_entropy(input, target, eps=0.0),
    "complement_cross_entropy": cot_kernels.complement_cross_entropy,
}


def seconds(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, calls: int) -> list[float]:
    """Wall times of forward + backward; the first call of a round warms up and is not counted."""
    times = []
    for _ in range(calls + 1):
        logits.grad = None
        start = time.perf_counter()
        loss(logits, target).backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - start)
    return times[1:]


def measure(rows: int, classes: int, calls: int) -> dict[str, float]:
    """Median microseconds of each provider."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)
    times: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for _ in range(ROUNDS):
        for name, loss in PROVIDERS.items():
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [
        {"rows": rows, "classes": classes, "microseconds": measure(rows, classes, calls)}
        for rows, classes, calls in track(CASES, "measuring", console=Console(stderr=True))
    ]
    table = Table(title="forward + backward: times faster than the published operations (medians)")
    table.add_column("rows x classes")
    for name in PROVIDERS:
        table.add_column(name, justify="right")
    for result in results:
        times = result["microseconds"]
        assert isinstance(times, dict)
        ratios = (f"{times['published'] / value:.2f}" for value in times.values())
        table.add_row(f"{result['rows']} x {result['classes']}", *ratios)
    Console().print(table)
    if arguments.output:
        report = {"environment": environment(arguments.threads), "results": results}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
