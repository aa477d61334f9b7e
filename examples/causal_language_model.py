"""A small causal language model on BBC News, trained with and without the logits of its vocabulary.

    python -m examples.causal_language_model

trains one Llama, built from its configuration, twice from the same weights on the same batches: with
`linear_complement_cross_entropy` on the hidden states, and with `complement_cross_entropy` on the logits. The two
differ by the lines of `fused_loss` and `unfused_loss`. About two minutes on two CPU cores; at the end a table of the
losses step by step, and of the memory that training took. Each method runs in a process of its own, for the peak of a
process can be read once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cot_kernels import complement_cross_entropy, linear_complement_cross_entropy
from lightning_integration import packaged_minilm
from lightning_integration.data import distinct_stories, read_bbc_news

GAMMA = -0.1  # a tenth of a nat of cross-entropy for a nat of complement entropy
BUDGET = 32 << 20

SEQUENCES, LENGTH = 8, 128  # of a batch: 1,024 tokens, whose logits are 125 MB in float32, and their gradient as much
LEARNING_RATE = 1e-3


def fused_loss(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    hidden = model.model(tokens).last_hidden_state
    loss: Tensor = linear_complement_cross_entropy(
        hidden, model.lm_head.weight, labels, gamma=GAMMA, normalization="none", memory_budget=BUDGET
    )
    return loss


def unfused_loss(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = model(tokens).logits
    return complement_cross_entropy(logits.movedim(-1, 1), labels, gamma=GAMMA, normalization="none")


LOSSES = {"fused": fused_loss, "unfused": unfused_loss}


class Run(NamedTuple):
    """What one training left behind."""

    losses: list[float]
    megabytes: float
    """The peak of the process above what model, optimizer and data took."""
    seconds: float


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Articles one after another, cut into sequences; labels are the tokens, shifted by one."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_minilm())
    texts = [article.text for article in distinct_stories(read_bbc_news())]
    torch.manual_seed(0)
    texts = [texts[place] for place in torch.randperm(len(texts)).tolist()]
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, truncation=False, verbose=False)["input_ids"]
        if len(tokens) > steps * SEQUENCES * (LENGTH + 1):
            break
    whole = len(tokens) // (SEQUENCES * (LENGTH + 1))
    cut = torch.tensor(tokens[: whole * SEQUENCES * (LENGTH + 1)]).view(whole, SEQUENCES, LENGTH + 1)
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in cut[torch.arange(steps) % whole]]


def build() -> LlamaForCausalLM:
    """Two layers of width 128; the vocabulary is MiniLM's, 30,522 words, its embedding tied to the projection."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30522,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


def _resident() -> float:
    """Megabytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(name: str, steps: int) -> Run:
    torch.set_num_threads(2)
    model, data = build(), batches(steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for parameter in model.parameters():  # what the optimizer will hold is there before the memory is read
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    before, start, losses = _resident(), time.perf_counter(), []
    for tokens, labels in track(data, f"{name:8}", console=Console(file=sys.stderr)):
        optimizer.zero_grad()
        loss = LOSSES[name](model, tokens, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return Run(losses, peak - before, seconds)


def report(runs: dict[str, Run]) -> None:
    steps = len(runs["fused"].losses)
    table = Table(title="loss, step by step")
    for heading in ("step", *runs, "difference"):
        table.add_column(heading, justify="right")
    for step in sorted({0, *range(9, steps, max(1, steps // 8)), steps - 1}):
        values = [run.losses[step] for run in runs.values()]
        table.add_row(str(step + 1), *(f"{value:.5f}" for value in values), f"{values[0] - values[1]:.1e}")
    Console().print(table)
    table = Table(title="what training took")
    for heading in ("", "peak memory", "seconds", "largest difference"):
        table.add_column(heading, justify="right")
    largest = max(abs(a - b) for a, b in zip(runs["fused"].losses, runs["unfused"].losses, strict=True))
    for name, run in runs.items():
        gap = f"{largest:.1e}" if name == "fused" else ""
        table.add_row(name, f"{run.megabytes:.0f} MB", f"{run.seconds:.0f}", gap)
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        runs = {name: pool.apply(train, (name, options.steps)) for name in LOSSES}
    report(runs)
    if options.output:
        options.output.write_text(json.dumps({name: run._asdict() for name, run in runs.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
