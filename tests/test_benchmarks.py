"""The benchmark suite: what it says of providers that are right, wrong, missing or failing."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import __main__ as suite
from benchmarks import reports, resources, runner, startup, timing
from benchmarks.cases import DTYPES, PARTS, Case
from benchmarks.outcome import LATE
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.runner import Row, Settings

CPU = torch.device("cpu")
CASE = Case(8, 5)
SETTINGS = Settings(CPU, seconds=0.002, rounds=2, roof_bytes=1 << 16)


def cross_entropy_sum(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="sum")


def provider(loss: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Provider:
    return Provider("measured", lambda: loss, cross_entropy_sum, **options)


def rows_of(*providers: Provider, case: Case = CASE, settings: Settings = SETTINGS, dtype: str = "fp32") -> list[Row]:
    """The rows of providers on one case, without the copy's."""
    report = runner.run([case], [dtype], providers, settings, lambda _: None, lambda _: None)
    return [row for row in report["results"] if row.provider != runner.COPY]


def test_every_provider_of_the_cpu_on_quick_cases(tmp_path: Path) -> None:
    """One command: rows for forward, backward and both, with and without an upstream gradient of 1, and a JSON file."""
    output = tmp_path / "results" / "quick.json"
    names = [each.name for each in PROVIDERS if each.name != "published, compiled"]
    chosen = [word for name in names for word in ("--provider", name)]
    report = suite.main(["--quick", "--device", "cpu", "--threads", "1", "--output", str(output), *chosen])
    assert set(report["missing"]) == {"Liger cross_entropy", "quack cross_entropy"}
    written = json.loads(output.read_text())
    assert written["environment"]["torch"] == torch.__version__
    rows = [row for row in written["results"] if row["provider"] != runner.COPY]
    assert len(rows) == 3 * 5 * (len(names) - 2)  # cases, measurements and providers
    for row in rows:
        assert row["status"] == "ok", row
        assert 0 < row["p20"] <= row["p50"] <= row["p80"], row
        assert row["gradient_error"] < 1e-5 and row["loss_error"] < 1e-5, row
        assert row["held_bytes"] <= row["peak_bytes"], row
        passes = {"forward": 1, "backward": 2, "both": 3}[row["mode"]]
        assert row["counted_bytes"] == passes * 4 * math.prod(row["shape"]), row
        assert row["gbps"] == pytest.approx(row["counted_bytes"] / row["p50"] / 1e3, rel=1e-3), row
        assert row["copy_share"] == pytest.approx(row["gbps"] / written["copy_bandwidth"]["roof"], rel=1e-3), row
    assert {(row["mode"], row["upstream"]) for row in rows} == {
        ("forward", None), ("backward", 1), ("backward", 0.37), ("both", 1), ("both", 0.37),
    }  # fmt: skip


# Errors of five times what a dtype is given, and half of what it is given where each operation rounds.
OFF = {torch.float32: 1.00005, torch.bfloat16: 1.05, torch.float16: 1.01}


def wrong_value(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target) * OFF[logits.dtype]


