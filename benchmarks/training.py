"""What the second step costs: the time of training batches with COT, as a ratio to cross-entropy in the same process.

``python -m benchmarks.training --output FILE`` trains scikit-learn's digits with a small convolutional net, and BBC
News with MiniLM, in turn with and without the callback, several rounds, and keeps the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.arguments import output_file, thread_count
from benchmarks.environment import environment
from examples.digits import Digits, DigitsNet
from examples.quiet import silence
from lightning_integration import BBCNewsDataModule, ComplementObjectiveTraining, CotBert, packaged_minilm
from lightning_integration.lightning_package import Callback, pl

GROUP = 4  # batches timed together, so that a second step every fourth batch is seen in each
ROUNDS = 3

METHODS: dict[str, Callable[[], list[Any]]] = {
    "cross-entropy": list,
    "two steps, separate optimizer": lambda: [ComplementObjectiveTraining()],
    "two steps, shared optimizer": lambda: [ComplementObjectiveTraining(optimizer="shared")],
    "second step every 4th": lambda: [ComplementObjectiveTraining(every_n_steps=4)],
}


class GroupTimes(Callback):
    """Seconds of each GROUP of training batches; the first group warms up and is not kept."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._batches, self._start = 0, 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self._batches += 1
        if self._batches % GROUP == 0:
            now = time.perf_counter()
            if self._batches > GROUP:
                self.seconds.append(now - self._start)
            self._start = now


def networks() -> dict[str, tuple[Callable[[], Any], Any, int]]:
    """A module, its data, and how many batches a round takes."""
    encoder = packaged_minilm()
    return {
        "digits, convolutional net": (DigitsNet, Digits(), 96),
        "BBC News, MiniLM": (
            lambda: CotBert(encoder, 5, use_cot=False),
            BBCNewsDataModule(encoder, articles_per_topic=16, max_length=64),
            20,
        ),
    }


def seconds(module: Any, data: Any, callbacks: list[Any], batches: int) -> list[float]:
    times = GroupTimes()
    pl.Trainer(
        accelerator="cpu", devices=1, max_steps=batches, max_epochs=-1, callbacks=[*callbacks, times], logger=False,
        limit_val_batches=0, num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)  # fmt: skip
    return times.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--threads", type=thread_count, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    silence()
    pairs = networks()
    times: dict[str, dict[str, list[float]]] = {network: {method: [] for method in METHODS} for network in pairs}
    runs = [(network, method) for _ in range(ROUNDS) for network in pairs for method in METHODS]
    for network, method in track(runs, "measuring", console=Console(stderr=True)):
        build, data, batches = pairs[network]
        pl.seed_everything(0, verbose=False)
        times[network][method] += seconds(build(), data, METHODS[method](), batches)
    results = {
        network: {method: statistics.median(values) / GROUP * 1e3 for method, values in methods.items()}
        for network, methods in times.items()
    }
    table = Table(title="time of a training batch as a ratio to cross-entropy (medians)")
    table.add_column("")
    for method in METHODS:
        table.add_column(method, justify="right")
    for network, milliseconds in results.items():
        ratios = (f"{value / milliseconds['cross-entropy']:.2f}" for value in milliseconds.values())
        table.add_row(network, *ratios)
    Console().print(table)
    if arguments.output:
        report = {"environment": environment(arguments.threads), "milliseconds": results}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
