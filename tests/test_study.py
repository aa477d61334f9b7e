"""The evidence study: what is chosen and kept, data and report, and the whole in one command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from study_problems import METHOD_NAMES, small_part

from study import __main__ as program
from study import cost, figures, page, report
from study.data import few_of_each
from study.methods import METHODS
from study.runs import FULL, QUICK, Machine, Result, Run, Settings, Store, chosen, final, search
from study.tasks import TASKS

ROOT = Path(__file__).parents[1]


# ----------------------------------------------------------------------------------- choosing, keeping


def a_result(method: str, stage: Any, rate: float, seed: int, score: float, nll: float = 1.0) -> Result:
    figures = dict.fromkeys(report.MEASURES, 0.0) | {"score": score, "nll": nll, "diverged": 0.0}
    return Result(Run("digits", method, stage, rate, 0.0, seed), figures)


def test_the_best_on_the_validation_part_is_chosen_and_equals_by_their_loss() -> None:
    results = [
        a_result("ce", "search", 0.1, 1000, 0.9),
        a_result("ce", "search", 0.1, 1001, 0.7),
        a_result("ce", "search", 1.0, 1000, 0.8, nll=0.5),
        a_result("ce", "search", 1.0, 1001, 0.82, nll=0.5),
        a_result("ce", "search", 3.0, 1000, 0.81, nll=0.4),
        a_result("ce", "search", 3.0, 1001, 0.81, nll=0.4),
        a_result("ce", "test", 10.0, 0, 1.0),  # no matter what the test says
    ]
    assert chosen(results) == {("digits", "ce"): (3.0, 0.0)}
    runs = final(chosen(results), FULL)
    assert {run.rate for run in runs} == {3.0} and len(runs) >= 10
    assert not {run.seed for run in runs} & set(FULL.search_seeds)


def test_runs_are_kept_and_not_made_again(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    store = Store(file, QUICK)
    first, second = (a_result("ce", "search", rate, 1000, 0.123456789) for rate in (0.1, 1.0))
    store.add(first)
    with file.open("a") as stream:
        stream.write('null\n[]\n{}\n3\n{"task": "digits", "method": "ce"}\n')
        stream.write('{"task": "digits", "meth')  # the program was ended in the middle
    with file.open("ab") as stream:
        stream.write(b"\xff")
    again = Store(file, QUICK)
    assert again.missing([first.run, second.run]) == [second.run]
    again.add(second)
    kept = Store(file, QUICK)
    assert kept.missing([first.run, second.run]) == []
    assert kept.results[first.run].figures["score"] == 0.123457
    assert kept.results == again.results  # what is reported does not depend on which call made a run
    with pytest.raises(ValueError, match="other settings"):
        Store(file, FULL)


def test_a_run_gives_the_same_twice(tmp_path: Path) -> None:
    run = Run("digits", "cot", "test", 1.0, 0.0, 0)
    one, other = (Machine(QUICK, tmp_path, "cpu").result(run) for _ in range(2))
    assert one == other


# ----------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("name", ["digits", "mnist1d", "generated100", "generated1000"])
def test_parts_share_no_example(name: str) -> None:
    data = TASKS[name].load(None)
    rows = [set(map(bytes, part.inputs[0].flatten(1).numpy())) for part in data]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert all(part.target.unique().numel() == TASKS[name].classes for part in data[:1])
    assert all(int(part.target.max()) < TASKS[name].classes for part in data)


def test_few_of_each_class_and_others_for_another_seed() -> None:
    part = small_part(100)
    few = few_of_each(part, 3, seed=0)
    assert few.target.bincount().tolist() == [3, 3, 3, 3]
    assert torch.equal(few.inputs[0], few_of_each(part, 3, seed=0).inputs[0])
    assert not torch.equal(few.inputs[0], few_of_each(part, 3, seed=1).inputs[0])


# --------------------------------------------------------------------------------------------- report


def test_intervals_are_those_of_student() -> None:
    from scipy.stats import ttest_1samp

    values = [0.3, 0.1, 0.4, 0.15, 0.9]
    found, expected = report.interval(values), ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["mean"] - found["half_width"] == pytest.approx(expected.low)  # type: ignore[operator]
    assert found["mean"] + found["half_width"] == pytest.approx(expected.high)  # type: ignore[operator]
    assert report.interval([1.5]) == {"mean": 1.5, "half_width": None}


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.jsonl", QUICK)
    for method, gain in (("ce", 0.0), ("cce", 0.05)):
        store.add(a_result(method, "search", 1.0, 1000, 0.5))
        for seed, base in enumerate((0.2, 0.5, 0.8)):
            store.add(a_result(method, "test", 1.0, seed, base + gain))
        store.add(a_result(method, "test", 3.0, 9, 0.0))  # not what was chosen
    made = report.build(store, QUICK, {"digits": {"ce": [2.0, 1.0, 3.0], "cce": [2.2, 2.0, 2.1]}}, {})
    (task,) = made["tasks"]
    ce, cce = task["methods"]
    assert cce["score_minus_ce"]["mean"] == pytest.approx(0.05)
    assert cce["score_minus_ce"]["half_width"] == pytest.approx(0, abs=1e-12)
    assert cce["score"]["half_width"] > 0.5 and cce["seeds"] == 3
    assert (ce["time_ratio"], cce["time_ratio"]) == (1.0, 1.05)
    assert cost.ratios({"cce": [1.0]}, "ce") == {}


# ---------------------------------------------------------------------------------------- the command


def test_everything_in_one_quick_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All tasks and methods; then a second call that trains nothing and says the same."""
    command = ["--quick", "--workers", "1", "--output", str(tmp_path)]
    program.main(command)
    shown = capsys.readouterr().out
    made = json.loads((tmp_path / "study.json").read_text())
    assert [task["task"] for task in made["tasks"]] == list(TASKS)
    for task in made["tasks"]:
        assert task["label"] in shown
        assert [row["method"] for row in task["methods"]] == METHOD_NAMES
        for row in task["methods"]:
            assert row["seeds"] == len(QUICK.test_seeds) and row["time_ratio"] > 0
            assert set(report.MEASURES) <= set(row) and "score_minus_ce_twice" in row
    for picture in ("gains.png", "weights.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    kept = (tmp_path / "runs.jsonl").read_text()
    program.main([*command, "--task", "digits"])
    assert (tmp_path / "runs.jsonl").read_text() == kept
    again = json.loads((tmp_path / "study.json").read_text())
    assert all(row["time_ratio"] for task in again["tasks"] for row in task["methods"])
    assert len(search(TASKS, METHODS, QUICK)) == len(TASKS) * len(METHODS) * 2
    for picture in figures.draw(made, tmp_path / "again"):
        assert picture.stat().st_size > 10_000


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """All that is no list or dictionary, with its place in the JSON."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*path, key))
    else:
        yield path, value


def test_the_committed_report_is_that_of_the_committed_runs(tmp_path: Path) -> None:
    """And the page that of the report. The study was run to its end: every method on every task, with every seed."""
    shutil.copy(page.RESULTS.with_name("runs.jsonl"), tmp_path)  # a store may write to its file
    store = Store(tmp_path / "runs.jsonl", FULL)
    assert not store.missing(searched := search(TASKS, METHODS, FULL))
    assert not store.missing(final(chosen(store.results[run] for run in searched), FULL))
    committed = json.loads(page.RESULTS.read_text())
    seconds = json.loads(page.RESULTS.with_name("times.json").read_text())
    made = json.loads(json.dumps(report.build(store, FULL, seconds, committed["environment"])))
    assert dict(leaves(made)) == pytest.approx(dict(leaves(committed)))
    assert page.filled(page.PAGE, committed) == page.PAGE.read_text(), "run make readme"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "'0': expected a whole number of at least 1"),
        (["--workers", "100000"], "--workers must be at most"),
        (["--task", "imagenet"], "invalid choice: 'imagenet'"),
        (["--device", "tpu"], "expected cpu, cuda"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        program.main([*arguments, "--output", str(tmp_path)])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_times_of_fewer_methods_do_not_replace_those_of_more(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    cost.kept(file, {"digits": {"ce": [1.0], "cce": [2.0]}})
    cost.kept(file, {"digits": {"cce": [3.0]}, "bbc": {"ce": [4.0]}})
    assert cost.kept(file, {}) == {"digits": {"ce": [1.0], "cce": [2.0]}, "bbc": {"ce": [4.0]}}
    assert cost.kept(file, {"bbc": {"ce": [5.0]}})["bbc"] == {"ce": [5.0]}
    file.write_text('{"digits": {"ce": [1.')
    assert cost.kept(file, {"bbc": {"ce": [5.0]}}) == {"bbc": {"ce": [5.0]}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.touch(), "--output must be a folder that can be written to"),
        (lambda folder: (folder / "runs.jsonl").mkdir(parents=True), "Is a directory"),
        (lambda folder: (folder.mkdir(), (folder / "data").touch()), "--output must be a folder"),
        (
            lambda folder: ((folder / "data").mkdir(parents=True), (folder / "data" / "digits_16.pt").write_text("?")),
            "digits_16.pt is no data of this study, remove it",
        ),
        (lambda folder: (folder.mkdir(), (folder / "runs.jsonl").write_text("{")), "name another folder with --output"),
    ],
)
def test_an_output_that_holds_something_else_is_refused(
    make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "results")
    with pytest.raises(SystemExit) as raised:
        program.main(["--quick", "--output", str(tmp_path / "results")])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_results_of_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(tmp_path / "runs.jsonl", Settings(test_seeds=(7,)))
    with pytest.raises(SystemExit):
        program.main(["--quick", "--output", str(tmp_path)])
    assert "name another folder with --output" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of a process from /proc")
def test_workers_end_with_the_process_that_shares_out_the_work(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from study import runs, work\n"
        "pool = work.pool(1, runs.QUICK, Path(sys.argv[1]), 'cpu')\n"
        "print(pool.submit(os.getpid).result(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    shared = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert shared.stdout is not None
    worker = int(shared.stdout.readline())  # it may hold the pipe open for ever
    shared.wait(60)
    state = Path(f"/proc/{worker}/stat")

    def alive() -> bool:
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"

    end = time.monotonic() + 30
    while alive() and time.monotonic() < end:
        time.sleep(0.05)
    if alive():
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker goes on")
