"""One training each: what it is, what came of it, and the file that remembers it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .data import Data, few_of_each
from .methods import METHODS
from .metrics import MEASURES, UNDER_ATTACK, Figures, evaluate
from .tasks import TASKS, load
from .training import Training

Stage = Literal["search", "test"]


@dataclass(frozen=True)
class Settings:
    """What the figures depend on, beside tasks and methods."""

    search_seeds: tuple[int, ...] = (1000, 1001)
    test_seeds: tuple[int, ...] = tuple(range(10))
    configurations: int | None = None  # of each method at most; None for all
    examples: int | None = None  # of each part of each task at most
    epochs: int | None = None  # of each task at most


FULL = Settings()
QUICK = Settings(search_seeds=(1000,), test_seeds=(0, 1), configurations=2, examples=16, epochs=2)


@dataclass(frozen=True)
class Run:
    """A seed of a configuration: in the search on the validation part, in the test on the test part."""

    task: str
    method: str
    stage: Stage
    rate: float  # times the task's learning rate
    strength: float
    seed: int


@dataclass(frozen=True)
class Result:
    run: Run
    figures: Figures


class Machine:
    """Where runs are made: the settings, the folder that keeps data, and the device."""

    def __init__(self, settings: Settings, folder: Path, device: str) -> None:
        self.settings, self.folder, self.device = settings, folder, torch.device(device)

    @functools.cached_property
    def _data(self) -> dict[str, Data]:
        return {}

    def data(self, task: str) -> Data:
        if task not in self._data:
            self._data[task] = load(TASKS[task], self.settings.examples, self.folder).to(self.device)
        return self._data[task]

    def training(self, run: Run) -> Training:
        task, part = TASKS[run.task], self.data(run.task).train
        if task.shots:
            part = few_of_each(part, task.shots, run.seed)
        epochs = min(task.epochs, self.settings.epochs or task.epochs)
        recipe = METHODS[run.method].recipe(run.strength, task.optimizer)
        return Training(task, part, recipe, task.rate * run.rate, run.seed, epochs)

    def result(self, run: Run) -> Result:
        network, data = self.training(run).run(), self.data(run.task)
        tested = run.stage == "test"
        return Result(run, evaluate(network, data.test if tested else data.validation, TASKS[run.task], tested))


# ------------------------------------------------------------------------------------------- choosing


def configurations(task: str, method: str, settings: Settings) -> list[tuple[float, float]]:
    """Pairs (rate, strength) to choose from; where there may be few, from the middle of the list."""
    every = METHODS[method].configurations(TASKS[task].optimizer)
    count = min(len(every), settings.configurations or len(every))
    start = (len(every) - count) // 2
    return every[start : start + count]


def search(tasks: Iterable[str], methods: Iterable[str], settings: Settings) -> list[Run]:
    methods = list(methods)
    return [
        Run(task, method, "search", rate, strength, seed)
        for task in tasks
        for method in methods
        for rate, strength in configurations(task, method, settings)
        for seed in settings.search_seeds
    ]


def chosen(results: Iterable[Result]) -> dict[tuple[str, str], tuple[float, float]]:
    """Of each task and method, the configuration with the best mean validation score; of equals, the lower NLL."""
    grouped: dict[tuple[str, str], dict[tuple[float, float], list[Figures]]] = {}
    for result in results:
        run = result.run
        if run.stage == "search":
            of_method = grouped.setdefault((run.task, run.method), {})
            of_method.setdefault((run.rate, run.strength), []).append(result.figures)

    def merit(figures: list[Figures]) -> tuple[float, float]:
        score = sum(each["score"] for each in figures) / len(figures)
        return round(score, 6), -sum(each["nll"] for each in figures) / len(figures)

    return {
        key: max(of_method, key=lambda configuration, found=of_method: merit(found[configuration]))  # type: ignore[misc]
        for key, of_method in grouped.items()
    }


def final(choices: dict[tuple[str, str], tuple[float, float]], settings: Settings) -> list[Run]:
    return [
        Run(task, method, "test", rate, strength, seed)
        for (task, method), (rate, strength) in choices.items()
        for seed in settings.test_seeds
    ]


# -------------------------------------------------------------------------------------------- keeping


def parsed(line: str) -> Any:
    """None where it is not JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _text(file: Path) -> str:
    """Bytes that are no text spoil their line, not the file."""
    return file.read_text(errors="replace")


class OtherResults(ValueError):
    """A file of results has those of another study."""


class Store:
    """A file of JSON lines: the settings, then a line a run, written when it is done. No run is made twice."""

    def __init__(self, file: Path, settings: Settings) -> None:
        self.file = file
        head = json.loads(json.dumps({"settings": asdict(settings), "tasks": facts()}))
        if not file.exists() or not file.stat().st_size:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(head) + "\n")
        elif parsed(_text(file).partition("\n")[0]) != head:
            raise OtherResults(
                f"{file} holds runs with other settings, tasks or methods: name another folder with --output, or "
                "remove the file"
            )
        self.results = {result.run: result for result in read(file)}
        # A line cut off in the middle by whatever ended the program is not read; it must not swallow the next.
        if not _text(file).endswith("\n"):
            with file.open("a") as stream:
                stream.write("\n")

    def add(self, result: Result) -> None:
        kept = rounded(result.figures)
        self.results[result.run] = Result(result.run, kept)  # as the next call will read it: the report is the same
        with self.file.open("a") as stream:
            stream.write(json.dumps({**asdict(result.run), **kept}) + "\n")

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        return [run for run in runs if run not in self.results]


def facts() -> dict[str, Any]:
    """What of tasks and methods decides on figures."""
    return {
        key: {
            "classes": task.classes, "optimizer": task.optimizer,
            "rate": task.rate, "epochs": task.epochs, "batch_size": task.batch_size, "attacks": task.attacks,
            "shots": task.shots, "score": task.score,
            "configurations": {name: method.configurations(task.optimizer) for name, method in METHODS.items()},
        }
        for key, task in TASKS.items()
    }  # fmt: skip


def read(file: Path) -> Iterator[Result]:
    """Of the lines that are runs, whole ones: another may have been cut off, or spoiled."""
    names = [field.name for field in dataclasses.fields(Run)]
    for line in _text(file).splitlines()[1:]:
        values = parsed(line)
        if not isinstance(values, dict):
            continue
        tested = values.get("stage") == "test"
        if values.keys() >= {*names, *MEASURES, *(UNDER_ATTACK if tested else ())}:
            yield Result(Run(**{name: values.pop(name) for name in names}), values)


def rounded(figures: Figures) -> Figures:
    return {name: float(f"{value:.6g}") for name, value in figures.items()}
