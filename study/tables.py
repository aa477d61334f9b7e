"""A report as tables: for the terminal, and in Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from .report import Report

Row = Mapping[str, Any]


def number(value: Mapping[str, float | None], factor: float, digits: int, signed: bool = False) -> str:
    """A mean and half the width of its interval."""
    mean, half = value["mean"], value["half_width"]
    assert mean is not None
    rounded = round(factor * mean, digits) + 0.0  # no "-0.0"
    text = f"{rounded:{'+' if signed else ''}.{digits}f}"
    return text if half is None else f"{text} ± {factor * half:.{digits}f}"


def _of(measure: str, factor: float, digits: int, signed: bool = False) -> Callable[[Row], str]:
    return lambda row: number(row[measure], factor, digits, signed) if measure in row else ""


def _chosen(row: Row) -> str:
    """What the search found, with a star where it is the least or the most there was."""
    strength = f"{row['strength']:g}{'*' * row['strength_at_end']}" if row["strength_is"] else "-"
    return f"{row['rate']:.2g}{'*' * row['rate_at_end']}, {strength}"


def _time(row: Row) -> str:
    return "" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("rate, strength", _chosen),
    ("score, %", _of("score", 100, 1)),
    ("to CE", _of("score_minus_ce", 100, 1, signed=True)),
    ("to CE twice", _of("score_minus_ce_twice", 100, 1, signed=True)),
    ("NLL", _of("nll", 1, 3)),
    ("calibration error, %", _of("calibration_error", 100, 1)),
    ("attack 1, %", _of("score_attack_1", 100, 1)),
    ("attack 2, %", _of("score_attack_2", 100, 1)),
    ("complement entropy", _of("complement_entropy", 1, 2)),
    ("time", _time),
)


def for_terminal(report: Report) -> Iterable[Table]:
    """One a task."""
    for task in report["tasks"]:
        made = Table(title=f"{task['label']} ({task['score']}): {task['about']}", box=box.SIMPLE_HEAD, pad_edge=False)
        made.add_column("method", no_wrap=True)
        for heading, _ in COLUMNS:
            made.add_column(heading, justify="right")
        for row in task["methods"]:
            made.add_row(row["label"], *(cell(row) for _, cell in COLUMNS))
        yield made


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_task(report: Report, key: str) -> str:
    """Everything measured on a task."""
    task = next(each for each in report["tasks"] if each["task"] == key)
    rows = [[row["label"], *(cell(row) for _, cell in COLUMNS)] for row in task["methods"]]
    about = f"{task['about']}. {task['methods'][0]['seeds']} seeds."
    return f"{about}\n\n{markdown(['method', *(heading for heading, _ in COLUMNS)], rows)}"


def by_task(report: Report, cell: Callable[[Row], str]) -> str:
    """A row a method, a column a task."""
    labels = {row["method"]: row["label"] for task in report["tasks"] for row in task["methods"]}
    found = {(task["task"], row["method"]): cell(row) for task in report["tasks"] for row in task["methods"]}
    rows = [
        [label, *(found.get((task["task"], method), "") for task in report["tasks"])]
        for method, label in labels.items()
    ]
    return markdown(["", *(task["label"] for task in report["tasks"])], rows)


def gains(report: Report) -> str:
    """Points of score over cross-entropy."""
    return by_task(report, _of("score_minus_ce", 100, 1, signed=True))


def controls(report: Report) -> str:
    """Points of score over cross-entropy with twice the steps."""
    return by_task(report, _of("score_minus_ce_twice", 100, 1, signed=True))


def losses(report: Report) -> str:
    """Negative log-likelihood."""
    return by_task(report, _of("nll", 1, 3))


def times(report: Report) -> str:
    """Of a batch, as a ratio to cross-entropy's; of twice the epochs, twice."""
    return by_task(report, _time)
