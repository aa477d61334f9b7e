"""Tables of the compile report: what the kernels are in machine code, and what is predicted from that."""

from __future__ import annotations

from typing import Any

from benchmarks.bounds import GPUS, both_passes
from benchmarks.reports import RESULTS, read

KERNEL_RESULTS = RESULTS / "compile_report.json"


def kernel_table() -> str:
    """Rows of 128,256 classes."""
    lines = [
        "| kernel | target | logits | registers | occupancy | waits | KiB under way "
        "| loop | target | end | special | once |",
        "|---|---|---|" + "---:|" * 9,
    ]
    for report in kernel_reports(classes=128256, few=False):
        variant = [report["kernel"], report["case"]["target"], report["case"]["dtype"]]
        loop = " | ".join(f"{report[f'{turn}_per_logit']:.1f}" for turn in ("loop", "target", "end"))
        beside = f"{report['loop_special_per_logit']:.2f} | {report['once']}"
        waits = f"{report['waits'] or ''} | {report['bytes_in_flight'] >> 10}"
        residence = f"{report['registers']} | {100 * report['occupancy']:.0f} % | {waits}"
        lines.append(f"| {' | '.join(variant)} | {residence} | {loop} | {beside} |")
    about = read(KERNEL_RESULTS)["environment"]
    return "\n".join([*lines, "", f"Triton {about['triton']}; `benchmarks/results/compile_report.json`."])


def layout_table() -> str:
    """How every layout fares on an H200, in bfloat16: counts of sm_90, and the share of a copy's bandwidth."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    for report in kernel_reports(target="sm_90", dtype="bf16", few=False):
        case = report["case"]
        share = next(each for each in report["predicted"] if each["gpu"] == "H200")["share"]
        cell = f"{report['executed_per_logit']:.0f} | {report['registers']} | {100 * share:.0f} %"
        found.setdefault((case["layout"], case["classes"]), {})[report["kernel"]] = cell
    kernels = ("statistics", "gradient", "value_and_gradient")
    lines = [
        "| rows | classes | " + " | ".join(f"{name} | registers | share" for name in kernels) + " |",
        "|---|---:|" + "---:|" * 9,
    ]
    for (layout, classes), cells in found.items():
        listed = " | ".join(cells.get(kernel, " |  | ") for kernel in kernels)
        lines.append(f"| {layout} | {classes:,} | {listed} |")
    return "\n".join(lines)


def prediction_table() -> str:
    """What bounds each kernel in bfloat16 at 128,256 classes; see benchmarks/bounds.py."""
    lines = ["| kernel | GPU | bound | share of copy bandwidth | headroom |", "|---|---|---|---:|---:|"]
    for report in kernel_reports(classes=128256, few=False, dtype="bf16"):
        lines += [
            f"| {report['kernel']} | {each['gpu']} | {each['bound']} | {100 * each['share']:.0f} % "
            f"| {each['headroom']:.1f} |"
            for each in report["predicted"]
        ]
    return "\n".join(lines)


def both_table() -> str:
    """The share that both passes together are predicted to reach, of rows of 100 classes or more."""
    shares: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for report in kernel_reports(few=False, dtype="bf16", call="mean"):
        for each in report["predicted"]:
            kernels = shares.setdefault((report["case"]["layout"], report["case"]["classes"]), {})
            kernels.setdefault(each["gpu"], {})[report["kernel"]] = each["share"]
    names = [gpu.name for gpu in GPUS]
    lines = [f"| rows | classes | {' | '.join(names)} |", "|---|---:|" + "---:|" * len(names)]
    for (layout, classes), gpus in shares.items():
        if classes >= 100 and all(len(gpus[name]) == 2 for name in names):
            cells = [f"{both_passes(gpus[name]['statistics'], gpus[name]['gradient']):.2f}" for name in names]
            lines.append(f"| {layout} | {classes:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def h200_shares() -> dict[tuple[str, int], dict[str, float]]:
    """Predicted for an H200, of each kernel, in bfloat16."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for report in kernel_reports(target="sm_90", dtype="bf16", few=False, call="mean"):
        share = next(each for each in report["predicted"] if each["gpu"] == "H200")["share"]
        if not report["case"]["layout"].endswith(("sliced", "class-major, odd")):
            found.setdefault((report["case"]["layout"], report["case"]["classes"]), {})[report["kernel"]] = share
    return found


def kernel_reports(**wanted: Any) -> list[dict[str, Any]]:
    """Of benchmarks/compile_report.py: of the losses complement_entropy under a mean, of the linear ones the usual."""
    usual = {"mean": "complement_entropy", "in place": "cross_entropy"}
    reports: list[dict[str, Any]] = read(KERNEL_RESULTS)["reports"]
    return [
        report
        for report in reports
        if report["loop_per_logit"] is not None
        and usual.get(report["case"]["call"]) == report["case"]["objective"]
        and all(report["case"][key] == value for key, value in wanted.items())
    ]
