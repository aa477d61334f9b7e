"""The predictions beside what a GPU measured: of each kernel and width that benchmarks.kernels timed.

``python -m benchmarks.model --measured FILE --output FILE --figure FILE`` compiles what was timed, without a GPU, and
counts what a warp of it does. It must be run at the commit that was timed, for the kernels must be those.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import reports
from benchmarks.arguments import needs_the_compiler, output_file
from benchmarks.bounds import GPUS, Gpu, deviations
from benchmarks.compile_report import read
from benchmarks.environment import environment
from benchmarks.launches import Case, launches
from benchmarks.progress import progress
from benchmarks.widths import case_of

PASSES = {"statistics": "forward", "gradient": "backward"}


def case_that_was_timed(row: dict[str, Any], gpu: Gpu) -> Case:
    if row["layout"] == "rows":
        return case_of(row["classes"], gpu.target, row["dtype"])
    return Case("mean", "class-major", row["classes"], row["dtype"], gpu.target, "complement_entropy")


def count(row: dict[str, Any], gpu: Gpu) -> list[dict[str, Any]]:
    """A row for each of its two kernels: what a warp does, the share predicted from that, and the one measured."""
    found = []
    for launch in launches(case_that_was_timed(row, gpu)):
        if launch.kernel in PASSES:
            report = read(case_that_was_timed(row, gpu), launch)
            assert report.work is not None
            (share,) = (each.share for each in report.predicted if each.gpu == gpu.name)
            found.append(
                {
                    **{name: row[name] for name in ("layout", "classes", "dtype")},
                    "kernel": launch.kernel,
                    "registers": report.registers,
                    "work": asdict(report.work),
                    "predicted": round(share, 4),
                    "measured": row[f"{PASSES[launch.kernel]}_share"],
                }
            )
    return found


def draw(rows: Sequence[dict[str, Any]], device: str, path: Path) -> None:
    """Each kernel and width, measured against predicted: on the line where both are the same."""
    from matplotlib.figure import Figure  # only where a figure is wanted

    drawing = Figure(figsize=(9.0, 5.4), dpi=130, layout="constrained")
    drawing.suptitle(f"Share of a copy's bandwidth on an {device}: measured against predicted")
    panels = drawing.subplots(1, 2, sharex=True, sharey=True)
    for axes, dtype in zip(panels, ("bf16", "fp32"), strict=True):
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=0)
        for kernel, color, marker in (("statistics", "#0072B2", "o"), ("gradient", "#D55E00", "^")):
            for layout, face in (("rows", color), ("class-major", "none")):
                some = [row for row in rows if (row["kernel"], row["dtype"], row["layout"]) == (kernel, dtype, layout)]
                axes.scatter(
                    [row["predicted"] for row in some],
                    [row["measured"] for row in some],
                    s=26, marker=marker, facecolors=face, edgecolors=color, label=f"{kernel}, {layout}",
                )  # fmt: skip
        axes.set(title=dtype, xlabel="predicted from counts", xlim=(0, 1.08), ylim=(0, 1.08), aspect="equal")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("measured (higher is faster)")
    panels[0].legend(fontsize=8, loc="lower right")
    drawing.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="JSON file of benchmarks.kernels")
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--figure", type=output_file, help="PNG file to write")
    options = parser.parse_args(arguments)
    needs_the_compiler(parser)
    try:
        report = reports.read(options.measured)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    device = report["environment"]["device"]
    gpus = [gpu for gpu in GPUS if gpu.name in device.split()]
    if not gpus:
        parser.error(f"predictions are of {', '.join(gpu.name for gpu in GPUS)}; {options.measured} is of {device}")
    timed = [row for row in report["results"] if "message" not in row]
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(2) as pool, progress(len(timed)) as advance:
        for row, found in zip(timed, pool.map(count, timed, gpus * len(timed), chunksize=4), strict=True):
            advance("{layout}, {classes} classes, {dtype}".format(**row))
            results.extend(found)
    about = {**environment(1), "device": device, "timed_at": report["environment"]["commit"]}
    if options.output:
        reports.write(options.output, {"environment": about}, results)
    if options.figure:
        draw(results, device, options.figure)
    for kernel in PASSES:
        mean, spread = deviations([row for row in results if row["kernel"] == kernel])
        print(f"{kernel}: measured {mean:+.3f} beside predicted, root mean square {spread:.3f}")


if __name__ == "__main__":
    main()
