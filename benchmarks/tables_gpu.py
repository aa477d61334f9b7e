"""Tables of what was measured on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.bounds import both_passes, deviations
from benchmarks.cases import DTYPES
from benchmarks.reports import RESULTS, read
from benchmarks.tables_compiled import h200_shares, kernel_reports

GPU_RESULTS = [RESULTS / f"gpu_{part}.json" for part in ("bf16", "fp32_fp16")]
GPU_KERNELS = RESULTS / "gpu_kernels.json"
GPU_MODEL = RESULTS / "gpu_model.json"
GPU_VARIANTS = RESULTS / "gpu_variants.json"
GPU_HOST = RESULTS / "gpu_host.json"


def gpu_files() -> list[Path]:
    """Of the suite's parts, those that were measured; the first one is asked for where none was."""
    return [file for file in GPU_RESULTS if file.exists()] or GPU_RESULTS[:1]


def gpu_goals_table() -> str:
    return goals.table(*goals.results_of(gpu_files()))


def gpu_table() -> str:
    """Both passes of the suite's cases in replays of a CUDA graph, where the device waits for nothing."""
    files = gpu_files()
    reports = [read(file) for file in files]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in (row for report in reports for row in report["results"]):
        if (row["mode"], row["upstream"], row["status"], row["graph"]) == ("both", 0.37, "ok", True):
            found.setdefault((row["case"], row["dtype"]), {})[row["provider"]] = row
    lines = [
        "| rows x classes | | complement_entropy, us | share of a copy's bandwidth | complement_cross_entropy, us "
        "| F.cross_entropy / ours | published / ours |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (case, dtype), rows in found.items():
        if not (ours := rows.get("complement_entropy")):
            continue
        both = rows.get("complement_cross_entropy")
        others = [rows.get(name) for name in ("F.cross_entropy", "published")]
        ratios = (f"{other['p50'] / ours['p50']:.1f}" if other else "" for other in others)
        together = f"{both['p50']:.1f}" if both else ""
        lines.append(
            f"| {case} | {dtype} | {ours['p50']:.1f} | {ours['copy_share']:.2f} | {together} | {' | '.join(ratios)} |"
        )
    parts = ",".join(file.stem.removeprefix("gpu_") for file in files)
    named = f"gpu_{{{parts}}}.json" if len(files) > 1 else files[0].name
    return "\n".join([*lines, "", gpu_note(reports[0]["environment"], named)])


def gpu_kernels_table() -> str:
    """Measured shares of a copy's bandwidth, what a row's own bytes leave of it, and what both passes are predicted."""
    report = read(GPU_KERNELS)
    predicted = {
        (layout if layout == "class-major" else "rows", classes, "bf16"): both_passes(*each.values())
        for (layout, classes), each in h200_shares().items()
        if len(each) == 2
    }
    usual = kernel_reports(target="sm_90", dtype="bf16", layout="long", classes=128256, few=False, call="mean")
    beside = sum(128256 * kernel["work"]["row_bytes"] for kernel in usual)
    lines = [
        "| | classes | forward | backward | both passes | bytes allow | predicted |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["results"]:
        if "message" in row:  # it failed, or time ran out
            continue
        logits = 3 * row["classes"] * DTYPES[row["dtype"]].itemsize
        expected = predicted.get((row["layout"], row["classes"], row["dtype"]))
        said = "" if expected is None else f"{expected:.2f}"
        shares = " | ".join(f"{row[f'{name}_share']:.2f}" for name in ("forward", "backward", "both"))
        allowed = f"{logits / (logits + beside):.2f}"
        lines.append(f"| {row['dtype']}, {row['layout']} | {row['classes']:,} | {shares} | {allowed} | {said} |")
    return "\n".join([*lines, "", gpu_note(report["environment"], GPU_KERNELS.name)])


def gpu_model_table() -> str:
    """How far what was measured lies from what is predicted of the same kernels."""
    report = read(GPU_MODEL)
    lines = [
        "| kernel | | widths | measured | predicted | measured less predicted, mean | root mean square |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in report["results"]):
        rows = [row for row in report["results"] if (row["kernel"], row["dtype"]) == (kernel, dtype)]
        ranges = (
            f"{min(row[side] for row in rows):.2f} to {max(row[side] for row in rows):.2f}"
            for side in ("measured", "predicted")
        )
        mean, spread = deviations(rows)
        lines.append(f"| {kernel} | {dtype} | {len(rows)} | {' | '.join(ranges)} | {mean:+.3f} | {spread:.3f} |")
    about = report["environment"]
    timed = f"Timed on an {about['device']} at {about['timed_at']}; counted at the same commit with Triton"
    return "\n".join([*lines, "", f"{timed} {about['triton']}; `benchmarks/results/{GPU_MODEL.name}`."])


def gpu_variants_table() -> str:
    """How many times as fast each change to the tiles made the kernels, over the class counts it was tried at."""
    report = read(GPU_VARIANTS)
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in report["results"]:
        # Those at the other commit were of half as many logits, where waves of programs count for more.
        if row["commit"] != "27bd3ff" or "; " in row["change"]:
            continue
        ratios = found.setdefault((row["change"], row["dtype"], row["layout"]), {"classes": []})
        ratios["classes"].append(row["classes"])
        for name in ("loss", "backward"):
            ratios.setdefault(name, []).append(row[f"before_{name}_us"] / row[f"{name}_us"])
    lines = ["| change | | classes | loss | gradient |", "|---|---|---:|---:|---:|"]
    for (change, dtype, layout), ratios in found.items():
        classes = span(min(ratios["classes"]), max(ratios["classes"]))
        ranges = " | ".join(f"{min(ratios[name]):.2f} to {max(ratios[name]):.2f}" for name in ("loss", "backward"))
        lines.append(f"| {change} | {dtype}, {layout} | {classes} | {ranges} |")
    return "\n".join([*lines, "", gpu_note(report["environment"], GPU_VARIANTS.name)])


def span(low: float, high: float) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def gpu_host_table() -> str:
    """Microseconds of the host, forward and both passes, before and after launches were prepared."""
    report = read(GPU_HOST)
    rows = report["results"]
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    lines = [
        "| rows x classes | | " + " | ".join(f"{commit}: forward | both" for commit in commits) + " |",
        "|---|---|" + "---:|" * (2 * len(commits)),
    ]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        place = (f"{row['rows']} x {row['classes']}, {row['dtype']}", row["loss"])
        found.setdefault(place, {})[row["commit"]] = f"{row['forward']:.0f} | {row['both']:.0f}"
    for (case, loss), cells in found.items():
        lines.append(f"| {case} | {loss} | {' | '.join(cells.get(commit, ' | ') for commit in commits)} |")
    return "\n".join([*lines, "", gpu_note(report["environment"], GPU_HOST.name)])


def gpu_note(about: dict[str, Any], files: str) -> str:
    driver = f"driver {about['driver']}, " if about["driver"] else ""
    where = f"{about['device']}, {driver}torch {about['torch']}, Triton {about['triton']}"
    return f"{where}, at {about['commit']}; `benchmarks/results/{files}`."
