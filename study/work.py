"""Shares the runs out among processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.progress import Progress

from .runs import Machine, Result, Run, Settings, Store

_machine: Machine  # of a worker


def machine(settings: Settings, folder: Path, device: str) -> Machine:
    """One thread: networks this small gain nothing by a second one, and each core has a process of its own."""
    warnings.filterwarnings("ignore", module="torchmetrics")
    torch.set_num_threads(1)
    return Machine(settings, folder, device)


def _start(settings: Settings, folder: Path, device: str) -> None:
    global _machine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard's interrupt is for the process that shares out the work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _machine = machine(settings, folder, device)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _result(run: Run) -> Result:
    return _machine.result(run)


def pool(workers: int, settings: Settings, folder: Path, device: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _start, (settings, folder, device))


def make(runs: Sequence[Run], store: Store, workers: ProcessPoolExecutor, bar: Progress, title: str) -> None:
    """Makes the runs that the store lacks."""
    missing = store.missing(runs)
    line = bar.add_task(title, total=len(runs), completed=len(runs) - len(missing))
    for finished in as_completed([workers.submit(_result, run) for run in missing]):
        store.add(finished.result())
        bar.advance(line)
