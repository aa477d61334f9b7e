"""Results files: written, read, and refused where their rows cannot stand in one table or figure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]  # of benchmarks.runner, or of benchmarks.growth
Report: TypeAlias = dict[str, Any]

RESULTS = Path(__file__).parent / "results"  # those that are committed


def write(path: Path, head: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], key: str = "results") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(head, rows, key))


def beside(path: Path) -> Path:
    """Where a run writes that is under way: a complete file stays until another is.

    The file itself where it is a device or a pipe, or where nothing can be written beside it.
    """
    path = path.resolve()  # what replaces a link would leave what it leads to
    if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
        return path
    return path.with_name(f"{path.name}.partial")


def text_of(head: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], key: str = "results") -> str:
    """A row a line, so that two runs can be compared by line, and an entry of the head a line where it has several.

    Numbers that are not finite are an error: JSON has none.
    """
    entries = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in head.items()]
    between = ",\n" if len(entries) > 1 else ", "
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    entries.append(f"{json.dumps(key)}: [\n{lines}\n]")
    return f"{{{between.join(entries)}}}\n"


def read(file: Path) -> Report:
    """What a file holds; where that is not JSON, the error names the file."""
    try:
        report: Report = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} holds no JSON, or not all of it: {error}") from error
    return report


def comparable(reports: Mapping[Path, Report]) -> list[Row]:
    """The rows of all, which must be of one device, and what is of one case and dtype in one file."""
    devices = {report["environment"]["device"] for report in reports.values()}
    if len(devices) > 1:
        raise ValueError(f"results must be of one device, got {', '.join(sorted(devices))}")
    seen: dict[str, Path] = {}
    for file, report in reports.items():
        for case in {_case_of(row) for row in report["results"]}:
            if seen.setdefault(case, file) != file:
                raise ValueError(f"results must have each case in one file, got {case} in {seen[case]} and {file}")
    return [row for report in reports.values() for row in report["results"]]


def _case_of(row: Row) -> str:
    return f"growth along {row['along']}" if "along" in row else f"{row['case']}, {row['dtype']}"
