"""What is made of results: figures, tables and verdicts on goals."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import goals, readme, reports, runner, tables_cpu, tables_gpu
from benchmarks.cases import VOCABULARIES, Case
from benchmarks.providers import PROVIDERS
from benchmarks.runner import Row

RESULTS = Path(runner.__file__).parent / "results"


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """As of a GPU, in two dtypes: numbers made up, of every provider on a large, a small and a trailing case."""
    found = []
    for dtype in ("fp32", "bf16"):
        for case in (Case(128, 10), Case(8192, 32000), Case(8192, 128256), Case(8, 21, (512, 512))):
            for graph in (False, True):
                for number, name in enumerate([runner.COPY, *(each.name for each in PROVIDERS)]):
                    mode, upstream = (runner.COPY, None) if name == runner.COPY else ("both", 0.37)
                    row = Row(
                        provider=name, dtype=dtype, mode=mode, upstream=upstream, graph=graph, p50=100.0 + number,
                        p20=90.0, p80=120.0, copy_share=0.9, peak_bytes=1000, held_bytes=10, gbps=1.0,
                        **runner.about(case),
                    )  # fmt: skip
                    found.append(dataclasses.asdict(row))
    return found


@pytest.mark.parametrize(("name", "key"), [("cpu", "results"), ("linear", "results"), ("compile_report", "reports")])
def test_results_are_written_a_row_a_line(name: str, key: str) -> None:
    """As those that are committed, so that what is measured again differs in its own lines."""
    file = RESULTS / f"{name}.json"
    head = reports.read(file)
    rows = head.pop(key)
    assert reports.text_of(head, rows, key) == file.read_text()


def test_figures(results: list[dict[str, Any]], tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    drawn = plots.figures(results)
    assert set(drawn) == {"roofline", "roofline_graph", "speedup", "memory", "latency", "latency_graph"}
    for name, figure in drawn.items():
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["fp32", "bf16"], name
        plots.write(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"
    lines = {line.get_label(): line for line in drawn["roofline"].axes[0].lines}
    assert list(lines["cross_entropy"].get_ydata()) == [0.9, 0.9, 0.9]  # 21, 32000 and 128256 classes
    bars = drawn["speedup"].axes[0].patches
    assert len(bars) == 4 * (len(PROVIDERS) - 1)
    assert bars[0].get_height() == pytest.approx(101 / 102)


def test_figures_say_of_what_they_are_and_what_is_better(results: list[dict[str, Any]]) -> None:
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    cpu = {"device": "cpu", "cpu": "AMD EPYC", "threads": 2, "torch": "2.13", "commit": "50605a0", "date": "2026-11-25"}
    said = plots.about([cpu, {**cpu, "commit": "5bf8b57"}])
    assert said == "AMD EPYC, 2 threads, torch 2.13, at 50605a0, 2026-11-25, at 5bf8b57"
    assert plots.about([{**cpu, "device": "NVIDIA H200"}]) == "NVIDIA H200, torch 2.13, at 50605a0, 2026-11-25"
    grown = json.loads((RESULTS / "growth.json").read_text())["results"]
    measured = json.loads((RESULTS / "gpu_kernels.json").read_text())["results"]
    drawn = plots.figures(results, said)
    for figure in (*drawn.values(), plots.growth(grown, said), plots.kernels(measured, [], said)):
        assert any(axes.get_title(loc="right") == said for axes in figure.axes)
        assert any(f"({way} is better)" in figure.get_suptitle() for way in ("lower", "higher")), figure.get_suptitle()
    roof = plots.roof_of([json.loads((RESULTS / "cpu.json").read_text())])
    shares = plots.figures(results, said, roof)
    for name in ("roofline", "roofline_graph"):
        assert "1 is the bandwidth of a copy of 256 MiB" in shares[name].axes[-1].get_xlabel()
    for name in ("latency", "latency_graph"):  # a copy is no loss
        assert runner.COPY not in drawn[name].axes[0].get_legend_handles_labels()[1]
    assert len({*plots.COLORS.values()}) == len(plots.COLORS)


def test_what_was_not_measured_is_marked(results: list[dict[str, Any]]) -> None:
    """A bar of no height would say that it takes no memory; one too low to be seen says so."""
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    rows = [
        dict(row, peak_bytes=7 * row["rows"] * row["classes"] * 2)
        for row in results
        if row["dtype"] == "bf16" and not (row["provider"] == "cross_entropy" and row["classes"] == 32000)
    ]
    for row in rows:
        if row["provider"] == "Liger cross_entropy" and row["classes"] == 128256:
            row["peak_bytes"] = 1000
    figure = plots.figures(rows)["memory"]
    assert len(figure.axes[0].patches) == 3 * len(PROVIDERS) - 1
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["n/a", "~ 0"]
    assert figure.legends[0].get_texts()[-1].get_text() == "n/a: not measured"
    assert not plots.figures(results)["speedup"].axes[0].texts


def test_figures_are_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same case of two runs, or of two devices, would be drawn as one: of the last file, without a word."""
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    parts = [str(file) for file in tables_gpu.gpu_files()]

    def refused(*files: str) -> str:
        with pytest.raises(SystemExit):
            plots.main([*files, "--output", str(tmp_path)])
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err

    cpu, aten, growth = (str(RESULTS / f"{name}.json") for name in ("cpu", "cpu_aten", "growth"))
    assert "results must have each case in one file, got " in refused(cpu, aten)
    assert "results must be of one device, got NVIDIA H200, cpu" in refused(cpu, parts[0])
    grown = tmp_path.with_suffix(".json")
    grown.write_text(Path(growth).read_text())
    assert "got growth along " in refused(growth, str(grown))
    plots.main([*parts, "--output", str(tmp_path), "--prefix", "gpu_"])
    assert {file.name for file in tmp_path.iterdir()} >= {"gpu_roofline.png", "gpu_latency.png"}


