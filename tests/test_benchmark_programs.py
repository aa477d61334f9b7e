"""The other programs of the benchmarks: growth, start-up, the host's cost, kernels alone, and linear losses."""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import growth, host, kernels, linear, startup, tables_cpu, timing
from benchmarks.outcome import LATE

CPU = torch.device("cpu")


def test_growth_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(growth, "SIZES", (10, 30))
    output, figure = tmp_path / "growth.json", tmp_path / "growth.png"
    growth.main(["--output", str(output), "--figure", str(figure), "--threads", "1", "--seconds", "0.001"])
    measured = json.loads(output.read_text())["results"]
    assert [(row["along"], row["rows"], row["classes"]) for row in measured[:: len(growth.LOSSES)]] == [
        ("rows", 10, 100), ("rows", 30, 100), ("classes", 100, 10), ("classes", 100, 30),
    ]  # fmt: skip
    assert figure.read_bytes()[1:4] == b"PNG"
    assert all(row["page_faults"] >= 0 for row in measured)


def test_page_faults_are_counted_a_call() -> None:
    page, pages = mmap.PAGESIZE, 300

    def touches(index: int) -> None:
        with mmap.mmap(-1, pages * page) as fresh:
            for place in range(0, pages * page, page):
                fresh[place] = 1

    assert pages <= growth.page_faults(touches) < 2 * pages
    assert growth.page_faults(lambda index: None) < pages / 10


def test_linear_growth_is_drawn_through_most_points() -> None:
    """Of a loss whose last point alone is off, the line is that of the others."""
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    rows = [
        {"provider": "published", "along": along, "rows": size, "classes": size, "p50": time, "peak_bytes": size}
        for along in ("rows", "classes")
        for size, time in ((10, 50.0), (100, 200.0), (1000, 2000.0), (10000, 20000.0), (100000, 600000.0))
    ]
    points, line = plots.growth(rows).axes[0].lines[:2]
    assert list(points.get_ydata())[-1] == 600000.0
    assert list(line.get_ydata()) == [20.0, 200.0, 2000.0, 20000.0, 200000.0]


def test_variants_stay_few() -> None:
    """Of each kernel, whatever the number of classes: the committed count, here over one number in 97."""
    report = json.loads((Path(startup.__file__).parent / "results" / "startup.json").read_text())
    for name, rows in startup.ROWS.items():
        some = startup.count(rows, 2, range(2, 300_001, 97))
        for kernel, number in some.items():
            assert number <= report["variants"]["bf16"][name][kernel] <= 90, (name, kernel)


def test_first_calls_are_timed_in_processes_of_their_own() -> None:
    seconds = startup.call_seconds("cpu", 1)
    assert seconds.keys() == {"cold", "first", "second"} and min(seconds.values()) > 0


