"""``python -m benchmarks.readme`` writes the tables of README and docs, between markers, from committed results."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.bounds import GPUS, both_passes
from benchmarks.cases import DTYPES
from benchmarks.reports import read
from examples.demo_report import markdown_table

ROOT = Path(__file__).parents[1]
CPU_RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
ATEN_RESULTS = ROOT / "benchmarks" / "results" / "cpu_aten.json"  # built without a compiler
GPU_RESULTS = [ROOT / "benchmarks" / "results" / f"gpu_{part}.json" for part in ("bf16", "fp32_fp16")]
GPU_KERNELS = ROOT / "benchmarks" / "results" / "gpu_kernels.json"
GPU_VARIANTS = ROOT / "benchmarks" / "results" / "gpu_variants.json"
GPU_HOST = ROOT / "benchmarks" / "results" / "gpu_host.json"
STARTUP_RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
DISPATCH_RESULTS = ROOT / "benchmarks" / "results" / "dispatch.json"
LINEAR_RESULTS = ROOT / "benchmarks" / "results" / "linear.json"
TRAINING_RESULTS = ROOT / "benchmarks" / "results" / "training.json"
NUMERICS_RESULTS = ROOT / "benchmarks" / "results" / "numerics.json"
KERNEL_RESULTS = ROOT / "benchmarks" / "results" / "compile_report.json"
DEMO_RESULTS = ROOT / "docs" / "demo" / "results.json"


def cpu_table() -> str:
    return suite_table(CPU_RESULTS)


def aten_table() -> str:
    return suite_table(ATEN_RESULTS)


def gpu_files() -> list[Path]:
    """Of the suite's parts, those that were measured; the first one is asked for where none was."""
    return [file for file in GPU_RESULTS if file.exists()] or GPU_RESULTS[:1]


def gpu_goals_table() -> str:
    return goals.table(goals.rows_of(gpu_files()))


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


def gpu_note(about: dict[str, Any], files: str) -> str:
    driver = f"driver {about['driver']}, " if about["driver"] else ""
    where = f"{about['device']}, {driver}torch {about['torch']}, Triton {about['triton']}"
    return f"{where}, at {about['commit']}; `benchmarks/results/{files}`."


def gpu_kernels_table() -> str:
    """Measured shares of a copy's bandwidth, what a row's own bytes leave of it, and what both passes are predicted."""
    report = read(GPU_KERNELS)
    predicted = {
        (layout if layout == "class-major" else "rows", classes, "bf16"): both_passes(*each.values())
        for (layout, classes), each in h200_shares().items()
        if len(each) == 2
    }
    usual = kernel_reports(target="sm_90", dtype="bf16", layout="long", classes=128256, few=False, call="mean")
    beside = sum(kernel["row_bytes"] for kernel in usual)
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


