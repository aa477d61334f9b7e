"""Figures from results: ``python -m benchmarks.plots FILE ... --output DIRECTORY``.

Share of the copy's bandwidth and speed-up against the number of classes, memory, and the latency of small problems,
those that the results hold points for. Forward and backward together, with an upstream gradient that is not 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.arguments import output_folder
from benchmarks.cases import DTYPES
from benchmarks.providers import PROVIDERS
from benchmarks.reports import Report, comparable, read
from benchmarks.runner import COPY

Rows: TypeAlias = Sequence[dict[str, Any]]
Value: TypeAlias = Callable[[dict[str, Any]], float | None]  # of a row; None where it has none

BASELINE = "published"
LARGEST = 5  # points that a line of growth is fitted to: 10,000 to 100,000
ABSENT = "n/a"
BANDWIDTH = "forward and backward: bandwidth, counted bytes / time (higher is better)"
SPREAD = 30  # between the highest and the lowest point of a figure: beyond it the axis is logarithmic

# Up to so many logits a problem's time is mostly what its calls, and on a GPU its launches, cost.
SMALL_LOGITS, SMALL_LOGITS_GPU = 1 << 19, 1 << 22

# Okabe and Ito's palette; a provider has the same colour in every figure, and ours the solid lines.
_COLORS = ("#999999", "#56B4E9", "#000000", "#F0E442", "#CC79A7", "#D55E00", "#E69F00", "#0072B2", "#009E73", "#882255")
COLORS = {provider.name: color for provider, color in zip(PROVIDERS, _COLORS, strict=True)} | {COPY: "#6A3D9A"}
OTHERS = ("published", "published, compiled", "F.cross_entropy", "Liger cross_entropy", "quack cross_entropy", COPY)
OURS = [provider for provider in COLORS if provider not in OTHERS]


def timed(results: Rows, *, graph: bool = False) -> list[dict[str, Any]]:
    """The rows that were timed, of both passes together with an upstream gradient that is not 1, and of the copy."""
    return [
        row
        for row in results
        if row["status"] == "ok"
        and row["graph"] == graph
        and ((row["mode"] == "both" and row["upstream"] != 1) or row["mode"] == COPY)
    ]


def dtypes_of(rows: Rows) -> list[str]:
    return [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]


def about(environments: Iterable[Mapping[str, Any]]) -> str:
    """Of what device, by what and when: the figure's small print."""
    said: dict[str, None] = {}
    for each in environments:
        on_cpu = each["device"] == "cpu"
        said[each["cpu"] if on_cpu and each.get("cpu") else each["device"]] = None
        for key, text in (("threads", "{} threads"), ("torch", "torch {}"), ("commit", "at {}"), ("date", "{}")):
            if each.get(key) and (on_cpu or key != "threads"):
                said[text.format(each[key])] = None
    return ", ".join(said)


def roof_of(reports: Iterable[Report]) -> str:
    """The copy that shares are of; what fits a cache is faster than it."""
    sizes = {report["copy_bandwidth"]["bytes"] for report in reports if "copy_bandwidth" in report}
    return " or ".join(_size(size) for size in sorted(sizes))


def _size(size: int) -> str:
    return f"{size >> 30} GiB" if size >= 1 << 30 else f"{size >> 20} MiB"


def small_print(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="right", fontsize="x-small", color="0.4")


def panels(rows: Rows, title: str, label: str) -> tuple[Figure, list[tuple[str, Axes]]]:
    """A figure with a panel for each dtype that the rows have, one below the other."""
    dtypes = dtypes_of(rows)
    width = max(10.0, 0.9 * len({row["case"] for row in rows}))
    drawing = Figure(figsize=(width, 1.5 + 2.6 * len(dtypes)), dpi=130, layout="constrained")
    drawing.suptitle(title)
    axes = [row[0] for row in drawing.subplots(len(dtypes), 1, squeeze=False)]
    found = list(zip(dtypes, axes, strict=True))
    for dtype, each in found:
        each.set_title(dtype, loc="left", fontsize="medium")
        each.set_ylabel(label)
        each.grid(axis="y", color="0.9", linewidth=0.7)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return drawing, found


