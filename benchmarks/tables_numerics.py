"""Tables of the accuracy benchmark: how far gradients lie from their own formula, and what eps changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.reports import RESULTS, read

NUMERICS_RESULTS = RESULTS / "numerics.json"


def float32_table() -> str:
    return error_table({name: (name, "fp32") for name in ("published", "partials by autograd", "cot_kernels")})


def half_table() -> str:
    names = ("published", "cot_kernels")
    return error_table({f"{name}, {dtype}": (name, dtype) for dtype in ("bf16", "fp16") for name in names})


def eps_table() -> str:
    columns = {"`1 - p_g`": "miss", "loss": "loss_bias", "gradient": "gradient_bias", "`dl/dz_g`": "target_gradient"}
    return margin_table(list(columns), lambda result: [short(result["eps"][key]) for key in columns.values()])


def error_table(columns: dict[str, tuple[str, str]]) -> str:
    """Median and worst row of gradient errors; a column is a curve of the report and a dtype."""

    def cells(result: dict[str, Any]) -> list[str]:
        errors = (result["gradient_errors"][name][dtype] for name, dtype in columns.values())
        return [
            "NaN" if error["median"] is None else f"{short(error['median'])} ({short(error['worst'])})"
            for error in errors
        ]

    return margin_table(list(columns), cells)


def margin_table(headings: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> str:
    """A row for each number of classes and every fifth margin of benchmarks/numerics.py."""
    report = read(NUMERICS_RESULTS)
    lines = [f"| classes | margin | {' | '.join(headings)} |", "|---:|---:|" + "---:|" * len(headings)]
    for result in report["results"]:
        if result["margin"] % 5 == 0:
            lines.append(f"| {result['classes']} | {result['margin']} | {' | '.join(cells(result))} |")
    about = report["environment"]
    return "\n".join([*lines, "", f"{about['cpu']}, torch {about['torch']}; `benchmarks/results/numerics.json`."])


def short(value: float | None) -> str:
    if value is None:
        return "NaN"
    if 0.01 <= abs(value) < 100:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
