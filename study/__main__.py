"""``python -m study``: trains everything, and writes what came of it.

Three stages: every configuration of every method on the validation part, with seeds of its own; the best of each
method with fresh seeds on the test part; the time of a batch beside cross-entropy's. What is done is kept in
``runs.jsonl`` and not done again: interrupt it and call it again as you like.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.arguments import at_least_one, device_argument
from benchmarks.environment import environment

from . import cost, figures, report, tables, work
from .methods import METHODS
from .runs import FULL, QUICK, OtherResults, Settings, Store, chosen, final, search
from .tasks import TASKS

WORKERS_A_CORE = 8  # more are a slip of the keyboard; on a GPU a few a core may pay


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="everything, on so little that its figures mean nothing")
    made.add_argument("--output", type=Path, default=Path("study-results"), help="folder (default study-results)")
    made.add_argument("--task", action="append", choices=list(TASKS), help="only this one; may be given again")
    made.add_argument("--method", action="append", choices=list(METHODS), help="only this one; may be given again")
    made.add_argument(
        "--workers", type=at_least_one, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    made.add_argument("--device", type=device_argument, default="cpu", help="cpu (default), cuda or cuda:1")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser()
    options = made.parse_args(arguments)
    most = WORKERS_A_CORE * (os.cpu_count() or 1)
    if options.workers > most:
        made.error(f"--workers must be at most {most}, {WORKERS_A_CORE} a core, got {options.workers}")
    settings = QUICK if options.quick else FULL
    tasks, methods = _in_order(options.task, TASKS), _in_order(options.method, METHODS)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        store = Store(options.output / "runs.jsonl", settings)
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            seconds = _stages(options, settings, tasks, methods, store, bar)
    except KeyboardInterrupt:
        console.print(f"What is done is kept in {options.output}; the same command goes on from there.")
        raise SystemExit(130) from None
    except OtherResults as error:
        made.error(str(error))
    except OSError as error:
        made.error(f"--output must be a folder that can be written to, got {options.output}: {error}")
    found = report.build(store, settings, seconds, environment(1, options.device))
    report.write(found, options.output / "study.json")
    pictures = figures.draw(found, options.output)
    for table in tables.for_terminal(found):
        console.print(table)
    console.print(f"{options.output / 'study.json'}, {', '.join(str(each) for each in pictures)}")


def _stages(
    options: argparse.Namespace, settings: Settings, tasks: list[str], methods: list[str], store: Store, bar: Progress
) -> dict[str, dict[str, list[float]]]:
    """The times of the last one, and of earlier calls for other tasks."""
    where = (settings, options.output / "data", str(options.device))
    machine = work.machine(*where)
    line = bar.add_task("data", total=len(tasks))
    for task in tasks:
        machine.data(task)  # kept in the folder, where the processes find it
        bar.advance(line)
    with work.pool(options.workers, *where) as workers:
        try:
            searched = search(tasks, methods, settings)
            work.make(searched, store, workers, bar, "search")
            choices = chosen(store.results[run] for run in searched)
            work.make(final(choices, settings), store, workers, bar, "test")
        except KeyboardInterrupt:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    return cost.kept(options.output / "times.json", cost.measure(machine, choices, bar))


def _in_order(given: Iterable[str] | None, every: Iterable[str]) -> list[str]:
    return [key for key in every if given is None or key in given]


if __name__ == "__main__":
    main()
