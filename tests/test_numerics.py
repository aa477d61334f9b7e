"""The accuracy benchmark: its truth, what it writes, and what README and docs/numerics.md say of its results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
from benchmarks import numerics, readme
from cot_kernels.objectives import ComplementEntropyObjective

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "numerics.json"


def error(result: dict[str, Any], name: str, dtype: str, which: str) -> float | None:
    value: float | None = result["gradient_errors"][name][dtype][which]
    return value


@pytest.mark.parametrize(("classes", "rows"), [(10, 20), (1000, 20), (32000, 2)])
@pytest.mark.parametrize("eps", [1e-7, 0.0])
def test_the_truth_is_the_oracles(classes: int, rows: int, eps: float) -> None:
    loss = numerics.statistics_form if eps else numerics.without_eps
    for margin in numerics.MARGINS:
        logits, target = oracle.draw(rows, classes, float(margin))
        weights = torch.full((rows,), float(classes), dtype=torch.float64)
        value, gradient = numerics.gradients(loss, logits, target)
        true_value, true = oracle.gradient_of(oracle.complement_entropy, logits, target, weights, eps=eps)
        torch.testing.assert_close(value, true_value * classes, rtol=1e-12, atol=1e-13)
        assert ((gradient - true).norm(dim=1) / true.norm(dim=1)).max().item() < 1e-10


def test_a_gradient_that_is_not_finite_is_reported() -> None:
    true = torch.ones(3, 2, dtype=torch.float64)
    for lost in (math.nan, math.inf):
        gradient = true.clone()
        gradient[0, 0] = lost
        assert numerics.gradient_errors(gradient, true) == {"median": 0.0, "worst": None, "rows_not_finite": 1}
        gradient[1, 1] = lost
        assert numerics.gradient_errors(gradient, true)["median"] is None


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "CASES", ((10, 16), (300, 8)))
    monkeypatch.setattr(numerics, "MARGINS", range(0, 31, 10))
    output, figure = tmp_path / "a" / "numerics.json", tmp_path / "b" / "numerics.png"
    threads = torch.get_num_threads()
    numerics.main(["--output", str(output), "--figure", str(figure), "--threads", str(threads)])
    assert figure.read_bytes().startswith(b"\x89PNG")
    report = json.loads(output.read_text())
    assert {"torch", "date", "commit"} <= set(report["environment"])
    points = {(result["classes"], result["margin"]): result for result in report["results"]}
    assert set(points) == {(classes, margin) for classes in (10, 300) for margin in (0, 10, 20, 30)}
    for classes in (10, 300):
        confident = points[classes, 20]
        published, ours = (error(confident, name, "fp32", "median") for name in ("published", "cot_kernels"))
        assert published is not None and ours is not None and published > 1e4 * ours
        assert error(confident, "published", "fp16", "median") is None
        assert confident["gradient_errors"]["published"]["fp16"]["rows_not_finite"] == confident["rows"]
        assert points[classes, 0]["eps"]["gradient_bias"] < 1e-5 < points[classes, 20]["eps"]["gradient_bias"]


def test_committed_results_hold_what_the_pages_say() -> None:
    results = json.loads(RESULTS.read_text())["results"]
    for result in results:
        worst = {dtype: error(result, "cot_kernels", dtype, "worst") for dtype in numerics.DTYPES}
        assert all(value is not None for value in worst.values())
        assert worst["fp32"] < 5e-6 and worst["fp16"] < worst["bf16"] < 2**-7
        published = error(result, "published", "fp32", "median")
        assert published is not None
        if result["margin"] >= 20:
            assert published > 0.1
            assert result["eps"]["target_gradient"] > result["eps"]["miss"]
        if result["margin"] >= 15:
            assert error(result, "published", "fp16", "median") is None
    many = next(result for result in results if (result["classes"], result["margin"]) == (32000, 10))
    by_autograd, ours = (error(many, name, "fp32", "median") for name in ("partials by autograd", "cot_kernels"))
    assert by_autograd is not None and ours is not None and by_autograd > 10 * ours


@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_balance_of_eps_and_cross_entropy(classes: int) -> None:
    """What docs/numerics.md says of the ceiling: dl/dz_g = 1 - p_g near sqrt(eps (H - 1) / K)."""
    entropy = torch.tensor([math.log(classes - 1)], dtype=torch.float64)
    miss = (1e-7 * (entropy - 1) / classes).sqrt()
    rows = ComplementEntropyObjective(1 / classes, 1e-7).rows(torch.logit(miss), -entropy)
    assert (-rows.d_log_odds / miss).item() == pytest.approx(1, abs=0.1)


def test_tables_are_those_of_the_committed_results() -> None:
    for page in readme.PAGES:
        assert readme.filled(page) == page.read_text(), f"{page.name}: run make readme"
