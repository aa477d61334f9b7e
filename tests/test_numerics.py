"""The accuracy benchmark: its truth, what it writes and what counts as an error."""

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
from benchmarks import numerics


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