class CrossEntropy(torch.autograd.Function):
    """Right but for what the backward passes below do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        return F.cross_entropy(logits, target)

    @staticmethod
    def rows(ctx: Any) -> Tensor:
        """The gradient, for an upstream gradient of 1."""
        logits, target = ctx.saved_tensors
        return (logits.softmax(1) - F.one_hot(target, logits.shape[1])) / len(logits)


class SoftmaxAlone(CrossEntropy):
    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, _ = ctx.saved_tensors
        return upstream * logits.softmax(1) / len(logits), None


class IgnoresUpstream(CrossEntropy):
    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return CrossEntropy.rows(ctx), None


class LeavesOutTheLastRow(CrossEntropy):
    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        gradient = CrossEntropy.rows(ctx) * upstream
        gradient[-1] = math.nan
        return gradient, None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", [wrong_value, SoftmaxAlone.apply, IgnoresUpstream.apply, LeavesOutTheLastRow.apply])
def test_a_wrong_provider_is_reported_as_wrong_and_not_timed(
    loss: Callable[[Tensor, Tensor], Tensor], dtype: str
) -> None:
    (row,) = rows_of(provider(loss), dtype=dtype)
    assert row.status == "wrong" and row.p50 is None and "float64" in row.message


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_provider_that_rounds_each_operation_is_given_more_room(dtype: str) -> None:
    assert {row.status for row in rows_of(provider(wrong_value, rounds_operations=True), dtype=dtype)} == {"ok"}
    assert {row.status for row in rows_of(provider(F.cross_entropy), dtype=dtype)} == {"ok"}


def test_one_that_fails_costs_its_own_rows_only() -> None:
    def fails(logits: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nfor this shape")

    broken = dataclasses.replace(provider(fails), name="broken")
    rows = rows_of(broken, provider(F.cross_entropy))
    assert [(row.status, row.message) for row in rows if row.provider == "broken"] == [
        ("failed", "RuntimeError: no kernel")
    ]
    assert [row.status for row in rows if row.provider == "measured"] == ["ok"] * 5


@pytest.mark.parametrize("later", [0, 1, 3])  # when it is called once before it is timed, and among the calls that are
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_one_that_fails_while_it_is_timed_is_not_asked_again(later: int, error: type[Exception]) -> None:
    calls = 0

    def tires(logits: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2 + 2 * resources.REPETITIONS + later:  # the check, one that warms up, and the counts of memory
            raise error("tired")
        return F.cross_entropy(logits, target)

    rows = rows_of(provider(tires), dataclasses.replace(provider(F.cross_entropy), name="tireless"))
    tired = [(row.mode, row.status, row.message) for row in rows if row.provider == "measured"]
    assert tired == [("forward", "failed", f"{error.__name__}: tired")]
    assert [row.status for row in rows if row.provider == "tireless"] == ["ok"] * 5


@pytest.mark.parametrize("error", [ImportError("No module named 'fast_losses'"), SystemExit("no GPU")])
def test_a_missing_package_is_named_and_the_rest_measured(error: BaseException) -> None:
    """One that leaves while it is imported, too."""

    def missing() -> Any:
        raise error

    absent = Provider("absent", missing, cross_entropy_sum)
    report = runner.run([CASE], ["fp32"], [absent, provider(F.cross_entropy)], SETTINGS, lambda _: None, lambda _: None)
    assert report["missing"] == {"absent": f"{type(error).__name__}: {error}"}
    assert {row.provider for row in report["results"]} == {runner.COPY, "measured"}


def test_reasons_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = provider(F.cross_entropy, rows_only=True)
    (row,) = rows_of(flat, case=Case(2, 5, (3,)))
    assert (row.status, row.message) == ("skipped", "takes (N, K) logits alone")
    (row,) = rows_of(flat, settings=dataclasses.replace(SETTINGS, deadline=0.0))
    assert (row.status, row.message) == ("skipped", "out of time")
    monkeypatch.setattr(runner, "free_bytes", lambda device: 100)
    (row,) = rows_of(flat)
    assert row.status == "skipped" and "GB of memory" in row.message


def test_logits_that_a_provider_overwrites_are_drawn_again() -> None:
    """Without it the second provider, and every call after the first, would see gradients in place of logits."""
    seen: list[Tensor] = []

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
            loss = F.cross_entropy(logits.detach(), target)
            logits.data.copy_((logits.softmax(1) - F.one_hot(target, logits.shape[1])) / len(logits))
            ctx.save_for_backward(logits)
            return loss

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
            return ctx.saved_tensors[0] * upstream, None

    def watched(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(logits.detach().clone())
        return F.cross_entropy(logits, target)

    first = dataclasses.replace(provider(InPlace.apply, overwrites=True), name="in place")
    measured = runner.CaseRun(CASE, "fp32", SETTINGS, bandwidth=1.0)
    rows = list(measured.rows([first, provider(watched)], lambda _: None))
    assert {row.status for row in rows} == {"ok"}
    size = CASE.logits_bytes(torch.float32)
    counted = {(row.mode, row.counted_bytes) for row in rows if row.provider == "in place"}
    assert counted == {("forward", 2 * size), ("both", 2 * size)}  # a read and a write, whatever is done besides
    drawn = timing.make_buffers(CASE, torch.float32, CPU).logits[0]
    assert torch.equal(seen[0], drawn) and torch.equal(measured.buffers.logits[0], drawn)


def test_nothing_is_started_after_the_deadline() -> None:
    settings = dataclasses.replace(SETTINGS, deadline=0.0)
    found = runner.run([CASE], ["fp32"], [provider(F.cross_entropy)], settings, lambda _: None, lambda _: None)
    assert [(row.provider, row.status, row.message) for row in found["results"]] == [
        (runner.COPY, "skipped", LATE),
        ("measured", "skipped", LATE),
    ]


def test_what_there_was_no_time_for_is_written_too(tmp_path: Path) -> None:
    """A file without it would say that these cases were never wanted."""
    output = tmp_path / "late.json"
    options = ["--quick", "--device", "cpu", "--threads", "1", "--provider", "F.cross_entropy", "--minutes", "0.00001"]
    report = suite.main([*options, "--output", str(output)])
    written = json.loads(output.read_text())["results"]
    assert [(row["case"], row["provider"], row["message"]) for row in written] == [
        (row.case, row.provider, LATE) for row in report["results"]
    ]
    assert {row["case"] for row in written} == {case.name for case in PARTS["quick"]}


def test_the_roof_and_the_gpu_are_looked_at_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, states = tmp_path / "quick.json", iter([{"sm_mhz": 1980.0}, {"sm_mhz": 1400.0}])
    monkeypatch.setattr(suite, "state", lambda device: next(states))
    options = ["--quick", "--device", "cpu", "--threads", "1", "--provider", "F.cross_entropy"]
    suite.main([*options, "--output", str(output)])
    written = json.loads(output.read_text())
    assert written["copy_bandwidth_after"].keys() == written["copy_bandwidth"].keys()
    assert written["copy_bandwidth_after"]["roof"] > 0
    assert [written["environment"][key] for key in ("gpu_before", "gpu_after")] == [
        {"sm_mhz": 1980.0},
        {"sm_mhz": 1400.0},
    ]


def interrupted(output: Path, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """What a run ends with that is stopped in its second case."""
    rows = runner._rows_of

    def stopped(case: Case, *arguments: Any) -> list[Row]:
        if case == PARTS["quick"][1]:
            raise KeyboardInterrupt
        return rows(case, *arguments)

    monkeypatch.setattr(runner, "_rows_of", stopped)
    options = ["--quick", "--device", "cpu", "--threads", "1", "--provider", "F.cross_entropy"]
    with pytest.raises(SystemExit) as ended:
        suite.main([*options, "--output", str(output)])
    return ended.value.code


def test_a_run_that_is_stopped_leaves_a_complete_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says where what it had is."""
    output, partial = tmp_path / "results.json", tmp_path / "results.json.partial"
    output.write_text("complete")
    assert interrupted(output, monkeypatch) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped; 1 of 3 cases are in {partial}"
    assert output.read_text() == "complete"
    assert {row["case"] for row in json.loads(partial.read_text())["results"]} == {PARTS["quick"][0].name}


