"""What this package aims at on a GPU, and what results files say of it: ``python -m benchmarks.goals FILE ...``.

A goal holds where every case of the files that it speaks of meets it, in each dtype and for each upstream gradient;
the worst one is shown. Where ours is wrong, failed or ran out of time in one of them it does not hold. A goal without a
case, for want of a provider for one, is neither met nor missed. Goals are of eager mode; beside it stands the worst of
the same in replays of a CUDA graph, where nothing waits for the host.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reports import Row, comparable, read

LARGE = 8192 * 32000  # logits: 2^28 within three percent, so that all vocabularies count
SMALL = ("128 x 10", "256 x 100", "256 x 1000", "4096 x 1000")


def _large(row: Row) -> bool:
    return bool(row["rows"] * row["classes"] >= LARGE and row["classes"] >= 1000)


def _large_bf16(row: Row) -> bool:
    return _large(row) and row["dtype"] == "bf16"


def _small(row: Row) -> bool:
    return row["case"] in SMALL


@dataclass(frozen=True)
class Goal:
    """Forward and backward in eager mode: another provider's time over ours, or our share of a copy's bandwidth."""

    text: str
    ours: str
    other: str | None
    least: float
    speaks_of: Callable[[Row], bool]


COT, BOTH = "complement_entropy", "complement_cross_entropy"
GPU_GOALS = (
    Goal("share of the copy's bandwidth, large", COT, None, 0.90, _large_bf16),
    Goal("published operations / ours, large", COT, "published", 10, _large),
    Goal("published operations under torch.compile / ours, large", COT, "published, compiled", 2, _large),
    Goal("Liger's cross-entropy / our cross-entropy and complement", BOTH, "Liger cross_entropy", 1, _large_bf16),
    Goal("quack's cross-entropy / our cross-entropy and complement", BOTH, "quack cross_entropy", 1 / 1.1, _large_bf16),
    Goal("F.cross_entropy / ours, small", COT, "F.cross_entropy", 1 / 1.2, _small),
    Goal("published operations / ours, small", COT, "published", 4, _small),
)


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    worst: float | None  # None where no case of the files speaks of it
    where: str
    cases: int
    broken: str = ""  # cases in which ours has no time, and why

    @property
    def said(self) -> str:
        if self.broken:
            return f"missed: {self.broken}"
        if self.worst is None:
            return "not measured"
        return "met" if self.worst >= self.goal.least else "missed"


def verdicts(rows: Sequence[Row], graph: bool = False) -> Iterator[Verdict]:
    timed = [row for row in rows if row["mode"] == "both" and row["graph"] == graph and row["status"] == "ok"]
    keyed = {(row["provider"], row["case"], row["dtype"], row["upstream"]): row for row in timed}
    for goal in GPU_GOALS:
        found = []
        ours = [row for row in rows if row["provider"] == goal.ours and row["graph"] == graph and goal.speaks_of(row)]
        without = {f"{row['status']} at {row['case']}, {row['dtype']}" for row in ours if row["status"] != "ok"}
        broken = "; ".join(sorted(without))
        for row in timed:
            if row["provider"] != goal.ours or not goal.speaks_of(row):
                continue
            other = keyed.get((goal.other, row["case"], row["dtype"], row["upstream"]))
            if goal.other is None:
                found.append((row["copy_share"], row))
            elif other is not None:
                found.append((other["p50"] / row["p50"], row))
        if not found:
            yield Verdict(goal, None, "", 0, broken)
            continue
        worst, row = min(found, key=lambda each: each[0])
        yield Verdict(goal, worst, f"{row['case']}, {row['dtype']}, upstream {row['upstream']:g}", len(found), broken)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| forward and backward | goal | worst case | where | cases | | in a CUDA graph: worst | where | cases |",
        "|---|---:|---:|---|---:|---|---:|---|---:|",
    ]
    for each, replayed in zip(verdicts(rows), verdicts(rows, graph=True), strict=True):
        said = each.said.partition(":")[0]  # what for stands with where
        lines.append(f"| {each.goal.text} | {each.goal.least:.2f} | {_found(each)} | {said} | {_found(replayed)} |")
    return "\n".join(lines)


def _found(verdict: Verdict) -> str:
    worst = "" if verdict.worst is None else f"{verdict.worst:.2f}"
    return f"{worst} | {'; '.join(filter(None, (verdict.where, verdict.broken)))} | {verdict.cases}"


def rows_of(files: Sequence[Path]) -> list[Row]:
    """Of results that can be compared, of a GPU."""
    reports = {file: read(file) for file in files}
    if any(report["environment"]["device"] == "cpu" for report in reports.values()):
        raise ValueError("results must be of a GPU, got cpu")
    return comparable(reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="results of `python -m benchmarks` on a GPU")
    options = parser.parse_args()
    try:
        rows = rows_of(options.files)
        print(table(rows))
    except OSError as error:
        parser.error(str(error))
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"files must be results of `python -m benchmarks` on a GPU: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
