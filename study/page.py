"""``python -m study.page`` writes the tables and pictures of docs/evidence.md from the committed results."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.pages import fill

from . import figures, tables
from .report import Report
from .tasks import TASKS

RESULTS = ROOT / "benchmarks" / "results" / "study" / "study.json"
PAGE = ROOT / "docs" / "evidence.md"
PICTURES = ROOT / "docs" / "evidence"

TABLES: dict[str, Callable[[Report], str]] = {
    "gains": tables.gains,
    "controls": tables.controls,
    "losses": tables.losses,
    "times": tables.times,
    **{key: functools.partial(tables.of_task, key=key) for key in TASKS},
}


def filled(page: Path, report: Report) -> str:
    """The page's text with the tables that the results call for."""
    text = page.read_text()
    for name, table in TABLES.items():
        text = fill(text, name, table(report))
    return text


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # none, but --help must not write
    report = json.loads(RESULTS.read_text())
    PAGE.write_text(filled(PAGE, report))
    figures.draw(report, PICTURES)


if __name__ == "__main__":
    main()