def test_a_run_that_ends_leaves_no_partial_file(tmp_path: Path) -> None:
    """It is written through a link, and to a pipe as it is."""
    output, link = tmp_path / "results.json", tmp_path / "link.json"
    link.symlink_to(output)
    suite.main(["--quick", "--device", "cpu", "--threads", "1", "--provider", "F.cross_entropy", "--output", str(link)])
    assert json.loads(output.read_text())["results"] and link.is_symlink()
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "link.json"}
    assert reports.beside(Path("/dev/null")) == Path("/dev/null")


def test_one_dtype_is_measured_after_the_other() -> None:
    """Where time runs out, no case is missing in the first."""
    cases = (CASE, Case(4, 3))
    report = runner.run(cases, ["bf16", "fp32"], [provider(F.cross_entropy)], SETTINGS, lambda _: None, lambda _: None)
    order = list(dict.fromkeys((row.dtype, row.case) for row in report["results"]))
    assert order == [(dtype, case.name) for dtype in ("bf16", "fp32") for case in cases]


class OnGpu(Settings):
    """As on a GPU, where there is none: what would be timed is told a time."""

    on_gpu = True  # type: ignore[assignment]


ON_GPU = OnGpu(CPU, seconds=0.001, rounds=1, roof_bytes=1 << 16, deadline=0.5)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_times", lambda steps, *_: {name: [1e-6] for name in steps})
    monkeypatch.setattr(timing, "graph_times", lambda *_: [1e-6])
    monkeypatch.setattr(runner.roof, "kernel_copy", lambda: runner.roof.library_copy)
    monkeypatch.setattr(resources, "launches", lambda step: 3)
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: 0.0))


SLOW, FAST = (
    dataclasses.replace(provider(F.cross_entropy, slow=name == "slow"), name=name) for name in ("slow", "fast")
)


