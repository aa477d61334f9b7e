"""Projection and loss on this CPU: the fused linear losses beside three bare products, and beside what PyTorch has.

``python -m benchmarks.linear --output FILE`` measures, for hidden states [N, H] and a vocabulary of K words, forward
and backward of each provider: the median time of rounds in one process, as a multiple of the time of the three matrix
products that no method can do without; and the peak of the memory above inputs and weights, each provider in a process
of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import cot_kernels
from benchmarks.environment import environment

CASE = (4096, 512, 50257)  # rows, features, classes
ROUNDS = 5

Step: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]


def _backward(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    def step(input: Tensor, weight: Tensor, target: Tensor) -> None:
        input.grad = weight.grad = None
        loss(input, weight, target).backward()  # type: ignore[no-untyped-call]

    return step


def _products(input: Tensor, weight: Tensor, target: Tensor) -> None:
    """The logits, and two products with a gradient of their size."""
    with torch.no_grad():
        logits = input @ weight.t()
        input.grad, weight.grad = logits @ weight, logits.t() @ input


def _chunked_cross_entropy(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options: Any = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return F.linear_cross_entropy(input, weight, target, options=options)  # type: ignore[attr-defined, no-any-return]


def _cross_entropy(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def _complement_cross_entropy(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return cot_kernels.complement_cross_entropy(F.linear(input, weight), target)


def providers() -> dict[str, Step]:
    found = {
        "three products": _products,
        "linear_complement_cross_entropy": _backward(cot_kernels.linear_complement_cross_entropy),
        "linear_complement_entropy": _backward(cot_kernels.linear_complement_entropy),
        "complement_cross_entropy of the logits": _backward(_complement_cross_entropy),
        "F.cross_entropy of the logits": _backward(_cross_entropy),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        found["F.linear_cross_entropy, chunked"] = _backward(_chunked_cross_entropy)
    return found


def problem(rows: int, features: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(rows, features, generator=generator).requires_grad_()
    weight = (torch.randn(classes, features, generator=generator) * features**-0.5).requires_grad_()
    return input, weight, torch.randint(classes, (rows,), generator=generator)


def peak_bytes(name: str, case: tuple[int, int, int], threads: int) -> int:
    """What a forward and a backward pass add to the peak of a fresh process, the gradients included."""
    torch.set_num_threads(threads)
    step = providers()[name]
    step(*problem(8, *case[1:]))  # libraries are loaded, and buffers of threads made
    tensors = problem(*case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ballast = torch.ones(max(0, before * 1024 - _resident()), dtype=torch.uint8)  # so that the peak is reached again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(*tensors)
    assert ballast[-1:].sum() <= 1
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", type=int, nargs=3, default=CASE, metavar=("ROWS", "FEATURES", "CLASSES"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    case = tuple(arguments.case)
    torch.set_num_threads(arguments.threads)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(peak_bytes, (name, case, arguments.threads)) for name in providers()}
    tensors = problem(*case)
    times: dict[str, list[float]] = {name: [] for name in providers()}
    for _ in track(range(arguments.rounds), "measuring", console=Console(stderr=True)):
        for name, step in providers().items():
            start = time.perf_counter()
            step(*tensors)
            times[name].append(time.perf_counter() - start)
    floor = statistics.median(times["three products"])
    results: list[dict[str, Any]] = [
        {"provider": name, "seconds": statistics.median(taken), "times": statistics.median(taken) / floor,
         "peak_bytes": peaks[name]}
        for name, taken in times.items()
    ]  # fmt: skip
    table = Table(title="{} x {} -> {}, forward + backward".format(*case))
    for heading in ("", "time / three products", "peak memory"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in results:
        table.add_row(row["provider"], f"{row['times']:.2f}", f"{row['peak_bytes'] / 2**20:.0f} MiB")
    Console().print(table)
    if arguments.output:
        rows, features, classes = case
        shape = {"rows": rows, "features": features, "classes": classes}
        report = {"environment": environment(arguments.threads), **shape, "results": results}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
