"""What a call costs by the way it takes: the autograd Function of eager mode, the registered operator, and compiled.

``python -m benchmarks.dispatch --output FILE`` measures complement_entropy forward and backward on this CPU: medians of
rounds in which the ways take turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cot_kernels
from benchmarks import timing
from benchmarks.arguments import duration, output_file, thread_count
from benchmarks.cases import Case
from benchmarks.environment import environment
from benchmarks.progress import progress
from benchmarks.providers import Loss
from cot_kernels import operators
from cot_kernels.objectives import ComplementEntropyObjective

CASES = (Case(128, 10), Case(256, 1000), Case(1024, 1000), Case(512, 32000))
ROUNDS = 7
SECONDS = 1.0  # for each way of each case


def by_operator(input: Tensor, target: Tensor) -> Tensor:
    return operators.loss(input, target, -100, ComplementEntropyObjective(1 / input.shape[1], 1e-7), "mean")


WAYS: dict[str, Loss] = {
    "eager": cot_kernels.complement_entropy,
    "operator": by_operator,
    "compiled": torch.compile(cot_kernels.complement_entropy, fullgraph=True, dynamic=False),
}


def measure(case: Case, seconds: float) -> dict[str, float]:
    """Median microseconds of each way."""
    buffers = timing.make_buffers(case, torch.float32, torch.device("cpu"))
    steps = {name: timing.make_step(loss, buffers, "both", 1.0) for name, loss in WAYS.items()}
    times = timing.host_times(steps, len(buffers), ROUNDS, seconds)
    return {name: timing.quantile(taken, 0.5) * 1e6 for name, taken in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--threads", type=thread_count, default=2)
    parser.add_argument("--seconds", type=duration, default=SECONDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    measured: list[dict[str, float]] = []
    with progress(len(CASES)) as advance:
        for case in CASES:
            advance(case.name)
            measured.append(measure(case, options.seconds))
    table = Table("rows x classes", *WAYS, title="forward + backward: times faster than eager mode (medians)")
    for case, taken in zip(CASES, measured, strict=True):
        table.add_row(case.name, *(f"{taken['eager'] / each:.2f}" for each in taken.values()))
    Console().print(table)
    if options.output:
        results = [
            {"rows": case.rows, "classes": case.classes, "microseconds": taken}
            for case, taken in zip(CASES, measured, strict=True)
        ]
        report = {"environment": environment(options.threads), "results": results}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