def h200_shares() -> dict[tuple[str, int], dict[str, float]]:
    """Predicted for an H200, of each kernel, in bfloat16."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for report in kernel_reports(target="sm_90", dtype="bf16", few=False, call="mean"):
        share = next(each for each in report["predicted"] if each["gpu"] == "H200")["share"]
        if not report["case"]["layout"].endswith(("sliced", "class-major, odd")):
            found.setdefault((report["case"]["layout"], report["case"]["classes"]), {})[report["kernel"]] = share
    return found


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
        classes = f"{min(ratios['classes']):,} to {max(ratios['classes']):,}".replace("128,256 to 128,256", "128,256")
        ranges = " | ".join(f"{min(ratios[name]):.2f} to {max(ratios[name]):.2f}" for name in ("loss", "backward"))
        lines.append(f"| {change} | {dtype}, {layout} | {classes} | {ranges} |")
    return "\n".join([*lines, "", gpu_note(report["environment"], GPU_VARIANTS.name)])


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


def suite_table(results: Path) -> str:
    """How many times faster than the published operations each provider of the suite is, on the CPU."""
    report = read(results)
    times: dict[str, dict[str, float]] = {}
    for row in report["results"]:
        if (row["mode"], row["upstream"], row["status"]) == ("both", 1, "ok"):
            times.setdefault(row["case"], {})[row["provider"]] = row["p50"]
    return ratio_table(times, report["environment"], results)


# Forward and backward of complement_entropy, times faster than the published operations.
CPU_GOALS = {"128 x 10": 1.3, "4096 x 100": 2.0, "1024 x 1000": 2.5, "512 x 32000": 6.0, "128 x 151936": 6.0}
MEMORY_GOAL = 1 / 3
BEATS_CROSS_ENTROPY = 32000  # from as many classes on, it should be faster than F.cross_entropy alone


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


def cpu_note(about: dict[str, Any], results: Path) -> str:
    source = results.relative_to(ROOT)
    backend = f", {about['cpu_backend']}" if "cpu_backend" in about else ""
    commit = f", at {about['commit']}" if about.get("commit") else ""  # "" where there was no git
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
    note = f"Triton {about['triton']}, torch {about['torch']}, {about['cpu']}; `{STARTUP_RESULTS.relative_to(ROOT)}`."
    return "\n".join([*lines, "", note])


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


def threads(about: dict[str, Any]) -> str:
    return f"{about['threads']} thread{'s' if about['threads'] != 1 else ''}"


def training_table() -> str:
    report = read(TRAINING_RESULTS)
    methods = list(next(iter(report["milliseconds"].values())))
    lines = [f"| | {' | '.join(methods)} |", "|---|" + "---:|" * len(methods)]
    for network, times in report["milliseconds"].items():
        ratios = (f"{times[method] / times['cross-entropy']:.2f}" for method in methods)
        lines.append(f"| {network} | {' | '.join(ratios)} |")
    about = report["environment"]
    return "\n".join([*lines, "", f"{about['cpu']}, {threads(about)}; `benchmarks/results/training.json`."])


def error_table(columns: dict[str, tuple[str, str]]) -> str:
    """Median and worst row of gradient errors; a column is a curve of the report and a dtype."""

    def cells(result: dict[str, Any]) -> list[str]:
        errors = (result["gradient_errors"][name][dtype] for name, dtype in columns.values())
        return [
            "NaN" if error["median"] is None else f"{short(error['median'])} ({short(error['worst'])})"
            for error in errors
        ]

    return margin_table(list(columns), cells)


def float32_table() -> str:
    return error_table({name: (name, "fp32") for name in ("published", "partials by autograd", "cot_kernels")})


def half_table() -> str:
    names = ("published", "cot_kernels")
    return error_table({f"{name}, {dtype}": (name, dtype) for dtype in ("bf16", "fp16") for name in names})


def eps_table() -> str:
    columns = {"`1 - p_g`": "miss", "loss": "loss_bias", "gradient": "gradient_bias", "`dl/dz_g`": "target_gradient"}
    return margin_table(list(columns), lambda result: [short(result["eps"][key]) for key in columns.values()])


def margin_table(headings: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> str:
    """A row for each number of classes and every fifth margin of benchmarks/numerics.py."""
    report = read(NUMERICS_RESULTS)
    lines = [f"| classes | margin | {' | '.join(headings)} |", "|---:|---:|" + "---:|" * len(headings)]
    for result in report["results"]:
        if result["margin"] % 5 == 0:
            lines.append(f"| {result['classes']} | {result['margin']} | {' | '.join(cells(result))} |")
    about = report["environment"]
    return "\n".join([*lines, "", f"{about['cpu']}, torch {about['torch']}; `benchmarks/results/numerics.json`."])


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


def short(value: float | None) -> str:
    if value is None:
        return "NaN"
    if 0.01 <= abs(value) < 100:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def demo_table() -> str:
    note = (
        "BBC News (2,060 distinct stories of the 2,225 articles, cut to 40 tokens), 16 articles a topic, mean ± "
        "standard deviation over 3 seeds; `docs/demo/results.json`. The complement weighs half a nat, in one step and "
        "in two; two-step CE is the control: cross-entropy with as many optimizer steps as COT takes. A demonstration, "
        "not a benchmark."
    )
    table = markdown_table(read(DEMO_RESULTS))
    return f"{table}\n\n{note}\n\n![Learning curves and the wrong classes' probabilities](docs/demo/demo.png)"


def fill(text: str, name: str, content: str) -> str:
    """The text with what stands between the two markers of a name replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page must hold the markers of {name!r} once, found {count}")
    return filled


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"cpu": cpu_table, "demo": demo_table},
    ROOT / "docs" / "pytorch.md": {"dispatch": dispatch_table},
    ROOT / "docs" / "kernels.md": {
        "kernels": kernel_table,
        "predictions": prediction_table,
        "layouts": layout_table,
    },
    ROOT / "docs" / "performance.md": {
        "goals": goals_table,
        "aten": aten_table,
        "gpu": gpu_table,
        "gpu-goals": gpu_goals_table,
        "gpu-kernels": gpu_kernels_table,
        "gpu-variants": gpu_variants_table,
        "gpu-host": gpu_host_table,
        "both": both_table,
        "startup": startup_table,
    },
    ROOT / "docs" / "linear.md": {"linear": linear_table},
    ROOT / "docs" / "training.md": {"training": training_table},
    ROOT / "docs" / "numerics.md": {"float32": float32_table, "half": half_table, "eps": eps_table},
}


def filled(page: Path) -> str:
    """The text of a page with the tables that the results call for."""
    text = page.read_text()
    for name, table in PAGES[page].items():
        try:
            content = table()
        except (LookupError, TypeError, StopIteration) as error:  # a results file without what the table says
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"results lack what the table {name!r} of {page.name} says: {said}") from error
        text = fill(text, name, content)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    try:
        texts = {page: filled(page) for page in PAGES}  # all of them before one is written
    except (OSError, ValueError) as error:
        parser.error(f"nothing was written: {error}")
    for page, text in texts.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