def test_no_figures_without_points(results: list[dict[str, Any]]) -> None:
    """What was not measured is left out."""
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    failed = [dict(row, status="failed", p50=None, copy_share=None) for row in results]
    assert plots.figures(failed) == {}


@pytest.mark.parametrize(
    ("output", "said"),
    [("file", "is a file: expected a folder"), ("file/deeper", "cannot be made: Not a directory")],
)
def test_a_folder_that_cannot_be_written_is_refused(
    output: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is drawn."""
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    monkeypatch.setattr(plots, "figures", lambda *_: pytest.fail("drawn"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        plots.main([str(RESULTS / "cpu.json"), "--output", str(tmp_path / output)])
    assert f"argument --output: {str(tmp_path / output)!r} {said}" in capsys.readouterr().err


def test_results_without_points_are_an_error(
    results: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a success that writes nothing."""
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    file = tmp_path / "results.json"
    for rows in ([], [dict(results[0], status="skipped", p50=None)]):
        file.write_text(json.dumps({"environment": {"device": "cpu"}, "results": rows}))
        with pytest.raises(SystemExit):
            plots.main([str(file), "--output", str(tmp_path)])
        assert f"nothing to draw: got {len(rows)} rows" in capsys.readouterr().err


def test_predictions_are_drawn() -> None:
    """A line for each GPU and kind of row, of the committed results."""
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    rows = json.loads((RESULTS / "widths.json").read_text())["results"]
    (axes,) = plots.widths(rows).axes
    drawn = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(drawn) == 8
    kinds = [(gpu, odd) for gpu in dict.fromkeys(row["gpu"] for row in rows) for odd in (False, True)]
    for line, (gpu, odd) in zip(drawn, kinds, strict=True):
        assert line == [[row["classes"], row["both"]] for row in rows if (row["gpu"], row["odd"]) == (gpu, odd)]


def test_measured_kernels_are_drawn() -> None:
    """Of the committed results, with the predictions for that GPU."""
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    rows = json.loads((RESULTS / "gpu_kernels.json").read_text())["results"]
    predictions = [row for row in json.loads((RESULTS / "widths.json").read_text())["results"] if row["gpu"] == "H200"]
    figure = plots.kernels(rows, predictions)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["fp32", "bf16"]
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    both = [row for row in rows if (row["dtype"], row["layout"]) == ("bf16", "rows") and row["classes"] % 8 == 0]
    assert list(lines["both passes, with all launches"].get_ydata()) == [row["both_share"] for row in both]
    assert len(lines["predicted of the kernels of now"].get_xdata()) > 20


@pytest.mark.parametrize("name", ["compile_report", "widths"])
def test_what_compiles_is_refused_under_the_interpreter(name: str) -> None:
    """At once: its processes would end in the traceback of one of them."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    run = subprocess.run(command, cwd=RESULTS.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "TRITON_INTERPRET" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr and not run.stdout


def timed_row(provider: str, p50: float, **values: Any) -> dict[str, Any]:
    shape = {"case": "8192 x 32000", "rows": 8192, "classes": 32000, "dtype": "bf16", "upstream": 1.0}
    row = {"provider": provider, "mode": "both", "graph": False, "status": "ok", "p50": p50, "copy_share": 0.95}
    return {**shape, **row, **values}


def both_upstreams(provider: str, p50: float, **values: Any) -> list[dict[str, Any]]:
    return [timed_row(provider, p50, **{**values, "upstream": upstream}) for upstream in runner.UPSTREAMS]


def test_gpu_goals_are_judged_by_the_worst_case() -> None:
    small = {"case": "128 x 10", "rows": 128, "classes": 10}
    rows = [
        timed_row("complement_entropy", 10.0),
        timed_row("complement_entropy", 10.0, upstream=0.37, copy_share=0.85),
        timed_row("complement_entropy", 10.0, graph=True, copy_share=0.1),  # goals are of eager mode
        timed_row("complement_entropy", 10.0, mode="forward", copy_share=0.1),
        *both_upstreams("complement_entropy", 1.0, **small, copy_share=0.01),
        *both_upstreams("F.cross_entropy", 0.9, **small),
        timed_row("published", 120.0),
        timed_row("published", 90.0, upstream=0.37),
        timed_row("published, compiled", 30.0, status="wrong"),
        *both_upstreams("complement_cross_entropy", 10.0),
        *both_upstreams("Liger cross_entropy", 10.0),
        *both_upstreams("quack cross_entropy", 9.0),
    ]
    found = list(goals.verdicts(rows, goals.GPU_GOALS))
    assert [each.said for each in found] == [
        "missed, met in 0 of 8",  # 0.85 of the copy at an upstream of 0.37
        "missed, met in 0 of 8",  # 9 times, there
        "not measured",
        "met in 1 of 8",
        "missed, met in 0 of 8",  # 1.11 times quack's
        "met in 1 of 4",  # 1.11 times F.cross_entropy's
        "not measured",
    ]
    assert (found[0].worst, found[0].where) == (0.85, "8192 x 32000, bf16, upstream 0.37")
    wrong = timed_row("complement_entropy", 1.0, case="8192 x 262144", classes=262144, status="wrong", copy_share=None)
    verdict = next(goals.verdicts([rows[0], wrong], goals.GPU_GOALS))
    assert (verdict.said, verdict.worst) == ("missed, met in 0 of 8", 0.95)
    assert verdict.broken == "wrong at 8192 x 262144, bf16" and "8192 x 262144" not in verdict.absent
    assert "| missed, met in 0 of 8 |" in goals.table(rows, goals.GPU_GOALS)


def test_a_goal_is_not_met_by_the_one_case_that_was_measured() -> None:
    """It is set for rows of 1,000 to 262,144 classes; what a file lacks is listed."""
    rows = both_upstreams("complement_entropy", 10.0, case="65536 x 4096", rows=65536, classes=4096)
    verdict = next(goals.verdicts(rows, goals.GPU_GOALS))
    others = ("268800 x 1000", "16384 x 16384", *(f"8192 x {classes}" for classes in VOCABULARIES))
    assert (verdict.said, verdict.absent) == ("met in 1 of 8", others)
    assert f"| met in 1 of 8 | {', '.join(others)} |" in goals.table(rows, goals.GPU_GOALS)
    (half,) = goals.verdicts(rows[:1], goals.GPU_GOALS[:1])  # of two upstream gradients
    assert (half.said, half.worst) == ("met in 0 of 8", 0.95)
    every = [dict(row, case=case) for row in rows for case in goals.LARGE]
    assert next(goals.verdicts(every, goals.GPU_GOALS)).said == "met"
    committed, wanted = goals.results_of(tables_gpu.gpu_files())
    assert {"8192 x 151936", "8192 x 262144"} <= set(next(goals.verdicts(committed, wanted)).absent)


@pytest.mark.parametrize("name", ["cpu", "cpu_repeated"])
def test_committed_results_meet_the_goals_of_a_cpu(name: str) -> None:
    """As they were measured; nothing is timed here."""
    found = list(goals.verdicts(*goals.results_of([RESULTS / f"{name}.json"])))
    assert [each.goal for each in found] == list(goals.CPU_GOALS)
    assert {each.goal.text: each.said for each in found if each.said != "met"} == {}


def test_the_table_of_goals_is_judged_by_the_worst_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def line() -> str:
        return next(line for line in tables_cpu.goals_table().splitlines() if line.startswith("| 128 x 10 |"))

    before = line()
    assert before.endswith("| met |") and "0.80 to 0.98" in before
    report = json.loads(tables_cpu.CPU_AGAIN.read_text())
    for row in report["results"]:
        if (row["case"], row["provider"], row["upstream"]) == ("128 x 10", "complement_entropy", 0.37):
            row["p50"] *= 10
    (tmp_path / "again.json").write_text(json.dumps(report))
    monkeypatch.setattr(tables_cpu, "CPU_AGAIN", tmp_path / "again.json")
    assert line().endswith("| missed |") and "`benchmarks/results/again.json`" in tables_cpu.goals_table()
    monkeypatch.setattr(tables_cpu, "CPU_AGAIN", tmp_path / "none.json")
    assert line().endswith("| met |") and "0.96 to 0.98" in line()


@pytest.mark.parametrize(
    ("devices", "cases", "said"),
    [
        (("cpu", "NVIDIA A"), ("128 x 10", "256 x 100"), "of one device, got NVIDIA A, cpu"),
        (("NVIDIA A", "NVIDIA B"), ("128 x 10", "256 x 100"), "of one device, got NVIDIA A, NVIDIA B"),
        (("NVIDIA A", "NVIDIA A"), ("128 x 10", "128 x 10"), "each case in one file, got 128 x 10, bf16 in"),
    ],
)
def test_goals_compare_what_can_be_compared(
    devices: tuple[str, ...], cases: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    files = [tmp_path / f"{index}.json" for index in range(len(devices))]
    for file, device, case in zip(files, devices, cases, strict=True):
        report = {"environment": {"device": device}, "results": [timed_row("published", 1.0, case=case)]}
        file.write_text(json.dumps(report))
    with pytest.raises(ValueError, match=said):
        goals.results_of(files)


def test_what_failed_in_a_graph_stands_beside_what_did_not() -> None:
    broken = timed_row("complement_entropy", 1.0, case="8192 x 50257", classes=50257, graph=True, status="failed")
    rows = [timed_row("complement_entropy", 10.0), timed_row("complement_entropy", 9.0, graph=True), broken]
    share = next(line for line in goals.table(rows, goals.GPU_GOALS).splitlines() if line.startswith("| share"))
    assert "| 0.95 | 8192 x 32000, bf16, upstream 1; failed at 8192 x 50257, bf16 | missed, met in 0 of 8 |" in share


def test_kernels_that_were_not_timed_are_left_out_of_their_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = json.loads(tables_gpu.GPU_KERNELS.read_text())
    failed = {"layout": "rows", "classes": 7, "dtype": "bf16", "message": "out of time"}
    (tmp_path / "kernels.json").write_text(json.dumps({**report, "results": [failed, report["results"][0]]}))
    monkeypatch.setattr(tables_gpu, "GPU_KERNELS", tmp_path / "kernels.json")
    (row,) = [line for line in tables_gpu.gpu_kernels_table().splitlines() if line.startswith("| bf16")]
    assert f"| {report['results'][0]['classes']} |" in row


def test_parts_that_were_not_measured_are_left_out_of_the_table_of_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured, missing = RESULTS / "gpu_bf16.json", tmp_path / "gpu_fp16.json"
    report = json.loads(measured.read_text())
    other = tmp_path / "gpu_fp32.json"
    other.write_text(json.dumps({**report, "results": [dict(row, dtype="fp32") for row in report["results"]]}))
    monkeypatch.setattr(tables_gpu, "GPU_RESULTS", [measured, other, missing])
    table = tables_gpu.gpu_table()
    assert "| 128 x 10 | bf16 |" in table and "| 128 x 10 | fp32 |" in table and "fp16" not in table
    assert "`benchmarks/results/gpu_{bf16,fp32}.json`" in table
    monkeypatch.setattr(tables_gpu, "GPU_RESULTS", [measured, missing])
    assert "`benchmarks/results/gpu_bf16.json`" in tables_gpu.gpu_table()
    monkeypatch.setattr(tables_gpu, "GPU_RESULTS", [missing])
    for table_of in (tables_gpu.gpu_table, tables_gpu.gpu_goals_table):
        with pytest.raises(FileNotFoundError, match=missing.name):
            table_of()


def test_notes_say_what_was_measured() -> None:
    about = json.loads(tables_cpu.CPU_RESULTS.read_text())["environment"]
    assert f", float32, at {about['commit']}; `benchmarks/results/cpu.json`." in tables_cpu.cpu_table()
    assert ", float32; `" in tables_cpu.cpu_note({**about, "commit": ""}, tables_cpu.CPU_RESULTS)
    del about["commit"]
    assert ", float32; `" in tables_cpu.cpu_note(about, tables_cpu.CPU_RESULTS)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The first of two; the second asks for the table of CPU_RESULTS."""
    first, second = tmp_path / "first.md", tmp_path / "second.md"
    first.write_text("<!-- new -->\n<!-- /new -->\n")
    second.write_text("<!-- goals -->\n<!-- /goals -->\n")
    monkeypatch.setattr(readme, "PAGES", {first: {"new": lambda: "written"}, second: {"goals": tables_cpu.goals_table}})
    return first


def test_pages_are_written(page: Path) -> None:
    readme.main([])
    assert "written" in page.read_text() and "| 128 x 10 |" in page.with_stem("second").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory: "),
        ('{"environment": {"device": "cpu"}, "results": [', "cpu.json holds no JSON, or not all of it: "),
        (
            '{"environment": {"device": "cpu"}, "results": []}',
            "results lack what the table 'goals' of second.md says: ",
        ),
    ],
)
def test_no_page_is_written_where_one_cannot_be(
    text: str | None,
    said: str,
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, file = page.read_text(), tmp_path / "cpu.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(tables_cpu, "CPU_RESULTS", file)
    with pytest.raises(SystemExit):
        readme.main([])
    error = capsys.readouterr().err
    assert "nothing was written: " in error and said in error
    assert page.read_text() == before


@pytest.mark.parametrize("argument", ["--help", "--nonsense"])
def test_pages_are_not_written_on_the_way_to_help(argument: str, page: Path) -> None:
    before = page.read_text()
    with pytest.raises(SystemExit):
        readme.main([argument])
    assert page.read_text() == before
