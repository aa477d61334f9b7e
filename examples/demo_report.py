"""What the demo reports: a table of its methods, what its words mean, and the outcome in a paragraph.

All of it from the results alone, whoever wins: `python -m examples.demo --from results.json` reports an earlier run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Results = dict[str, Any]
"""What results.json holds: "title", "config", "versions", "machine", "methods" and "runs"."""


@dataclass(frozen=True)
class Metric:
    """A column of the table."""

    key: str
    heading: str
    unit: str
    factor: float
    decimals: int

    def format(self, value: float, *, signed: bool = False) -> str:
        rounded = round(self.factor * value, self.decimals) + 0.0  # no "-0.000"
        return f"{rounded:{'+' if signed else ''}.{self.decimals}f}"


METRICS = (
    Metric("accuracy", "accuracy, %", " points", 100, 1),
    Metric("macro_f1", "macro-F1, %", " points", 100, 1),
    Metric("negative_log_likelihood", "negative log-likelihood", " nats", 1, 3),
    Metric("complement_entropy", "complement entropy, nats", " nats", 1, 3),
    Metric("seconds", "seconds", " s", 1, 0),
)


def summary(results: Results) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Mean and standard deviation over seeds: `summary(results)[method][metric]`."""
    return {
        method["key"]: {
            metric.key: mean_and_deviation(
                [run[metric.key] for run in results["runs"] if run["method"] == method["key"]]
            )
            for metric in METRICS
        }
        for method in results["methods"]
    }


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; the latter None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def table_rows(results: Results) -> list[list[str]]:
    """The heading and a row per method, as text."""
    rows = [["method", *(metric.heading for metric in METRICS)]]
    figures = summary(results)
    for method in results["methods"]:
        cells = []
        for metric in METRICS:
            mean, deviation = figures[method["key"]][metric.key]
            spread = "" if deviation is None else f" ± {metric.format(deviation)}"
            cells.append(metric.format(mean) + spread)
        rows.append([method["label"], *cells])
    return rows


def notes(results: Results) -> list[str]:
    """What the table's words mean."""
    config = results["config"]
    texts = config["texts"]
    seeds, epochs = config["seeds"], config["epochs"]
    spread = "" if seeds == 1 else f"Mean ± standard deviation over {seeds} seeds. "
    return [
        f"{spread}Each seed draws its own {texts['train']} articles to train on and {texts['test']} to test "
        f"on, the same for all methods. Seconds are those of training, {epochs} epoch{'s' * (epochs > 1)}.",
        f"Complement entropy: how evenly the wrong classes share what the true class leaves, at most "
        f"ln {len(results['runs'][0]['wrong_class_shares'])}.",
        *(f"{method['label']}: {method['description']}." for method in results["methods"]),
    ]


def conclusion(results: Results) -> str:
    """The outcome in a paragraph, from the figures alone.

    Methods are compared seed by seed. A difference is beyond its spread when its mean over seeds exceeds its
    standard deviation over seeds.
    """
    figures = summary(results)
    label = {method["key"]: method["label"] for method in results["methods"]}
    accuracy = METRICS[0]
    means = {key: figures[key]["accuracy"][0] for key in label}
    top = accuracy.format(max(means.values()))
    best = ", ".join(label[key] for key in label if accuracy.format(means[key]) == top)
    sentences = [f"Highest mean accuracy: {top} % ({best})."]
    for other in ("two_step_cross_entropy", "cross_entropy"):
        differences = []
        for metric in METRICS[:1] + METRICS[2:4]:
            mean, deviation = _difference(results, metric, "two_step_cot", other)
            text = f"{metric.format(mean, signed=True)}{metric.unit} of {metric.heading.split(',')[0]}"
            if deviation is not None:
                beyond = abs(mean) > deviation
                text += f" ({'beyond' if beyond else 'within'} its spread, ± {metric.format(deviation)})"
            differences.append(text)
        sentences.append(f"Against {label[other]}, seed by seed, {label['two_step_cot']} has {', '.join(differences)}.")
    seeds = results["config"]["seeds"]
    if seeds == 1:
        sentences.append("One seed shows no spread: none of these differences means much by itself.")
    else:
        sentences.append(f"{seeds} seeds on one small data set are a demonstration, not a benchmark.")
    return " ".join(sentences)


def _difference(results: Results, metric: Metric, method: str, other: str) -> tuple[float, float | None]:
    values = {(run["method"], run["seed"]): run[metric.key] for run in results["runs"]}
    seeds = sorted({run["seed"] for run in results["runs"]})
    return mean_and_deviation([values[method, seed] - values[other, seed] for seed in seeds])


def markdown_table(results: Results) -> str:
    """The table in Markdown."""
    heading, *rows = table_rows(results)
    rule = ["---", *("---:" for _ in METRICS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, rule, *rows])


def print_report(results: Results, console: Console) -> None:
    heading, *rows = table_rows(results)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(heading):
        # Two-line headings and unbroken figures: the table fits a terminal of 80 columns.
        table.add_column(name.replace(" ", "\n", 1), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{results['title']}\n", style="bold", highlight=False)
    console.print(table)
    console.print()
    for note in notes(results):
        console.print(note, style="dim", highlight=False)
    console.print()
    console.print(conclusion(results), highlight=False)
