"""What importing and the first call cost, and how many kernels are compiled as the number of classes varies.

``python -m benchmarks.startup --output FILE`` imports torch, and torch with cot_kernels, in fresh processes that take
turns; times the first call of a loss in fresh processes, as the first of all and after F.cross_entropy, and the second,
on a GPU with an empty cache of compiled kernels and with a full one; what it takes to compile the kernels of such a
call for an H100, or to find them compiled, which needs no GPU; and counts, without compiling, the variants of the
kernels that logits of 2 to 300,000 classes call for: what the launch table chooses, and what Triton makes of the
integers it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.arguments import at_least_one, output_file
from benchmarks.cases import DTYPES
from benchmarks.environment import ROOT, environment
from benchmarks.progress import progress
from cot_kernels.backends.triton import launch

CLASSES = range(2, 300_001)
ROWS = {"many": 8192, "few": 64}  # of the latter, several programs share one
MULTIPROCESSORS = 132  # of an H200
ROUNDS = 15
CALL_ROUNDS = 7

IMPORTS = {"torch": "import torch", "cot_kernels": "import torch, cot_kernels"}
_TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"

# F.cross_entropy before starts what PyTorch starts at its first passes, of whatever loss.
BEFORE = {"cold": "", "warm": "torch.nn.functional.cross_entropy, "}
_CALLS = """
import json, time, torch, cot_kernels
logits = torch.randn(128, 1000, device={device!r}, requires_grad=True)
target = torch.zeros(128, dtype=torch.int64, device={device!r})
seconds = []
for loss in ({before}cot_kernels.complement_entropy, cot_kernels.complement_entropy):
    start = time.perf_counter()
    loss(logits, target).backward()
    logits.grad.sum().item()
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds[-2:]))
"""

# The kernels of the same call.
_COMPILES = """
import json, time, torch
from triton import knobs
from benchmarks import ahead
from benchmarks.launches import TARGETS
from cot_kernels.backends.triton import backend
torch.empty_like(torch.empty(1, device="meta"))  # imports what a tensor on a GPU does not need
job = ahead.Job(ahead.Machine(TARGETS["sm_90"], 132), (128, 1000), "fp32", "complement_entropy")
compiled = []
knobs.compilation.listener = lambda cache_hit, **_: compiled.append(not cache_hit)
start = time.perf_counter()
ahead.compile_job(job)
print(json.dumps([time.perf_counter() - start, sum(compiled)]))
"""

Variant = tuple[str | launch.Tile | int, ...]


def import_seconds(rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    with progress(rounds + 1) as advance:
        for turn in range(rounds + 1):
            advance("importing")
            for name, statement in IMPORTS.items():
                command = [sys.executable, "-c", _TIMED.format(statement)]
                finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                if turn:  # the first one fills the disk's cache, and compiles to bytecode
                    times[name].append(float(finished.stdout))
    return times


def call_seconds(device: str, rounds: int) -> dict[str, float]:
    """Medians of both passes at 128 x 1000: the first call of all, the first after F.cross_entropy, and the second.

    On a GPU of one after F.cross_entropy that must compile, too; the others find compiled kernels on disk.
    """
    environment = dict(os.environ)
    times: dict[str, list[float]] = {"cold": [], "first": [], "second": [], "compiling": []}

    def calls(before: str) -> Any:
        command = [sys.executable, "-c", _CALLS.format(device=device, before=BEFORE[before])]
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return json.loads(finished.stdout)

    with progress(rounds) as advance:
        for _ in range(rounds):
            advance(f"first call, {device}")
            with tempfile.TemporaryDirectory() as cache:
                if device != "cpu":
                    environment["TRITON_CACHE_DIR"] = cache
                    times["compiling"].append(calls("warm")[0])
                times["cold"].append(calls("cold")[0])
                first, second = calls("warm")
                times["first"].append(first)
                times["second"].append(second)
    return {name: statistics.median(found) for name, found in times.items() if found}


def compile_seconds(rounds: int) -> dict[str, float]:
    """Medians, with an empty cache of compiled kernels and with a full one, for an H100; after Triton is imported."""
    times: dict[str, list[float]] = {"empty": [], "full": []}
    with progress(rounds) as advance:
        for _ in range(rounds):
            advance("compiling")
            with tempfile.TemporaryDirectory() as cache:
                for found in times.values():
                    found.append(compiled_with(cache)[0])
    return {name: statistics.median(found) for name, found in times.items()}


def compiled_with(cache: str) -> tuple[float, int]:
    """Seconds until the kernels of a first call are there, and how many of them were compiled for that."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = cache
    command = [sys.executable, "-c", _COMPILES]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    seconds, compiled = json.loads(run.stdout)
    return seconds, compiled


