"""Tables of what was measured on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.reports import RESULTS, read
from benchmarks.runner import UPSTREAMS

CPU_RESULTS = RESULTS / "cpu.json"
CPU_AGAIN = RESULTS / "cpu_repeated.json"  # another run of the same
ATEN_RESULTS = RESULTS / "cpu_aten.json"  # built without a compiler
STARTUP_RESULTS = RESULTS / "startup.json"
DISPATCH_RESULTS = RESULTS / "dispatch.json"
LINEAR_RESULTS = RESULTS / "linear.json"
TRAINING_RESULTS = RESULTS / "training.json"


def cpu_table() -> str:
    return suite_table(CPU_RESULTS)


def aten_table() -> str:
    return suite_table(ATEN_RESULTS)


def suite_table(results: Path) -> str:
    """How many times faster than the published operations each provider of the suite is, on the CPU."""
    report = read(results)
    times: dict[str, dict[str, float]] = {}
    for row in report["results"]:
        if (row["mode"], row["upstream"], row["status"]) == ("both", 1, "ok"):
            times.setdefault(row["case"], {})[row["provider"]] = row["p50"]
    return ratio_table(times, report["environment"], results)


def goals_table() -> str:
    """What every run has, whatever the upstream gradient, beside the goals of a CPU; the worst one decides."""
    files = [file for file in (CPU_RESULTS, CPU_AGAIN) if file.exists() or file == CPU_RESULTS]
    reports = [read(file) for file in files]
    runs = [report["results"] for report in reports]
    lines = [
        "| rows x classes | published / ours, time | goal | F.cross_entropy / ours, time | goal "
        "| published / ours, peak memory | goal | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for case in goals.CPU:
        cells, met = [], []
        for other, of in (("published", "p50"), ("F.cross_entropy", "p50"), ("published", "peak_bytes")):
            found = [value for rows in runs for value in ratios(rows, case, other, of)]
            set_for = [goal for goal in goals.CPU_GOALS if case in goal.cases and (goal.other, goal.of) == (other, of)]
            cells += [spread(found), *(f"{goal.least:g}" for goal in set_for), *([] if set_for else [""])]
            met += [min(found) >= goal.least for goal in set_for]
        lines.append(f"| {case} | {' | '.join(cells)} | {'met' if all(met) else 'missed'} |")
    notes = [cpu_note(report["environment"], file) for file, report in zip(files, reports, strict=True)]
    return "\n".join([*lines, "", " ".join(notes)])


def ratios(rows: list[dict[str, Any]], case: str, other: str, of: str) -> list[float]:
    """Another provider's time or memory over ours, for each upstream gradient."""
    found: dict[str, dict[float, float]] = {other: {}, goals.COT: {}}
    for row in rows:
        if (row["case"], row["mode"], row["status"]) == (case, "both", "ok") and row["provider"] in found:
            found[row["provider"]][row["upstream"]] = row[of]
    return [found[other][upstream] / found[goals.COT][upstream] for upstream in UPSTREAMS]


def spread(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def dispatch_table() -> str:
    report = read(DISPATCH_RESULTS)
    times = {f"{result['rows']} x {result['classes']}": result["microseconds"] for result in report["results"]}
    return ratio_table(times, report["environment"], DISPATCH_RESULTS)


def ratio_table(times: dict[str, dict[str, float]], about: dict[str, Any], results: Path) -> str:
    """A row a case, a column a way: how many times faster than the first one."""
    names = list(next(iter(times.values())))
    lines = [f"| rows x classes | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for case, taken in times.items():
        ratios = (f"{taken[names[0]] / taken[name]:.2f}" if name in taken else "" for name in names)
        lines.append(f"| {case} | {' | '.join(ratios)} |")
    return "\n".join([*lines, "", cpu_note(about, results)])


def cpu_note(about: dict[str, Any], results: Path) -> str:
    backend = f", {about['cpu_backend']}" if "cpu_backend" in about else ""
    commit = f", at {about['commit']}" if about.get("commit") else ""  # "" where there was no git
    source = f"benchmarks/results/{results.name}"
    return f"{about['cpu']}, {threads(about)}, torch {about['torch']}{backend}, float32{commit}; `{source}`."


def startup_table() -> str:
    report = read(STARTUP_RESULTS)
    first, last = report["classes"]
    rows, calls = report["rows"], report["call_seconds"]["cpu"]
    first_call, imported = calls["first"], report["import_seconds"]["torch"]
    compiled = report["compile_seconds"]
    # Files of before it was measured do not have it.
    cold = f"; as the first call of all it takes {calls['cold'] / calls['second']:.1f} times" if "cold" in calls else ""
    lines = [
        f"Importing torch and cot_kernels takes {report['import_ratio']:.2f} of the time of importing torch. The first "
        f"call of a loss of ours on a CPU, both passes at 128 x 1000, after one of `F.cross_entropy` has started what "
        f"PyTorch starts at its first passes, takes {first_call / imported:.1%} of that time, "
        f"{first_call / calls['second']:.1f} times the second call{cold}. On a GPU it waits for its kernels besides: "
        f"to compile them for an H100 takes, on this CPU, {compiled['empty'] / imported:.1f} times as long as "
        f"importing torch, and where a process before has done it {compiled['full'] / imported:.2f}. Kernel variants "
        "that one loss compiles for contiguous (rows, K) logits, forward and backward, over all K from "
        f"{first} to {last:,}:",
        "",
        f"| | {rows['many']:,} rows | {rows['few']} rows |",
        "|---|---:|---:|",
    ]
    for dtype, found in report["variants"].items():
        counts = (sum(found[name].values()) for name in ("many", "few"))
        lines.append(f"| {dtype} | {' | '.join(str(count) for count in counts)} |")
    about = report["environment"]
    note = f"Triton {about['triton']}, torch {about['torch']}, {about['cpu']}; `benchmarks/results/startup.json`."
    return "\n".join([*lines, "", note])


def linear_table() -> str:
    report = read(LINEAR_RESULTS)
    rows = [row for row in report["results"] if row["status"] == "ok"]
    lines = ["| | time / three products | peak memory |", "|---|---:|---:|"]
    for row in rows:
        lines.append(f"| {row['provider']} | {row['times']:.2f} | {row['peak_bytes'] / 2**20:.0f} MiB |")
    about = report["environment"]
    shape = f"{rows[0]['rows']} x {rows[0]['features']} -> {rows[0]['classes']}"
    note = (
        f"{shape}, float32, {about['cpu']}, {threads(about)}, torch {about['torch']}; `benchmarks/results/linear.json`."
    )
    return "\n".join([*lines, "", note])


def training_table() -> str:
    report = read(TRAINING_RESULTS)
    methods = list(next(iter(report["milliseconds"].values())))
    lines = [f"| | {' | '.join(methods)} |", "|---|" + "---:|" * len(methods)]
    for network, times in report["milliseconds"].items():
        ratios = (f"{times[method] / times['cross-entropy']:.2f}" for method in methods)
        lines.append(f"| {network} | {' | '.join(ratios)} |")
    about = report["environment"]
    return "\n".join([*lines, "", f"{about['cpu']}, {threads(about)}; `benchmarks/results/training.json`."])


def threads(about: dict[str, Any]) -> str:
    return f"{about['threads']} thread{'s' if about['threads'] != 1 else ''}"
