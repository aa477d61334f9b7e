"""How far gradients lie from their own formula, by logit margin: the published operations beside the statistics form.

``python -m benchmarks.numerics --output FILE --figure FILE`` draws logits from N(0, 1), raises the target's a margin
above the largest other one, rounds them to float32, bfloat16 or float16, and compares the gradient of each row with
the formula in float64 on the same rounded logits: the rounding of the input is not counted. It also measures, in
float64, what the guard eps = 1e-7 changes beside eps = 0.

The truth is ``cot_kernels.complement_entropy`` on float64 logits. The published operations in float64 would not do:
they still subtract ``p_g`` from 1. tests/test_numerics.py holds this truth to the tests' own formula at every margin.
It has no second guard, the 1e-10 within the published logarithm, which moves the loss by K * 1e-10 at most and the
gradient far less than the published operations err.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import cot_kernels
from benchmarks import reports
from benchmarks.arguments import output_file, thread_count
from benchmarks.cases import DTYPES
from benchmarks.environment import environment
from cot_kernels import reference

CASES = ((10, 512), (1000, 256), (32000, 32))  # (classes, rows)
MARGINS = range(31)
COLORS = {"fp32": "#0072B2", "bf16": "#D55E00", "fp16": "#009E73"}  # of Okabe and Ito's palette
STYLES: dict[str, dict[str, Any]] = {
    "published": {"linestyle": "--", "linewidth": 1.8},
    "cot_kernels": {"linestyle": "-", "linewidth": 2.2},
}
LOWEST, HIGHEST, NOT_FINITE = 1e-8, 1e11, 1e12  # of the error axis; rows that are not finite are drawn above its end

RowLoss = Callable[[Tensor, Tensor], Tensor]


def autograd_partials(input: Tensor, target: Tensor) -> Tensor:
    """The statistics form with ``u (S + ln u)`` left to autograd: what the hand-written partials are there for."""
    rows = cot_kernels.complement_statistics(input, target)
    miss = torch.sigmoid(rows.complement_lse - rows.target_logit)
    u = miss / (miss + 1e-7)
    return u * (rows.negentropy + u.log()) / input.shape[1]


published: RowLoss = partial(reference.complement_entropy, reduction="none")
statistics_form: RowLoss = partial(cot_kernels.complement_entropy, reduction="none")
without_eps: RowLoss = partial(cot_kernels.complement_entropy, reduction="none", eps=0.0)

CURVES: dict[str, tuple[RowLoss, Sequence[str]]] = {
    "published": (published, tuple(DTYPES)),
    "cot_kernels": (statistics_form, tuple(DTYPES)),
    "partials by autograd": (autograd_partials, ("fp32",)),
}


def gradients(loss: RowLoss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """K times the row losses and their gradients: divided by K, float16 would underflow at many classes."""
    leaf = logits.detach().clone().requires_grad_()
    values = loss(leaf, target)
    (gradient,) = torch.autograd.grad(values, leaf, torch.full_like(values, logits.shape[1]))
    return values.detach().double() * logits.shape[1], gradient.double()


def rounded(value: Tensor | float) -> float | None:
    """Three digits, and None, which is null in JSON, for what is not finite."""
    return float(f"{float(value):.3g}") if math.isfinite(value) else None


def gradient_errors(gradient: Tensor, true: Tensor) -> dict[str, float | int | None]:
    """The L2 error of each row relative to the truth; a row that is not finite counts as infinite."""
    error = (gradient - true).norm(dim=1) / true.norm(dim=1)
    error = error.nan_to_num(nan=math.inf, posinf=math.inf)
    return {
        "median": rounded(error.median()),
        "worst": rounded(error.max()),
        "rows_not_finite": int(error.isinf().sum()),
    }


def effect_of_eps(logits: Tensor, target: Tensor) -> dict[str, float | None]:
    """Medians, in float64: what eps = 1e-7 does to a row beside eps = 0, where ``dl/dz_g`` is 0."""
    guarded_loss, guarded = gradients(statistics_form, logits, target)
    exact_loss, exact = gradients(without_eps, logits, target)
    statistics = cot_kernels.complement_statistics(logits, target)
    at_target = guarded.gather(1, target[:, None]) / logits.shape[1]
    return {
        "miss": rounded(torch.sigmoid(statistics.complement_lse - statistics.target_logit).median()),
        "loss_bias": rounded(((guarded_loss - exact_loss) / exact_loss).abs().median()),
        "gradient_bias": rounded(((guarded - exact).norm(dim=1) / exact.norm(dim=1)).median()),
        "target_gradient": rounded(at_target.median()),
    }


def measure(classes: int, rows: int, margin: float) -> dict[str, Any]:
    """The same draw at every margin, with class 0 for a target: the losses do not know one class from another."""
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 0] = logits[:, 1:].amax(1) + margin
    target = torch.zeros(rows, dtype=torch.long)
    inputs = {name: logits.to(dtype) for name, dtype in DTYPES.items()}
    true = {dtype: gradients(statistics_form, input.double(), target)[1] for dtype, input in inputs.items()}
    errors = {
        name: {dtype: gradient_errors(gradients(loss, inputs[dtype], target)[1], true[dtype]) for dtype in dtypes}
        for name, (loss, dtypes) in CURVES.items()
    }
    effect = effect_of_eps(logits, target)
    return {"classes": classes, "rows": rows, "margin": margin, "gradient_errors": errors, "eps": effect}


def figure(results: Sequence[dict[str, Any]]) -> Figure:
    """Errors against margins, a panel for each number of classes."""
    classes = sorted({result["classes"] for result in results})
    drawing = Figure(figsize=(10.5, 5), dpi=150, layout="constrained")
    panels = drawing.subplots(1, len(classes), sharey=True, squeeze=False)[0]
    decades = range(-8, 11, 2)
    for axes, each in zip(panels, classes, strict=True):
        points = [result for result in results if result["classes"] == each]
        for name in STYLES:
            for dtype in COLORS:
                draw_curve(axes, points, name, dtype)
        axes.axhspan(HIGHEST, NOT_FINITE * 10, color="0.93", linewidth=0, zorder=0)
        axes.set(title=f"{each:,} classes", xlabel="margin of the target's logit", yscale="log")
        axes.set(ylim=(LOWEST, NOT_FINITE * 10), xlim=(MARGINS[0] - 0.7, MARGINS[-1] + 0.7))
        axes.set_yticks([10.0**power for power in decades] + [NOT_FINITE])
        axes.set_yticklabels([f"$10^{{{power}}}$" for power in decades] + ["NaN, inf"])
        axes.minorticks_off()
        axes.grid(color="0.88", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("relative error of a row's gradient")
    lines = [
        Line2D([], [], color=color, label=f"{name}, {dtype}", **style)
        for dtype, color in COLORS.items()
        for name, style in STYLES.items()
    ]
    lost = Line2D([], [], color="0.3", linestyle="", marker="x", label="not finite (median)")
    band = Patch(color="0.3", alpha=0.25, linewidth=0, label="median to worst row")
    drawing.legend(handles=[*lines, lost, band], loc="outside lower center", ncols=4, frameon=False, handlelength=3)
    return drawing


def draw_curve(axes: Axes, points: Sequence[dict[str, Any]], name: str, dtype: str) -> None:
    margins = [point["margin"] for point in points]
    errors = [point["gradient_errors"][name][dtype] for point in points]
    median = [math.nan if error["median"] is None else error["median"] for error in errors]
    worst = [NOT_FINITE if error["worst"] is None else error["worst"] for error in errors]
    axes.plot(margins, median, color=COLORS[dtype], **STYLES[name])
    axes.fill_between(margins, median, worst, color=COLORS[dtype], alpha=0.18, linewidth=0)
    lost = [margin for margin, value in zip(margins, median, strict=True) if math.isnan(value)]
    axes.plot(lost, [NOT_FINITE] * len(lost), color=COLORS[dtype], linestyle="", marker="x")


def summary(results: Sequence[dict[str, Any]]) -> Table:
    shown = [margin for margin in MARGINS if margin % 5 == 0]
    medians = {
        (result["classes"], name, dtype, result["margin"]): error["median"]
        for result in results
        for name, errors in result["gradient_errors"].items()
        for dtype, error in errors.items()
    }
    table = Table(title="relative error of a row's gradient by margin: medians")
    for heading in ("classes", "gradient", "dtype", *(str(margin) for margin in shown)):
        table.add_column(heading, justify="right")
    for classes, name, dtype in dict.fromkeys(key[:3] for key in medians):
        values = (medians[classes, name, dtype, margin] for margin in shown)
        table.add_row(str(classes), name, dtype, *("NaN" if value is None else f"{value:.0e}" for value in values))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--figure", type=output_file, help="PNG file to write")
    parser.add_argument("--threads", type=thread_count, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    points = [(classes, rows, margin) for classes, rows in CASES for margin in MARGINS]
    results = [measure(*point) for point in track(points, "measuring", console=Console(stderr=True))]
    Console().print(summary(results))
    if options.output:
        reports.write(options.output, {"environment": environment(options.threads)}, results)
    if options.figure:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        figure(results).savefig(options.figure)


if __name__ == "__main__":
    main()
