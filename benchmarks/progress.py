"""A progress bar on the standard error stream; plain lines where rich is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call before each of ``total`` units of work, with what comes next."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        started = 0

        def line(text: str) -> None:
            nonlocal started
            started += 1
            print(f"[{started}/{total}] {text}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        started_bar = 0

        def advance(text: str) -> None:
            nonlocal started_bar
            bar.update(task, description=text, completed=started_bar)
            started_bar += 1

        yield advance
        bar.update(task, description="done", completed=total)
