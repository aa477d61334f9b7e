"""What this package aims at, and what results files say of it: ``python -m benchmarks.goals FILE ...``.

A goal is set for some cases of the suite, in each dtype that the files hold and for each upstream gradient, and is met
where all of them are measured and meet it; the worst one is shown, and those that were not measured are listed. Where
ours is wrong, failed or ran out of time in one of them it is missed. Goals are of eager mode; of a GPU there stands
beside them the same in replays of a CUDA graph, where nothing waits for the host. Results of a CPU have other goals.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import PARTS, VOCABULARIES
from benchmarks.reports import Row, comparable, read
from benchmarks.runner import UPSTREAMS

LARGE = tuple(case.name for part in ("widths", "tokens") for case in PARTS[part])
SMALL = ("128 x 10", "256 x 100", "256 x 1000", "4096 x 1000")
CPU = tuple(case.name for case in PARTS["cpu"])
CPU_VOCABULARIES = tuple(case.name for case in PARTS["cpu"] if case.classes >= min(VOCABULARIES))


@dataclass(frozen=True)
class Goal:
    """Forward and backward in eager mode: another provider's time, or memory, over ours, or our share of a copy's."""

    text: str
    ours: str
    other: str | None
    least: float
    cases: tuple[str, ...]
    dtypes: tuple[str, ...] = ()  # none: those of the files
    of: str = "p50"  # what is compared


COT, BOTH = "complement_entropy", "complement_cross_entropy"
BF16 = ("bf16",)
GPU_GOALS = (
    Goal("share of the copy's bandwidth, large", COT, None, 0.90, LARGE, BF16),
    Goal("published operations / ours, large", COT, "published", 10, LARGE),
    Goal("published operations under torch.compile / ours, large", COT, "published, compiled", 2, LARGE),
    Goal("Liger's cross-entropy / our cross-entropy and complement", BOTH, "Liger cross_entropy", 1, LARGE, BF16),
    Goal("quack's cross-entropy / our cross-entropy and complement", BOTH, "quack cross_entropy", 1 / 1.1, LARGE, BF16),
    Goal("F.cross_entropy / ours, small", COT, "F.cross_entropy", 1 / 1.2, SMALL),
    Goal("published operations / ours, small", COT, "published", 4, SMALL),
)
CPU_GOALS = (
    Goal("published operations / ours, 128 x 10", COT, "published", 1.3, ("128 x 10",)),
    Goal("published operations / ours, 4096 x 100", COT, "published", 2, ("4096 x 100",)),
    Goal("published operations / ours, 1024 x 1000", COT, "published", 2.5, ("1024 x 1000",)),
    Goal("published operations / ours, from 32,000 classes on", COT, "published", 6, CPU_VOCABULARIES),
    Goal("F.cross_entropy / ours, from 32,000 classes on", COT, "F.cross_entropy", 1, CPU_VOCABULARIES),
    Goal("peak memory: published operations / ours", COT, "published", 3, CPU, of="peak_bytes"),
)


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    worst: float | None  # None where no case of the goal is in the files
    where: str
    met: int  # cases, each in one dtype, that meet it
    of: int  # those that it is set for
    absent: tuple[str, ...] = ()  # those that were not measured
    broken: str = ""  # those in which ours has no time, and why

    @property
    def said(self) -> str:
        count = f"met in {self.met} of {self.of}"
        if self.broken or (self.worst is not None and self.worst < self.goal.least):
            return f"missed, {count}"
        if self.worst is None:
            return "not measured"
        return "met" if self.met == self.of else count


def verdicts(rows: Sequence[Row], goals: Sequence[Goal], graph: bool = False) -> Iterator[Verdict]:
    rows = [row for row in rows if row["graph"] == graph]
    timed = {
        (row["provider"], row["case"], row["dtype"], row["upstream"]): row
        for row in rows
        if row["mode"] == "both" and row["status"] == "ok"
    }
    dtypes = tuple(dict.fromkeys(row["dtype"] for row in rows))
    for goal in goals:
        wanted = list(itertools.product(goal.cases, goal.dtypes or dtypes))
        failed = {
            (row["case"], row["dtype"]): row["status"]
            for row in rows
            if row["provider"] == goal.ours and row["status"] != "ok" and (row["case"], row["dtype"]) in wanted
        }
        met, found, absent = 0, [], []
        for case, dtype in wanted:
            values = []
            for upstream in UPSTREAMS:
                ours, other = (timed.get((name, case, dtype, upstream)) for name in (goal.ours, goal.other))
                if ours and (other or goal.other is None):
                    value = other[goal.of] / ours[goal.of] if other else ours["copy_share"]
                    values.append((value, f"{case}, {dtype}, upstream {upstream:g}"))
            found.extend(values)
            if (case, dtype) not in failed and len(values) < len(UPSTREAMS):
                absent.append(case)
            met += len(values) == len(UPSTREAMS) and min(values)[0] >= goal.least
        worst, where = min(found, default=(None, ""))
        broken = "; ".join(f"{status} at {case}, {dtype}" for (case, dtype), status in failed.items())
        yield Verdict(goal, worst, where, met, len(wanted), tuple(dict.fromkeys(absent)), broken)


def table(rows: Sequence[Row], goals: Sequence[Goal]) -> str:
    """With what replays of CUDA graphs have, where the rows have some."""
    ways = (False, True) if any(row["graph"] for row in rows) else (False,)
    head = " | ".join(f"{'in a CUDA graph: ' if graph else ''}worst case | where | | not measured" for graph in ways)
    lines = [f"| forward and backward | goal | {head} |", "|---|---:|" + "---:|---|---|---|" * len(ways)]
    for each in zip(*(verdicts(rows, goals, graph) for graph in ways), strict=True):
        goal = each[0].goal
        lines.append(f"| {goal.text} | {goal.least:.2f} | {' | '.join(_cells(verdict) for verdict in each)} |")
    return "\n".join(lines)


def _cells(verdict: Verdict) -> str:
    worst = "" if verdict.worst is None else f"{verdict.worst:.2f}"
    where = "; ".join(filter(None, (verdict.where, verdict.broken)))
    others = "all others" if verdict.broken else "all"
    absent = others if verdict.worst is None else ", ".join(verdict.absent)
    return f"{worst} | {where} | {verdict.said} | {absent}"


def results_of(files: Sequence[Path]) -> tuple[list[Row], tuple[Goal, ...]]:
    """Of results that can be compared: their rows, and the goals of such a device."""
    reports = {file: read(file) for file in files}
    rows = comparable(reports)
    on_cpu = any(report["environment"]["device"] == "cpu" for report in reports.values())
    return rows, CPU_GOALS if on_cpu else GPU_GOALS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="results of `python -m benchmarks`, on one device")
    options = parser.parse_args()
    try:
        print(table(*results_of(options.files)))
    except OSError as error:
        parser.error(str(error))
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"files must be results of `python -m benchmarks`: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