def lines(rows: Rows, title: str, roof: str, value: Value) -> Figure:
    """A share against the number of classes, a line a provider; of cases with as many classes, that of most rows."""
    drawing, found = panels(rows, title, "share of a copy's")
    sizes = sorted({row["classes"] for row in rows})
    for dtype, axes in found:
        for provider in COLORS:
            points: dict[int, dict[str, Any]] = {}
            for row in rows:
                if (row["provider"], row["dtype"]) == (provider, dtype) and value(row) is not None:
                    points[row["classes"]] = max(points.get(row["classes"], row), row, key=lambda each: each["rows"])
            if points:
                style = ":" if provider == COPY else "--" if provider in OTHERS else "-"
                classes = sorted(points)
                heights = [value(points[each]) or 0 for each in classes]
                places = [sizes.index(each) for each in classes]
                # The later the narrower: lines that lie on each other all show.
                wide = 1.4 * (len(OURS) - 1 - OURS.index(provider)) if provider in OURS else 0
                axes.plot(
                    places, heights, style, color=COLORS[provider], label=provider,
                    marker="o", linewidth=1.2 + wide, markersize=4 + 1.4 * wide,
                )  # fmt: skip
        every = [height for line in axes.get_lines() for height in np.asarray(line.get_ydata())]
        if max(every) > SPREAD * min(every):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(range(len(sizes)), [f"{each:,}" for each in sizes])
    found[-1][1].set_xlabel(f"classes; 1 is the bandwidth of a copy of {roof}, which what fits a cache exceeds")
    return with_legend(drawing, [axes for _, axes in found])


def bars(rows: Rows, title: str, label: str, value: Value, *, reference: float | None = None) -> Figure:
    """A group of bars a case, a bar a provider; a line at the reference."""
    drawing, found = panels(rows, title, label)
    for dtype, axes in found:
        some = [row for row in rows if row["dtype"] == dtype and value(row) is not None]
        cases = list(dict.fromkeys(row["case"] for row in some))
        providers = [provider for provider in COLORS if any(row["provider"] == provider for row in some)]
        width = 0.85 / max(len(providers), 1)
        marks: list[tuple[float, float | None]] = []
        for index, provider in enumerate(providers):
            heights = {row["case"]: value(row) for row in some if row["provider"] == provider}
            places = {case: place + (index - len(providers) / 2 + 0.5) * width for place, case in enumerate(cases)}
            there = {case: height for case in cases if (height := heights.get(case)) is not None}
            at, tall = [places[case] for case in there], list(there.values())
            axes.bar(at, tall, width, color=COLORS[provider], label=provider)
            marks.extend((places[case], there.get(case)) for case in cases)
        _mark(axes, marks)
        axes.set_xticks(range(len(cases)), cases)
        if len(cases) > 6:
            for text in axes.get_xticklabels():
                text.set(rotation=20, ha="right", rotation_mode="anchor")
        if reference is not None:
            axes.axhline(reference, color="0.2", linewidth=0.8)
    return with_legend(drawing, [axes for _, axes in found])


