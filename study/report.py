"""What the runs say: means with intervals, paired differences, choices, curves."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from . import cost
from .methods import METHODS
from .runs import Result, Settings, Store, chosen, facts
from .tasks import TASKS

CONFIDENCE = 0.95
BASELINES = ("ce", "ce_twice")
MEASURES = ("score", "nll", "calibration_error", "score_attack_1", "score_attack_2", "complement_entropy")

Report = dict[str, Any]


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and half the width of its 95 % interval by Student's t; None of a single value."""
    if len(values) < 2:
        return {"mean": values[0], "half_width": None}
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {
        "mean": statistics.fmean(values),
        "half_width": float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error,
    }


def build(
    store: Store, settings: Settings, seconds: Mapping[str, dict[str, list[float]]], about: Mapping[str, Any]
) -> Report:
    results = list(store.results.values())
    choices = chosen(results)
    tested: dict[str, dict[str, dict[int, Result]]] = {}
    for result in results:
        run = result.run
        if run.stage == "test" and choices.get((run.task, run.method)) == (run.rate, run.strength):
            tested.setdefault(run.task, {}).setdefault(run.method, {})[run.seed] = result
    made = facts()
    return {
        "environment": dict(about),
        "settings": asdict(settings),
        "tasks": [
            {
                "task": task,
                "label": TASKS[task].label,
                "about": TASKS[task].about,
                **{name: value for name, value in made[task].items() if name != "configurations"},
                "methods": [
                    {
                        "method": method,
                        "label": METHODS[method].label,
                        "strength_is": METHODS[method].strength_is,
                        **_choice(task, method, choices),
                        **_figures(found, tested[task]),
                        "time_ratio": cost.ratios(seconds.get(task, {}), "ce").get(method),
                    }
                    for method, found in sorted(tested[task].items(), key=lambda item: list(METHODS).index(item[0]))
                ],
                "weights": _curve([each for each in results if each.run.task == task]),
            }
            for task in TASKS
            if task in tested
        ],
    }


def _choice(task: str, method: str, choices: Mapping[tuple[str, str], tuple[float, float]]) -> dict[str, Any]:
    rate, strength = choices[task, method]
    strengths = [strength for _, strength in METHODS[method].configurations(TASKS[task].optimizer)]
    rates = [rate for rate, _ in METHODS[method].configurations(TASKS[task].optimizer)]
    return {
        "rate": TASKS[task].rate * rate,
        "rate_at_end": rate in (min(rates), max(rates)),
        "strength": strength,
        "strength_at_end": min(strengths) < max(strengths) and strength in (min(strengths), max(strengths)),
    }


def _figures(found: Mapping[int, Result], others: Mapping[str, Mapping[int, Result]]) -> dict[str, Any]:
    made: dict[str, Any] = {"seeds": len(found), "diverged": sum(each.figures["diverged"] for each in found.values())}
    for measure in MEASURES:
        made[measure] = interval([each.figures[measure] for each in found.values()])
        for baseline in BASELINES:
            pairs = [
                each.figures[measure] - others[baseline][seed].figures[measure]
                for seed, each in found.items()
                if seed in others.get(baseline, {})
            ]
            if pairs:
                made[f"{measure}_minus_{baseline}"] = interval(pairs)
    return made


def _curve(results: Iterable[Result]) -> list[dict[str, float]]:
    """Of one-step complement cross-entropy: for each weight, the validation figures at the rate that is best for it."""
    found: dict[float, dict[float, list[Result]]] = {}
    for result in results:
        run = result.run
        if run.stage == "search" and run.method in ("cce", "ce"):
            found.setdefault(run.strength, {}).setdefault(run.rate, []).append(result)
    curve = []
    for weight, rates in sorted(found.items()):
        means = [
            {
                "rate": rate,
                **{name: statistics.fmean(each.figures[name] for each in made) for name in ("score", "nll")},
            }
            for rate, made in rates.items()
        ]
        best = max(means, key=lambda each: (each["score"], -each["nll"]))
        curve.append({"weight": weight, **best, "lowest_nll": min(each["nll"] for each in means)})
    return curve


def write(report: Report, file: Path) -> None:
    file.write_text(json.dumps(report, indent=1) + "\n")
