"""What the compiler makes of the kernels, for GPUs that need not be there: no spills, no stack, 128-bit accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bounds import GPUS

ROOT = Path(__file__).parents[1]
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux only"),
]


@pytest.fixture(scope="module", params=TARGETS)
def reports(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Reports of every variant for one target, compiled in a process of its own: this one holds the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--target", request.param]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    if "linker /opt/rocm" in run.stderr:
        pytest.skip("this Triton brings no linker for AMD GPUs")
    assert run.returncode == 0, run.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(run.stdout)
    assert len(found) > 50 and {report["variant"]["target"] for report in found} == {request.param}
    return found


def test_no_spills_and_no_stack(reports: list[dict[str, Any]]) -> None:
    wasteful = [report for report in reports if report["spill_bytes"] or report["stack_bytes"]]
    assert wasteful == []
    assert all(0 < report["registers"] <= 512 for report in reports)


def test_rows_are_read_and_written_in_128_bits(reports: list[dict[str, Any]]) -> None:
    """Every variant for rows whose gradient lies as they do, of any length and wherever they begin, or side by side."""
    promised = [report for report in reports if report["wide_access_promised"]]
    layouts = {(report["variant"]["kernel"], report["variant"]["layout"]) for report in promised}
    assert {
        (kernel, name)
        for kernel in ("statistics", "gradient")
        for name in ("few", "short", "short, odd", "medium", "long", "long, odd", "class-major")
    } <= layouts
    assert {("value_and_gradient", name) for name in ("few", "short", "short, odd", "medium", "long")} <= layouts
    for report in promised:
        assert report["global_loads"].get("128"), report
        if report["variant"]["kernel"] != "statistics":
            assert report["global_stores"].get("128"), report


def test_running_maxima_are_subtracted_as_they_were_rounded(reports: list[dict[str, Any]]) -> None:
    """An unrounded product there makes lanes that saw nothing NaN, which no interpreter can show."""
    for report in reports:
        if report["variant"]["kernel"] in ("statistics", "merge", "value_and_gradient"):
            if report["gap_operations"] is None:  # AMD's assembly
                continue
            assert report["gap_operations"] == ["sub"], report


def test_offsets_into_the_state_are_64_bits_wide(reports: list[dict[str, Any]]) -> None:
    assert [report for report in reports if report["narrow_offsets"]] == []


# Executed instructions a logit in bf16 over a turn of the main loop, or loops, of long rows. On NVIDIA GPUs, beyond 15,
# 31 and 31 issue slots and not memory would bound an H200. And registers a thread: few let enough threads run to cover
# latency. A gfx942 has no instruction that rounds to bfloat16, and 128 registers a thread where half its warps run.
BUDGETS = {"statistics": 11, "gradient": 11, "value_and_gradient": 22}
REGISTERS = {"statistics": 64, "gradient": 64, "value_and_gradient": 80}
AMD_BUDGETS = {"statistics": 13, "gradient": 18, "value_and_gradient": 31}
AMD_REGISTERS = {"statistics": 40, "gradient": 72, "value_and_gradient": 72}
PASSES = {"statistics": 1, "gradient": 1, "value_and_gradient": 2}


def test_instructions_a_logit(reports: list[dict[str, Any]]) -> None:
    amd = reports[0]["variant"]["target"] == "gfx942"
    budgets, registers = (AMD_BUDGETS, AMD_REGISTERS) if amd else (BUDGETS, REGISTERS)
    streaming = [
        report
        for report in reports
        if report["executed_per_logit"] is not None
        and report["variant"]["dtype"] == "bf16"
        and report["variant"]["layout"] in ("medium", "long", "long, odd")
    ]
    assert len(streaming) >= 8
    for report in streaming:
        kernel = report["variant"]["kernel"]
        passes = PASSES[kernel]
        assert passes <= report["special_per_logit"] < passes + 0.5, report  # one exponential a logit and little else
        assert report["in_loop"], report
        assert report["registers"] <= registers[kernel], report
        assert 4 < report["executed_per_logit"] <= budgets[kernel], report
        assert bool(report["predicted"]) != amd
        for prediction in report["predicted"]:
            gpu = next(each for each in GPUS if each.name == prediction["gpu"])
            assert prediction["bound"] == "bytes", report
            reads = 2 / report["bytes_per_logit"]  # nothing waits for a store
            assert report["bytes_in_flight"] >= reads * gpu.bytes_to_cover_latency, (gpu, report)