def specialization(number: int) -> str:
    """What Triton tells of an integer in compiled code: that it is 1, that 16 divides it, or that it needs 64 bits."""
    if number == 1:
        return "1"
    return ("64" if not -(2**31) <= number < 2**31 else "32") + ("D" if number % 16 == 0 else "")


def variants(rows: int, classes: int, itemsize: int) -> Iterator[Variant]:
    """The kernels that one objective's mean compiles, forward and backward, for contiguous (rows, classes) logits."""
    aligned = classes * itemsize % 16 == 0
    tile, written = (
        launch.choose_tile(
            classes, itemsize, classes_adjoin=True, rows_aligned=aligned, head_aligned=True, backward=backward
        )
        for backward in (False, True)
    )
    tiles, written_tiles = (-(-(classes + each.overhang) // each.block) for each in (tile, written))
    # How far a long row may begin from a boundary does not show in its kernels.
    tile, written = (replace(each, heads=False, overhang=0) if each.long else each for each in (tile, written))
    splits = launch.choose_splits(rows, tiles, MULTIPROCESSORS) if tile.long else 1
    # Rows and classes, and the strides: classes, 1, and that of an absent dimension, 0.
    integers = tuple(specialization(number) for number in (rows, classes, 1, classes, 1, 0))
    if splits > 1:
        power = launch.next_power_of_two(splits)
        yield ("split", tile, *integers, specialization(splits))
        yield ("merge", power, *integers, specialization(splits))
        programs = -(-rows // max(1, 256 // power))
    else:
        yield ("statistics", tile, *integers)
        programs = -(-rows // (tile.rows * launch.choose_row_turns(tile, rows, MULTIPROCESSORS)))
    if programs > launch.FOLD_BLOCK:
        yield ("fold", specialization(programs))
        programs = -(-programs // launch.FOLD_BLOCK)
    yield ("reduce", specialization(programs))
    turns = launch.choose_turns(written, rows, written_tiles, MULTIPROCESSORS)
    # Of these the kernel is told that they are 1, and no more.
    yield ("gradient", written, *integers, int(written_tiles == 1), int(turns == 1))


def count(rows: int, itemsize: int, classes: Iterable[int] = CLASSES) -> dict[str, int]:
    """How many variants of each kernel there are over all numbers of classes."""
    found = {variant for each in classes for variant in variants(rows, each, itemsize)}
    kernels = [str(variant[0]) for variant in found]
    return {kernel: kernels.count(kernel) for kernel in sorted(set(kernels))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--rounds", type=at_least_one, default=ROUNDS)
    options = parser.parse_args(arguments)
    medians = {name: statistics.median(times) for name, times in import_seconds(options.rounds).items()}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    calls = {device: call_seconds(device, min(CALL_ROUNDS, options.rounds)) for device in devices}
    compiled = compile_seconds(min(CALL_ROUNDS, options.rounds)) if find_spec("triton") else None
    counts = {
        dtype: {name: count(rows, torch_dtype.itemsize) for name, rows in ROWS.items()}
        for dtype, torch_dtype in DTYPES.items()
    }
    report: dict[str, Any] = {
        "environment": environment(1),
        "import_seconds": medians,
        "import_ratio": medians["cot_kernels"] / medians["torch"],
        "call_seconds": calls,
        **({"compile_seconds": compiled} if compiled else {}),
        "classes": [CLASSES[0], CLASSES[-1]],
        "rows": ROWS,
        "variants": counts,
    }
    print(f"import torch {medians['torch']:.2f} s, with cot_kernels {medians['cot_kernels']:.2f} s")
    for device, seconds in calls.items():
        print(f"{device}: " + ", ".join(f"{name} call {each * 1e3:.1f} ms" for name, each in seconds.items()))
    if compiled:
        print(f"kernels of a first call: compiled in {compiled['empty']:.2f} s, found in {compiled['full']:.2f} s")
    for dtype, found in counts.items():
        for name, kernels in found.items():
            print(f"{dtype}, {name} rows: {sum(kernels.values())} variants, {kernels}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
