"""What a method costs: the time of its batches, as a ratio to cross-entropy's in the same process."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from .runs import Machine, Run, parsed
from .training import Training

GROUP = 4  # batches timed together, so that a second step every fourth batch is seen in each
ROUNDS = 60
WARM_UP = 2  # groups that are not kept
SECONDS = 60.0  # of a task at most
QUICK_SECONDS = 1.0


class _Clock:
    """A training that goes on as long as it is asked to."""

    def __init__(self, training: Training, device: torch.device) -> None:
        self.training, self.device = training, device
        self.batches: Iterator[Tensor] = itertools.chain.from_iterable(training.order() for _ in itertools.count())

    def group(self) -> float:
        start = time.perf_counter()
        for _ in range(GROUP):
            self.training.batch(next(self.batches))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def measure(
    machine: Machine, choices: Mapping[tuple[str, str], tuple[float, float]], bar: Progress
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a group of batches times the epochs a method takes, of each task and method, taken in turn.

    One process and one thread, with nothing else at work: the first stages are done.
    """
    tasks = list(dict.fromkeys(task for task, _ in choices))
    line = bar.add_task("time", total=len(tasks))
    limit = SECONDS if machine.settings.examples is None else QUICK_SECONDS
    found: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        clocks = {
            method: _Clock(machine.training(Run(task, method, "test", *choices[task, method], seed=0)), machine.device)
            for each, method in choices
            if each == task
        }
        times: dict[str, list[float]] = {method: [] for method in clocks}
        end = time.monotonic() + limit
        for number in range(WARM_UP + ROUNDS):
            if number > WARM_UP and time.monotonic() > end:
                break
            for method, clock in clocks.items():
                seconds = clock.group() * clock.training.recipe.epochs
                if number >= WARM_UP:
                    times[method].append(seconds)
        found[task] = times
        bar.advance(line)
    return found


def kept(file: Path, times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """With those that the file has from earlier calls, of other tasks, or of more methods than this one measured."""
    merged: dict[str, dict[str, list[float]]] = (parsed(file.read_text()) if file.exists() else None) or {}
    merged.update({task: found for task, found in times.items() if found.keys() >= merged.get(task, {}).keys()})
    unfinished = file.with_suffix(".part")  # a file that is there is whole, whatever ends the program
    unfinished.write_text(json.dumps(merged) + "\n")
    unfinished.replace(file)
    return merged


def ratios(times: Mapping[str, list[float]], baseline: str) -> dict[str, Any]:
    """Of medians."""
    if baseline not in times:
        return {}
    unit = statistics.median(times[baseline])
    return {method: statistics.median(taken) / unit for method, taken in times.items()}
