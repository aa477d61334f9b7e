"""Models built from small configurations, their batches, and two-step training of them in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.loops import published_complement_entropy
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lightning_integration.batches import causal_lm_logits_and_targets, logits_and_targets

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
hugging_face = pytest.importorskip("lightning_integration.hugging_face")


ROWS, LENGTH, CLASSES, VOCABULARY, BATCH, EPOCHS = 22, 7, 5, 12, 4, 2  # six batches an epoch, the last with two rows
LOSS_ROUNDING = 6e-5  # older Trainers log their loss with four decimals


Batch = dict[str, Tensor]
Find = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]

ComplementObjectiveTrainer = hugging_face.ComplementObjectiveTrainer


def bert(kind: str = "SequenceClassification", dropout: float = 0.0) -> Any:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=CLASSES,
        initializer_range=0.5,
    )
    return getattr(transformers, f"BertFor{kind}")(config).double()


def gpt2() -> Any:
    torch.manual_seed(3)
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 8, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **dropout, **ends, initializer_range=0.5)
    ).double()


def llama() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.5,
    )
    return transformers.LlamaForCausalLM(config).double()


def texts() -> Batch:
    generator = torch.Generator().manual_seed(7)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[::3, 4:] = 0
    return {"input_ids": torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator), "attention_mask": mask}


def labelled_texts() -> Batch:
    return {**texts(), "labels": torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(8))}


def labelled_tokens() -> Batch:
    """Few labels in the first rows, many in the last, none at all in the second batch."""
    generator = torch.Generator().manual_seed(8)
    labels = torch.randint(CLASSES, (ROWS, LENGTH), generator=generator)
    labels[torch.rand(ROWS, LENGTH, generator=generator) > torch.linspace(0.1, 1, ROWS)[:, None]] = -100
    labels[BATCH : 2 * BATCH] = -100
    return {**texts(), "labels": labels}


def continued_texts() -> Batch:
    data = texts()
    labels = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    labels[1::5, :3] = -100  # a prompt, which is not learned
    return {**data, "labels": labels}


def part(data: Batch, start: int, stop: int) -> Batch:
    return {name: value[start:stop] for name, value in data.items()}


def dataset(data: Batch) -> list[Batch]:
    return [{name: value[row] for name, value in data.items()} for row in range(len(data["input_ids"]))]


def windows(data: Batch, accumulate: int) -> list[Batch]:
    size = BATCH * accumulate
    return [part(data, start, min(start + size, ROWS)) for start in range(0, ROWS, size)]


def rows_of(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.reshape(-1, logits.shape[-1]), batch["labels"].reshape(-1)


def next_tokens_of(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1)


def two_step_loop(
    network: nn.Module,
    data: Batch,
    optimizer: Optimizer,
    *,
    find: Find = rows_of,
    accumulate: int = 1,
    clip: float = 0.0,
    weight: float = 1.0,
    scheduler: Any = None,
    smoothing: float = 0.0,
    epochs: int = EPOCHS,
) -> list[tuple[float, float]]:
    """Two-step COT with each window as one large batch; returns cross-entropy and complement loss of each step."""
    history = []

    def step(window: Batch, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        logits, targets = find(network, window)
        valid = targets != -100
        value = loss(logits[valid], targets[valid]) if valid.any() else logits.sum() * 0
        optimizer.zero_grad()
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        return value.item()

    network.train()
    for _ in range(epochs):
        for window in windows(data, accumulate):
            primary = step(window, lambda z, g: F.cross_entropy(z, g, label_smoothing=smoothing))
            complement = step(window, lambda z, g: weight * published_complement_entropy(z, g)) / weight
            history.append((primary, complement))
            if scheduler is not None:
                scheduler.step()
    return history


def sgd(network: nn.Module) -> Optimizer:
    return SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(network: nn.Module) -> Optimizer:
    return AdamW(network.parameters(), lr=0.01, weight_decay=0.1, betas=(0.8, 0.99))


def one_cycle(optimizer: Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=20)  # moves momentum and betas too


def constant(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@dataclass(frozen=True)
class Task:
    network: Callable[[], Any]
    data: Callable[[], Batch]
    find: Find = rows_of
    logits: Any = logits_and_targets


TASKS = {
    "texts": Task(bert, labelled_texts),
    "tokens": Task(lambda: bert("TokenClassification"), labelled_tokens),
    "gpt2": Task(gpt2, continued_texts, next_tokens_of, causal_lm_logits_and_targets),
    "llama": Task(llama, continued_texts, next_tokens_of, causal_lm_logits_and_targets),
}
