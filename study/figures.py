"""Draws a report: what each method gained over cross-entropy, and how the weight of a nat matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .report import Report

WIDTH = 10.0


def draw(report: Report, folder: Path) -> list[Path]:
    """The files written."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, make in (("gains.png", gains), ("weights.png", weights)):
        figure = make(report)
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
        plt.close(figure)
        drawn.append(folder / name)
    return drawn


def gains(report: Report) -> Any:
    """Paired differences to cross-entropy, with 95 % intervals: a panel a task, a line a method."""
    tasks = [task for task in report["tasks"] if any("score_minus_ce" in row for row in task["methods"])]
    labels = list(dict.fromkeys(row["label"] for task in tasks for row in task["methods"] if row["method"] != "ce"))
    columns = 3
    rows = max(1, -(-len(tasks) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, 0.6 + 3.0 * rows), sharey=True, squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for row in task["methods"]:
            if row["method"] == "ce" or "score_minus_ce" not in row:
                continue
            gain = row["score_minus_ce"]
            ours = row["method"].startswith(("cot", "cce", "gce"))
            axis.errorbar(
                100 * gain["mean"], labels.index(row["label"]), xerr=100 * (gain["half_width"] or 0.0),
                fmt="o", markersize=4, color="tab:blue" if ours else "tab:gray", capsize=2,
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(task["label"], fontsize=10)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    for axis in list(axes.flat)[len(tasks) :]:
        axis.axis("off")
    axes[0, 0].invert_yaxis()
    figure.supxlabel(
        "points of accuracy (entities: F1) over cross-entropy, 95 % interval of the paired difference", fontsize=9
    )
    figure.tight_layout()
    return figure


def weights(report: Report) -> Any:
    """Validation figures of one-step complement cross-entropy by the weight of a nat, less those of cross-entropy."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6))
    for task in report["tasks"]:
        curve = {point["weight"]: point for point in task["weights"]}
        start = curve.pop(0.0, None)
        if start is None or not curve:
            continue
        found = list(curve)
        axes[0].plot(
            found, [100 * (curve[each]["score"] - start["score"]) for each in found], "o-", label=task["label"]
        )
        axes[1].plot(found, [curve[each]["nll"] - start["nll"] for each in found], "o-", label=task["label"])
    for axis, text in zip(axes, ("points of score over cross-entropy", "NLL less cross-entropy's"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("weight of a nat of complement entropy")
        axis.set_ylabel(text)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    return figure