def _mark(axes: Axes, heights: Sequence[tuple[float, float | None]]) -> None:
    """What was not measured, and what is too low to be seen: either looks like no bar, which says zero."""
    low = 0.01 * max(height for _, height in heights if height is not None)
    for place, height in heights:
        if height is None or height < low:
            axes.annotate(
                ABSENT if height is None else "~ 0", (place, 0), (0, 2), textcoords="offset points", rotation=90,
                ha="center", va="bottom", fontsize="xx-small", color="0.3",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip


def with_legend(drawing: Figure, axes: Sequence[Axes]) -> Figure:
    handles = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    if any(text.get_text() == ABSENT for each in axes for text in each.texts):
        handles[f"{ABSENT}: not measured"] = Line2D([], [], linestyle="")
    drawing.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return drawing


def speedup_over(rows: Rows) -> Value:
    baseline = {(row["case"], row["dtype"]): row["p50"] for row in rows if row["provider"] == BASELINE}

    def speedup(row: dict[str, Any]) -> float | None:
        slow = baseline.get((row["case"], row["dtype"]))
        return None if slow is None or row["provider"] in (COPY, BASELINE) else slow / row["p50"]

    return speedup


def memory(row: dict[str, Any]) -> float | None:
    if row["peak_bytes"] is None:
        return None
    return float(row["peak_bytes"] / (row["rows"] * row["classes"] * DTYPES[row["dtype"]].itemsize))


def figures(results: Rows, said: str = "", roof: str = "much memory") -> dict[str, Figure]:
    """By file name, with what is said of the results and of the copy; a figure without points is left out."""
    rows = timed(results)
    most = SMALL_LOGITS_GPU if any(row["graph"] for row in results) else SMALL_LOGITS
    large = [row for row in rows if row["rows"] * row["classes"] > most]
    small = [row for row in rows if row["rows"] * row["classes"] <= most and row["provider"] != COPY]
    drawn: dict[str, Figure] = {}
    if any(row["copy_share"] is not None for row in large):
        drawn["roofline"] = lines(large, BANDWIDTH, roof, lambda row: row["copy_share"])
    speedup = speedup_over(rows)
    if any(speedup(row) for row in rows):
        title = "forward and backward: times faster than the published operations (higher is better)"
        drawn["speedup"] = bars(rows, title, "published / time", speedup, reference=1)
    if any(row["peak_bytes"] is not None for row in rows):
        held = [row for row in large if row["provider"] != COPY] or rows
        title = "forward and backward: peak memory beside the logits (lower is better)"
        drawn["memory"] = bars(held, title, "peak / size of the logits", memory)
    if small:
        title = "small problems, forward and backward: median time (lower is better)"
        drawn["latency"] = bars(small, title, "microseconds", lambda row: row["p50"])
    replayed = timed(results, graph=True)
    graphs = [row for row in replayed if row["rows"] * row["classes"] <= most and row["provider"] != COPY]
    if graphs:
        title = "small problems in a CUDA graph, forward and backward: median time (lower is better)"
        drawn["latency_graph"] = bars(graphs, title, "microseconds", lambda row: row["p50"])
    graphs = [row for row in replayed if row["rows"] * row["classes"] > most and row["copy_share"] is not None]
    if graphs:
        drawn["roofline_graph"] = lines(graphs, f"in a CUDA graph, {BANDWIDTH}", roof, lambda row: row["copy_share"])
    for figure in drawn.values():
        small_print(figure.axes[0], said)
    return drawn


def growth(results: Rows, said: str = "") -> Figure:
    """Time and memory against rows and against classes, of benchmarks/growth.py; the thin lines are linear."""
    drawing = Figure(figsize=(9.5, 7.4), dpi=130, layout="constrained")
    drawing.suptitle("forward and backward, float32: how time and memory grow (lower is better)")
    grid = drawing.subplots(2, 2, sharex="col")
    for row, (key, label) in enumerate((("p50", "microseconds, both passes"), ("peak_bytes", "peak bytes"))):
        for column, (along, fixed) in enumerate((("rows", "classes"), ("classes", "rows"))):
            axes = grid[row][column]
            for provider in dict.fromkeys(result["provider"] for result in results):
                found = [each for each in results if (each["provider"], each["along"]) == (provider, along)]
                sizes, values = [each[along] for each in found], [each[key] for each in found]
                axes.plot(sizes, values, color=COLORS[provider], marker="o", markersize=3, label=provider)
                # The median: the last point is off where tensors outgrow what the allocator keeps.
                one = median(value / size for value, size in list(zip(values, sizes, strict=True))[-LARGEST:])
                axes.plot(sizes, [one * size for size in sizes], color=COLORS[provider], linewidth=0.6, alpha=0.6)
            axes.set(xscale="log", yscale="log", ylabel=label, xlabel=f"{along}, at {found[0][fixed]} {fixed}")
            axes.set_ylim(min(each[key] for each in results) / 2, max(each[key] for each in results) * 2)
            axes.grid(color="0.9", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].plot([], [], color="0.3", linewidth=0.6, label=f"thin: linear, the median of the last {LARGEST}")
    small_print(grid[0][1], said)
    return with_legend(drawing, [grid[0][0]])


def widths(results: Rows) -> Figure:
    """The predictions of benchmarks/widths.py."""
    drawing = Figure(figsize=(9.5, 4.2), dpi=130, layout="constrained")
    axes = drawing.subplots()
    axes.set_title("predicted from compiled code, both passes, bfloat16, 2^28 logits", fontsize="medium")
    gpus = list(dict.fromkeys(result["gpu"] for result in results))
    for gpu, color in zip(gpus, ("#56B4E9", "#009E73", "#0072B2", "#D55E00"), strict=True):
        for odd, style in ((False, "-"), (True, "--")):
            found = [result for result in results if (result["gpu"], result["odd"]) == (gpu, odd)]
            label = None if odd else gpu
            axes.plot(
                [each["classes"] for each in found], [each["both"] for each in found],
                color=color, linestyle=style, linewidth=1.2, marker=".", markersize=3, label=label,
            )  # fmt: skip
    axes.plot([], [], color="0.3", linestyle="--", linewidth=1.2, label="an odd number of classes")
    axes.axhline(0.9, color="0.4", linewidth=0.8, linestyle=":", label="goal from 1,000 classes on")
    axes.set(xscale="log", xlabel="classes", ylabel="share of a copy's bandwidth", ylim=(0, 1.04))
    axes.set_xticks([10, 100, 1000, 10000, 100000], ["10", "100", "1,000", "10,000", "100,000"])
    axes.grid(color="0.9", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    return drawing


def kernels(results: Rows, predictions: Rows, said: str = "") -> Figure:
    """Those of benchmarks/kernels.py, of rows that adjoin, beside what benchmarks/widths.py predicts in bfloat16."""
    rows = [row for row in results if row["layout"] == "rows" and "both_share" in row]
    dtypes = dtypes_of(rows)
    drawing = Figure(figsize=(9.5, 1.0 + 2.9 * len(dtypes)), dpi=130, layout="constrained")
    drawing.suptitle("measured, 2^28 logits: share of a copy's bandwidth (higher is better)", fontsize="medium")
    panels = [row[0] for row in drawing.subplots(len(dtypes), 1, squeeze=False, sharex=True)]
    for dtype, axes in zip(dtypes, panels, strict=True):
        for name, color in (("forward", "#56B4E9"), ("backward", "#0072B2"), ("both", "#D55E00")):
            for aligned, style in ((True, "-"), (False, "")):
                found = [row for row in rows if row["dtype"] == dtype and aligned == (row["classes"] % 8 == 0)]
                label = {"both": "both passes, with all launches"}.get(name, f"{name} kernel") if aligned else None
                axes.plot(
                    [row["classes"] for row in found], [row[f"{name}_share"] for row in found],
                    color=color, linewidth=1.4, linestyle=style, marker="o" if aligned else "x", markersize=4,
                    label=label,
                )  # fmt: skip
        axes.plot([], [], color="0.3", linestyle="", marker="x", markersize=4, label="classes not in whole accesses")
        if dtype == "bf16":
            for odd, style in ((False, "--"), (True, ":")):
                some = [row for row in predictions if row["odd"] == odd]
                label = f"predicted of the kernels of now{', an odd number of classes' if odd else ''}"
                axes.plot(
                    [row["classes"] for row in some], [row["both"] for row in some],
                    color="0.5", linewidth=1.0, linestyle=style, label=label,
                )  # fmt: skip
        axes.axhline(0.9, color="0.4", linewidth=0.8, linestyle="-.", label="goal from 1,000 classes on")
        axes.set_title(dtype, loc="left", fontsize="medium")
        axes.set(xscale="log", ylabel="share of a copy's bandwidth", ylim=(0, 1.1))
        axes.grid(color="0.9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small", loc="lower right")
    small_print(panels[0], said)
    panels[-1].set_xlabel("classes")
    panels[-1].set_xticks([10, 100, 1000, 10000, 100000], ["10", "100", "1,000", "10,000", "100,000"])
    return drawing


def write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def results_file(text: str) -> tuple[Path, Report]:
    """For argparse: a results file and what it holds."""
    try:
        report = read(Path(text))
        if "device" not in report["environment"]:
            raise KeyError
        for row in report["results"]:
            place = {"along"} if "along" in row else {"case", "dtype"}
            if not row.keys() >= {"provider", "p50", "peak_bytes", "classes"} | place:
                raise KeyError
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        wanted = "expected a file of python -m benchmarks, or of python -m benchmarks.growth"
        raise argparse.ArgumentTypeError(f"{text!r} holds other results: {wanted}") from error
    return Path(text), report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=results_file, nargs="+",
        help="JSON files of python -m benchmarks, each case in one of them, or of python -m benchmarks.growth",
    )  # fmt: skip
    parser.add_argument("--output", type=output_folder, required=True, help="directory for the PNG files")
    parser.add_argument("--prefix", default="", help="of the files' names")
    options = parser.parse_args(arguments)
    try:
        rows = comparable(dict(options.results))
    except ValueError as error:
        parser.error(str(error))
    grown = [row for row in rows if "along" in row]
    said = about(report["environment"] for _, report in options.results)
    roof = roof_of(report for _, report in options.results)
    drawn = figures([row for row in rows if "along" not in row], said, roof)
    if grown:
        drawn["growth"] = growth(grown, said)
    if not drawn:
        parser.error(f"nothing to draw: got {len(rows)} rows, none of both passes that was timed; measure again")
    for name, figure in drawn.items():
        write(figure, options.output / f"{options.prefix}{name}.png")


if __name__ == "__main__":
    main()