def test_what_ran_before_a_first_call_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a results file from before cold calls were timed still makes a table."""
    report = json.loads(tables_cpu.STARTUP_RESULTS.read_text())
    monkeypatch.setattr(tables_cpu, "STARTUP_RESULTS", tmp_path / "startup.json")
    found = []
    for cold in ({}, {"cold": 3 * report["call_seconds"]["cpu"]["second"]}):
        calls = {key: value for key, value in report["call_seconds"]["cpu"].items() if key != "cold"}
        report["call_seconds"]["cpu"] = {**calls, **cold}
        tables_cpu.STARTUP_RESULTS.write_text(json.dumps(report))
        found.append(tables_cpu.startup_table())
    assert all("after one of `F.cross_entropy`" in table for table in found)
    assert ["as the first call of all it takes 3.0 times" in table for table in found] == [False, True]


@pytest.mark.compiler
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux only")
def test_kernels_of_a_first_call_are_compiled_once(tmp_path: Path) -> None:
    (empty, compiled), (full, again) = (startup.compiled_with(str(tmp_path)) for _ in range(2))
    assert (compiled, again) == (3, 0) and min(empty, full) > 0


def test_variants_tell_what_triton_specializes_on() -> None:
    assert [startup.specialization(number) for number in (1, 17, 32, 2**31, 2**31 + 1)] == [
        "1", "32", "32D", "64D", "64",
    ]  # fmt: skip


def test_linear_losses_are_measured_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    rows = linear.measure((16, 8, 50), CPU, threads=1, rounds=1, seconds=0.0)
    status = {row["provider"]: row["status"] for row in rows}
    assert status["Liger fused_linear_cross_entropy"] == status["cut_cross_entropy"] == "missing"
    ours = [row for row in rows if row["provider"].startswith("linear_")]
    assert [row["status"] for row in ours] == ["ok", "ok"]
    assert all(row["error"] < 1e-5 and row["times"] > 0 for row in ours)


def test_what_a_call_costs_the_host(tmp_path: Path) -> None:
    output = tmp_path / "host.json"
    host.main(["--device", "cpu", "--seconds", "0.001", "--output", str(output)])
    rows = json.loads(output.read_text())["results"]
    assert [row["loss"] for row in rows] == [*host.LOSSES] * len(host.PROBLEMS)
    assert all(row["forward"] > 0 and row["both"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_are_timed_on_a_gpu_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main([])
    assert "measures a GPU, and PyTorch sees none here" in capsys.readouterr().err


def test_kernels_have_as_many_logits_whatever_the_classes() -> None:
    for layout, widths in kernels.LAYOUTS.items():
        for classes in widths:
            shape = kernels.shape_of(layout, classes)
            assert shape[1] == classes and 0.8 < torch.Size(shape).numel() / kernels.LOGITS <= 1.0, shape


@pytest.mark.parametrize(("layout", "classes", "passes"), [("rows", 1000, 4), ("rows", 100, 3), ("class-major", 10, 3)])
def test_kernels_are_launched_by_themselves(
    layout: str, classes: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter, on a clock that stands: of each kernel its own bytes."""
    pytest.importorskip("triton")
    called: list[object] = []

    def device_times(step: timing.Step, buffers: int, seconds: float) -> list[float]:
        called.append(step(0))
        return [1e-3]

    monkeypatch.setattr(timing, "device_times", device_times)
    monkeypatch.setattr(kernels, "LOGITS", 1 << 14)
    monkeypatch.setattr(kernels, "PLACES", 32)
    row = kernels.measure((layout, classes, "bf16"), CPU, 0.0, 1e6)
    assert len(called) == passes and ("in_place_us" in row) == ("in_place_share" in row) == (passes == 4)
    kilobytes = row["rows"] * classes * 2 / 1e3
    assert row["forward_share"] == pytest.approx(kilobytes, abs=1e-3)
    assert row["backward_share"] == pytest.approx(2 * kilobytes, abs=1e-3)
    assert row["both_share"] == pytest.approx(1.5 * kilobytes, abs=1e-3)
    assert row.get("in_place_share", 2 * kilobytes) == pytest.approx(2 * kilobytes, abs=1e-3)


def test_linear_losses_after_the_deadline_are_skipped() -> None:
    rows = linear.measure((16, 8, 50), CPU, threads=1, rounds=1, seconds=0.0, deadline=0.0)
    assert [row["provider"] for row in rows] == [linear.PRODUCTS, *linear.PROVIDERS]
    assert {row["status"] for row in rows} == {"skipped"} and {row["message"] for row in rows} == {LATE}


def test_a_linear_loss_that_fails_late_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def late(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise torch.OutOfMemoryError("late")
        return F.cross_entropy(F.linear(input, weight), target)

    monkeypatch.setattr(linear, "PROVIDERS", {"late": (lambda: late, F.cross_entropy, False)})
    monkeypatch.setattr(linear, "cpu_peak", lambda *_: 0)
    monkeypatch.setattr(linear.multiprocessing, "get_context", lambda _: Inline())
    products, row = linear.measure((16, 8, 50), CPU, threads=1, rounds=2, seconds=0.0)
    assert (row["status"], row["message"]) == ("failed", "OutOfMemoryError: late")
    assert products["times"] == 1


class Inline:
    """A pool of processes that is this one."""

    def Pool(self, _: int) -> Inline:
        return self

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def apply(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)


def test_a_wrong_linear_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (lambda: lambda input, weight, target: F.cross_entropy(input @ weight.t(), target) * 1.01,
             F.cross_entropy, False)  # fmt: skip
    monkeypatch.setattr(linear, "PROVIDERS", {"wrong": wrong})
    _, row = linear.measure((16, 8, 50), CPU, threads=1, rounds=1, seconds=0.0)
    assert row["status"] == "wrong" and "times" not in row
