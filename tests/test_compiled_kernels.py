"""What the compiler makes of the kernels, for GPUs that need not be there: no spills, no stack, 128-bit accesses."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_budgets
import pytest

from benchmarks.bounds import both_passes

ROOT = Path(__file__).parents[1]
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux only"),
]


ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
COMMITTED = ROOT / "benchmarks" / "results" / "compile_report.json"


# It goes no further than the reports that it is given.
REFUSED = """
from benchmarks import compile_report
compile_report.cases = lambda target: print("nothing known") or exit()
compile_report.main()
"""


def compile_report(*options: str) -> dict[str, Any]:
    """In a process of its own: this one holds the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    if "linker /opt/rocm" in run.stderr:
        pytest.skip("this Triton brings no linker for AMD GPUs")
    assert run.returncode == 0, run.stderr[-4000:]
    made: dict[str, Any] = json.loads(run.stdout)
    return made


@pytest.fixture(scope="module", params=TARGETS)
def reports(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Reports of every variant for one target, compiled as far as the committed report is not of what there is now.
    (Of gfx942 all are, but where the report was made: into AMD's hashes goes the path of the installation.)"""
    found: list[dict[str, Any]] = compile_report("--target", request.param, "--known", str(COMMITTED))["reports"]
    assert len(found) > 200 and {report["case"]["target"] for report in found} == {request.param}
    return found


def identity(report: dict[str, Any]) -> tuple[str, int, str]:
    return report["case"]["target"], report["case"]["classes"], report["hash"]


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_committed_report_knows_is_what_the_compiler_makes(target: str) -> None:
    """A sample of it, compiled again."""
    sample, committed = compile_report("--target", target, "--every", "35"), json.loads(COMMITTED.read_text())
    assert sample["reports"]
    if sample["readers"] != committed["readers"]:
        pytest.skip("the report was read by other code: nothing is taken from it")
    known = {identity(report): report for report in committed["reports"]}
    compared = [(report, known[identity(report)]) for report in sample["reports"] if identity(report) in known]
    if not compared:
        pytest.skip("the report is of other kernels, or of another compiler: nothing is taken from it")
    for report, before in compared:
        assert report == before | {"case": report["case"]}


def test_a_kernel_that_is_known_is_not_compiled_again(tmp_path: Path) -> None:
    """But any other is, and one that is read by other code."""
    case = ("--target", "sm_90", "--every", "1000")
    made = compile_report(*case)
    first, *others = made["reports"]
    assert others
    told = tmp_path / "known.json"
    told.write_text(json.dumps({**made, "reports": [dict(first, registers=-7), *others[1:]]}))
    again = compile_report(*case, "--known", str(told))
    assert [report["registers"] for report in again["reports"]] == [-7, *(each["registers"] for each in others)]
    told.write_text(json.dumps({**made, "readers": "others", "reports": [dict(first, registers=-7)]}))
    assert compile_report(*case, "--known", str(told))["reports"] == made["reports"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("?", "holds no JSON"), ("[1]", "is no report"), ('{"readers": 1}', ""), (None, "No such file")],
)
def test_what_is_no_report_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "known.json"
    if content is not None:
        file.write_text(content)
    command = [sys.executable, "-c", REFUSED, "--target", "sm_90", "--known", str(file)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "") if said else (0, "nothing known\n"), run.stderr[-2000:]
    assert said in run.stderr and "Traceback" not in run.stderr


def test_a_kernel_is_known_for_the_classes_that_were_reported(tmp_path: Path) -> None:
    """What a reduction compiles to is the same for all, and what follows from it is not."""
    cases = ("--target", "sm_90", "--every", "169")
    made = compile_report(*cases)
    first = made["reports"][0]["case"]["classes"]
    some = [report for report in made["reports"] if report["case"]["classes"] == first]
    others = [report for report in made["reports"] if report["case"]["classes"] != first]
    assert {report["hash"] for report in some} & {report["hash"] for report in others}
    told = tmp_path / "known.json"
    told.write_text(json.dumps({**made, "reports": some}))
    assert compile_report(*cases, "--known", str(told))["reports"] == made["reports"]


def test_no_spills_and_no_stack(reports: list[dict[str, Any]]) -> None:
    wasteful = [report for report in reports if report["spill_bytes"] or report["stack_bytes"]]
    assert wasteful == []
    assert all(0 < report["registers"] <= 512 for report in reports)


def promised(report: dict[str, Any]) -> bool:
    """Rows of any length, wherever they begin, or side by side in even numbers, are read in 128 bits; and written, but
    the shortest that begin or end anywhere, of which most accesses are ends."""
    case, few = report["case"], 64 // ITEMSIZE[report["case"]["dtype"]]
    ends = case["layout"] in ("short, odd", "short, sliced") and case["classes"] <= few
    return case["layout"] != "class-major, odd" and not (report["kernel"] == "gradient" and ends)


def test_rows_are_read_and_written_in_128_bits(reports: list[dict[str, Any]]) -> None:
    """As many accesses of that width as hold the logits that a thread has, and where all rows begin and end on a
    boundary none of a logit but for the targets'."""
    counted = [report for report in reports if report["accesses"] is not None]
    assert len(counted) > 100
    for report in counted:
        assert report["wide_access_promised"] == promised(report), report
        if not promised(report):
            continue
        loads, stores = report["global_loads"], report["global_stores"]
        assert loads["128"] >= report["accesses"] > 0, report
        if report["kernel"] in ("gradient", "value_and_gradient"):
            assert stores["128"] >= report["accesses"], report
        if report["case"]["layout"] in ("short", "long", "class-major"):
            narrow = sum(loads.get(width, 0) for width in ("8", "16", "16 or 8"))
            assert narrow <= (0 if report["kernel"] == "gradient" else 8), report


def test_running_maxima_are_subtracted_before_they_are_scaled(reports: list[dict[str, Any]]) -> None:
    """A product contracted with the difference makes lanes that saw nothing NaN, which no interpreter can show. Of
    16-bit logits the levels are rounded before, in all arithmetic but that on pairs."""
    for report in reports:
        rescaled = report["kernel"] in ("split", "merge") or report["case"]["layout"].startswith(
            ("long", "class-major")
        )
        if rescaled and report["kernel"] in ("statistics", "split", "merge", "value_and_gradient"):
            if report["gap_operations"] is None:  # AMD's assembly
                continue
            case = report["case"]
            narrow = case["dtype"] in ("bf16", "fp16") and case["layout"].startswith("long")
            levels = narrow and case["target"] != "sm_100"
            assert report["gap_operations"] == (["sub"] if levels else ["mul", "sub"]), report


def test_offsets_into_the_state_are_64_bits_wide(reports: list[dict[str, Any]]) -> None:
    assert [report for report in reports if report["narrow_offsets"]] == []


def test_kernels_keep_to_their_budgets(reports: list[dict[str, Any]]) -> None:
    amd = reports[0]["case"]["target"] == "gfx942"
    budgets = kernel_budgets.AMD if amd else kernel_budgets.NVIDIA
    streaming = [report for report in reports if report["loop_per_logit"] is not None]
    met = set()
    for report in streaming:
        layout = report["case"]["layout"]
        if report["case"]["classes"] <= 32:
            layout = layout.replace("short", "tiny")
        met.add((report["kernel"], layout))
        budget = budgets[report["kernel"]][layout]
        assert 4 < report["loop_per_logit"] <= budget.loop, report
        assert report["once"] + (report["a_row"] or 0) <= budget.once, report
        assert report["registers"] <= budget.registers, report
        assert report["bytes_in_flight"] >= budget.under_way << 10, report
    assert met == {(kernel, layout) for kernel, layouts in budgets.items() for layout in layouts}


def test_no_kernel_costs_more_than_in_the_committed_report(reports: list[dict[str, Any]]) -> None:
    """Budgets are of layouts; this is of every kernel, dtype, objective and number of classes, merges and folds too."""
    committed = json.loads(COMMITTED.read_text())
    compiler = reports[0]["case"]["target"], importlib.metadata.version("triton")
    if compiler[1] != committed["environment"]["triton"]:
        pytest.skip(f"the report is of Triton {committed['environment']['triton']}, this is {compiler[1]}")

    def key(report: dict[str, Any]) -> tuple[Any, ...]:
        return report["kernel"], *sorted(report["case"].items())

    before = {key(report): report for report in committed["reports"]}
    assert {key(report) for report in reports} == {each for each in before if ("target", compiler[0]) in each}
    for report in reports:
        allowed = before[key(report)]
        for figure in ("registers", "executed_per_logit", "once", "a_row", "loop_per_logit"):
            if report[figure] is not None:
                assert report[figure] <= 1.05 * allowed[figure] + 1, (figure, allowed[figure], report)
        for side in ("global_loads", "global_stores"):
            wide = report[side].get("128", 0), allowed[side].get("128", 0)
            assert wide[0] >= wide[1] or sum(report[side].values()) <= sum(allowed[side].values()), (side, report)


def test_bfloat16_takes_as_few_instructions_as_was_set_out_for(reports: list[dict[str, Any]]) -> None:
    """11 a place of a turn forward and 14 backward, on NVIDIA GPUs, of rows of 128 classes and more that begin on
    boundaries. A logit takes more where the last piece of its row is nearly empty, just above powers of two, and with
    what is once; of few rows what is once weighs more."""
    for report in reports:
        case = report["case"]
        aligned = case["layout"] in ("short", "long") and case["classes"] >= 128
        most = {"statistics": (11, 16), "split": (11, 16), "gradient": (14, 17)}.get(report["kernel"])
        if most and aligned and case["dtype"] == "bf16" and case["target"] != "gfx942":
            assert report["loop_per_logit"] <= most[0], report
            assert case["few"] or report["executed_per_logit"] <= most[1], report


def test_many_long_rows_wait_for_memory(reports: list[dict[str, Any]]) -> None:
    """Predicted, of every NVIDIA GPU there is a datasheet for: neither instructions nor latency cost much."""
    counted = [report for report in reports if report["loop_per_logit"] is not None]
    long = [report for report in counted if report["case"]["classes"] > 50000 and not report["case"]["few"]]
    assert {report["kernel"] for report in long} == {"statistics", "gradient", "value_and_gradient"}
    for report in long:
        passes = 2 if report["kernel"] == "value_and_gradient" else 1
        # One exponential a logit and little else.
        assert passes <= report["loop_special_per_logit"] < passes + 0.5, report
        assert bool(report["predicted"]) == (report["case"]["target"] != "gfx942")
        for prediction in report["predicted"]:
            # A B200 has two thirds of the issue slots to a byte that an H200 has.
            assert prediction["share"] >= (0.66 if prediction["gpu"] == "B200" else 0.9), report


FLOORS = {"A100": 0.93, "H100": 0.9, "H200": 0.8, "B200": 0.62}
MISSED_ON_AN_H200 = {("short, odd", 1033), ("short, odd", 2049), ("long", 4104), ("long, odd", 5001)}


def test_what_both_passes_are_predicted_to_reach(reports: list[dict[str, Any]]) -> None:
    """The goal is 0.90 of a copy's bandwidth from 1,000 classes on, at 2^28 logits in bf16. A B200 has two thirds of
    the issue slots to a byte that an H200 has."""
    shares: dict[tuple[str, str, int], dict[str, float]] = {}
    for report in reports:
        case = report["case"]
        if case["dtype"] == "bf16" and case["call"] == "mean" and case["classes"] >= 1000 and not case["few"]:
            for each in report["predicted"]:
                kernels = shares.setdefault((each["gpu"], case["layout"], case["classes"]), {})
                kernels[report["kernel"]] = min(each["share"], kernels.get(report["kernel"], 1.0))
    assert shares or reports[0]["case"]["target"] == "gfx942"
    both = {key: both_passes(kernels["statistics"], kernels["gradient"]) for key, kernels in shares.items()}
    for (gpu, *row), share in both.items():
        assert share >= FLOORS[gpu], (gpu, row, share)
    missed = {(layout, classes) for (gpu, layout, classes), share in both.items() if gpu == "H200" and share < 0.9}
    assert missed == (MISSED_ON_AN_H200 if ("H200", "short", 1000) in both else set())


def test_the_committed_predictions_are_those_of_the_kernels() -> None:
    """A few of benchmarks/results/widths.json, from which a figure is drawn. An A100 and an H100 reach the goal of 0.90
    at every width; an H200 but for long rows of few tiles, and odd ones just above a power of two."""
    committed = json.loads((ROOT / "benchmarks" / "results" / "widths.json").read_text())
    rows = committed["results"]
    large = [row for row in rows if row["classes"] >= 1000]
    assert {row["gpu"] for row in large} == {"A100", "H100", "H200", "B200"} and len(large) > 200
    for row in large:
        assert row["both"] >= FLOORS[row["gpu"]] - 0.01, row
        if row["gpu"] == "H200" and not row["odd"]:
            assert row["both"] >= 0.9 or 4096 < row["classes"] < 8192, row
    if importlib.metadata.version("triton") != committed["environment"]["triton"]:
        pytest.skip(f"the predictions are of Triton {committed['environment']['triton']}")
    code = (
        "import json; from benchmarks import widths; "
        "print(json.dumps([widths.predict(widths.case_of(*case)) for case in "
        "((33, 'sm_90'), (264, 'sm_90'), (1025, 'sm_90'), (5120, 'sm_90'), (1032, 'sm_100'))]))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    assert [[row["gpu"] for row in predicted] for predicted in found] == [["H100", "H200"]] * 4 + [["B200"]]
    for predicted in found:
        for row in predicted:
            (expected,) = [each for each in rows if (each["gpu"], each["classes"]) == (row["gpu"], row["classes"])]
            assert row.keys() == expected.keys()
            for name in ("statistics", "gradient", "both"):
                assert row[name] == pytest.approx(expected[name], rel=1e-3), row
