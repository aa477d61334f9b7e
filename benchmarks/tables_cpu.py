"""Tables of what was measured on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.reports import RESULTS, read

CPU_RESULTS = RESULTS / "cpu.json"
ATEN_RESULTS = RESULTS / "cpu_aten.json"  # built without a compiler
STARTUP_RESULTS = RESULTS / "startup.json"
DISPATCH_RESULTS = RESULTS / "dispatch.json"
LINEAR_RESULTS = RESULTS / "linear.json"
TRAINING_RESULTS = RESULTS / "training.json"

# Forward and backward of complement_entropy, times faster than the published operations.
CPU_GOALS = {"128 x 10": 1.3, "4096 x 100": 2.0, "1024 x 1000": 2.5, "512 x 32000": 6.0, "128 x 151936": 6.0}
MEMORY_GOAL = 1 / 3
BEATS_CROSS_ENTROPY = 32000  # from as many classes on, it should be faster than F.cross_entropy alone


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
    report = read(CPU_RESULTS)
    rows = {
        (row["case"], row["provider"]): row
        for row in report["results"]
        if (row["mode"], row["upstream"], row["status"]) == ("both", 1, "ok")
    }
    lines = [
        "| rows x classes | published / ours, time | goal | F.cross_entropy / ours, time | goal "
        "| ours / published, peak memory | goal |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, goal in CPU_GOALS.items():
        names = ("published", "F.cross_entropy", "complement_entropy")
        published, plain, ours = (rows[case, name] for name in names)
        beats = "1" if ours["classes"] >= BEATS_CROSS_ENTROPY else ""
        speed, beside = published["p50"] / ours["p50"], plain["p50"] / ours["p50"]
        memory = ours["peak_bytes"] / published["peak_bytes"]
        lines.append(f"| {case} | {speed:.2f} | {goal:g} | {beside:.2f} | {beats} | {memory:.2f} | {MEMORY_GOAL:.2f} |")
    return "\n".join([*lines, "", cpu_note(report["environment"], CPU_RESULTS)])


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
    lines = [
        f"Importing torch and cot_kernels takes {report['import_ratio']:.2f} of the time of importing torch. The first "
        f"call of a loss on a CPU, both passes at 128 x 1000, takes {first_call / imported:.1%} of that time, "
        f"{first_call / calls['second']:.1f} times the second call. On a GPU it waits for its kernels besides: to "
        f"compile them for an H100 takes, on this CPU, {compiled['empty'] / imported:.1f} times as long as importing "
        f"torch, and where a process before has done it {compiled['full'] / imported:.2f}. Kernel variants that one "
        f"loss compiles for "
        f"contiguous (rows, K) logits, forward and backward, over all K from {first} to {last:,}:",
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
