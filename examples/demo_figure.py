"""The demo's figure, drawn without matplotlib's global state (no display, no pyplot)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from examples.demo_report import mean_and_deviation

# Okabe and Ito's palette, told apart by colour-blind readers too; dashes repeat what colour says.
STYLES = (("#000000", "-"), ("#E69F00", "-."), ("#0072B2", "-"), ("#999999", "--"), ("#009E73", ":"))


def comparison_figure(results: Mapping[str, Any]) -> Figure:
    """Learning curves and the wrong classes' shares of the methods compared in `results`.

    Args:
        results: "methods", each with "key" and "label", and "runs", each with "method", "seed", "curve" (a
            list of "epoch", "validation_loss" and "validation_accuracy") and "wrong_class_shares" (the test
            mean of the probabilities of the wrong classes given that the answer is wrong, largest first).

    Lines and bars are means over seeds, bands and whiskers one standard deviation.
    """
    figure = Figure(figsize=(13, 4.6), dpi=150, layout="constrained")
    accuracy, loss, shares = figure.subplots(1, 3)
    for index, method in enumerate(results["methods"]):
        runs = [run for run in results["runs"] if run["method"] == method["key"]]
        color, dashes = STYLES[index % len(STYLES)]
        style = {"color": color, "linestyle": dashes, "label": method["label"]}
        _curve(accuracy, runs, "validation_accuracy", style)
        _curve(loss, runs, "validation_loss", style)
        _bars(shares, [run["wrong_class_shares"] for run in runs], index, len(results["methods"]), color)

    accuracy.set(title="Validation accuracy", xlabel="epoch")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    loss.set(title="Validation loss (cross-entropy, nats)", xlabel="epoch")
    count = len(results["runs"][0]["wrong_class_shares"])
    shares.axhline(1 / count, color="0.5", linewidth=0.8, zorder=0)
    shares.annotate(
        f"even: 1/{count}",
        (0.99, 1 / count),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color="0.4",
    )
    shares.set(
        title="Probability among the wrong classes",
        xlabel="wrong classes of a test article, likeliest first",
        xticks=range(count),
        xticklabels=[_ordinal(rank) for rank in range(1, count + 1)],
        ylim=(0, None),
    )
    shares.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (accuracy, loss, shares):
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (accuracy, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="0.9", linewidth=0.8)
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=3.5)
    seeds = len({run["seed"] for run in results["runs"]})
    spread = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(f"{results['title']} ({spread})", fontsize="medium")
    return figure


def _curve(axes: Axes, runs: Sequence[Mapping[str, Any]], name: str, style: Mapping[str, Any]) -> None:
    epochs = [point["epoch"] for point in runs[0]["curve"]]
    columns = list(zip(*([point[name] for point in run["curve"]] for run in runs), strict=True))
    means, deviations = zip(*map(mean_and_deviation, columns), strict=True)
    low = [mean - (deviation or 0) for mean, deviation in zip(means, deviations, strict=True)]
    high = [mean + (deviation or 0) for mean, deviation in zip(means, deviations, strict=True)]
    axes.plot(epochs, means, linewidth=2, marker="o", markersize=3.5, **style)
    axes.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _bars(axes: Axes, shares: Sequence[Sequence[float]], index: int, count: int, color: str) -> None:
    means, deviations = zip(*map(mean_and_deviation, zip(*shares, strict=True)), strict=True)
    width = 0.8 / count
    positions = [rank + (index - (count - 1) / 2) * width for rank in range(len(means))]
    whiskers = [deviation or 0 for deviation in deviations]
    axes.bar(positions, means, 0.9 * width, yerr=whiskers, color=color, error_kw={"linewidth": 0.8})


def _ordinal(rank: int) -> str:
    return f"{rank}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(rank, 'th') }"