@pytest.mark.parametrize("late", [False, True])
def test_on_a_gpu_those_that_are_slow_to_get_ready_come_last(
    late: bool, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each dtype. Where time runs out, it is they that are missing; the rows are in the order of the cases."""
    now = 0.0
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: now))
    said: list[str] = []

    def advance(text: str) -> None:
        nonlocal now
        said.append(text)
        now = float(late and len(said) >= 2)

    cases, dtypes = (CASE, Case(4, 3)), ("bf16", "fp32")
    rows = runner.run(cases, dtypes, [SLOW, FAST], ON_GPU, advance, lambda _: None)["results"]
    names = [f"{case.name} {dtype}: {name}" for dtype in dtypes for name in ("fast", "slow") for case in cases]
    assert said == (names[:2] if late else names)
    assert list(dict.fromkeys((row.dtype, row.case, row.provider) for row in rows)) == [
        (dtype, case.name, name) for dtype in dtypes for case in cases for name in (runner.COPY, "slow", "fast")
    ]
    of_first = [row for row in rows if row.dtype == "bf16"]
    assert [row.graph for row in of_first if row.provider == runner.COPY] == [False, True] * 2
    assert {row.status for row in of_first if row.provider == "slow"} == {"skipped" if late else "ok"}


@pytest.mark.parametrize("turn", [0, 1])
def test_logits_for_which_there_is_no_room_cost_those_whose_turn_it_is(
    turn: int, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, make = 0, timing.make_buffers

    def full(*arguments: Any) -> timing.Buffers:
        nonlocal calls
        calls += 1
        if calls == turn + 1:
            raise torch.OutOfMemoryError("no room")
        return make(*arguments)

    monkeypatch.setattr(timing, "make_buffers", full)
    rows = runner.run([CASE], ["fp32"], [SLOW, FAST], ON_GPU, lambda _: None, lambda _: None)["results"]
    status = {name: {row.status for row in rows if row.provider == name} for name in (runner.COPY, "slow", "fast")}
    first, second = ({"failed"}, {"ok"}) if turn == 0 else ({"ok"}, {"failed"})
    assert status == {runner.COPY: first, "fast": first, "slow": second}


def test_a_case_leaves_no_buffers(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """To wait for the collector of reference cycles, which knows nothing of a GPU's memory, or for the next case."""
    made: list[weakref.ref[timing.Buffers]] = []
    make = timing.make_buffers

    def watched(*arguments: Any) -> timing.Buffers:
        assert [each() for each in made] == [None] * len(made)
        buffers = make(*arguments)
        made.append(weakref.ref(buffers))
        return buffers

    monkeypatch.setattr(timing, "make_buffers", watched)
    gc.collect()
    gc.disable()
    try:
        runner.run([CASE, Case(4, 3)], ["fp32"], [SLOW, FAST], ON_GPU, lambda _: None, lambda _: None)
    finally:
        gc.enable()
    assert len(made) == 6  # for two turns, and once more where launches are counted


def test_launches_are_counted_of_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And last, for what counts them slows what is timed after it."""
    right = provider(F.cross_entropy)
    wrong = Provider("wrong", lambda: lambda logits, target: F.cross_entropy(logits, target) + 1, cross_entropy_sum)
    report = runner.run([CASE], ["fp32"], [right, wrong], SETTINGS, lambda _: None, lambda _: None)
    rows = report["results"]
    assert {row.launches for row in rows} == {None}
    counted: list[str] = []

    def launches(step: Callable[[], object]) -> int:
        step()
        counted.append("once")
        return 7

    monkeypatch.setattr(resources, "launches", launches)
    late = dataclasses.replace(SETTINGS, deadline=0.0)
    runner._count_launches(rows, [CASE], ["fp32"], [right, wrong], late)
    assert not counted
    runner._count_launches(rows, [CASE], ["fp32"], [right, wrong], SETTINGS)
    assert counted == ["once"]
    assert {(row.provider, row.launches) for row in rows} == {(runner.COPY, None), ("measured", 7), ("wrong", None)}


def test_the_cases_run_under_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/test_cases.py",
        "-q",
        "--benchmark-disable",
        "-k",
        "128x10-",
    ]
    run = subprocess.run(command, cwd=Path(startup.__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert f"{len(PROVIDERS) - 3} passed, 2 skipped" in run.stdout, run.stdout[-500:]


def test_pytest_benchmark_has_the_threads_of_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytest_benchmark")
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    for _ in importlib.import_module("benchmarks.test_cases").threads.__wrapped__():
        assert set_to == [suite.parse([]).threads]
    assert set_to[1:] == [torch.get_num_threads()]


@pytest.mark.parametrize("name", ["nonsense", "cpu:1", "cuda:x", "cuda:99", ""])
def test_a_device_that_cannot_be_measured_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--quick", "--device", name])
    assert f"argument --device: {name!r}: " in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")
def test_quick_suite_on_the_gpu(tmp_path: Path) -> None:
    report = suite.main(["--quick", "--device", "cuda", "--output", str(tmp_path / "quick.json")])
    ours = {name for each in PROVIDERS if "entropy" in (name := each.name) and not each.gpu_only}
    rows = [row for row in report["results"] if row.provider in ours]
    assert {row.status for row in rows} == {"ok"}, [row for row in rows if row.status != "ok"]
    assert {row.graph for row in rows} == {False, True}
