"""Complement objective training in plain PyTorch: the reference of every test of the two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

OptimizerFactory: TypeAlias = Callable[[Iterable[Any]], Optimizer]
Batches: TypeAlias = list[tuple[Tensor, Tensor]]


def published_complement_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Complement entropy in the operations of its paper, for float64, over the rows that are not -100."""
    logits, targets = logits[targets != -100], targets[targets != -100]
    probabilities = logits.softmax(dim=1)
    target_probability = probabilities.gather(1, targets[:, None])
    others = probabilities / (1 - target_probability + 1e-7)
    terms = (others * others.log()).scatter(1, targets[:, None], 0.0)
    return terms.sum() / logits.numel()


def two_step_loop(
    network: nn.Module,
    batches: Batches,
    optimizer: Optimizer,
    complement_optimizer: Optimizer,
    *,
    epochs: int = 2,
    accumulate: int = 1,
    clip: Callable[[Iterable[Tensor]], Any] = lambda parameters: None,
    weight: float = 1.0,
    lr_ratio: float = 1.0,
    due: Callable[[int, int], bool] = lambda epoch, step: True,
    scheduler: Any = None,
) -> list[float]:
    """Complement objective training without Lightning; returns the complement loss of each complement step.

    The cross-entropy of a window is scaled as Lightning scales it: each mean by `1 / accumulate`, in a shorter last
    window too. The complement loss is that of the window as one batch. (With BatchNorm the window cannot be passed
    as one batch, so its means are weighted by their targets.)
    """
    values = []

    def step(stepper: Optimizer, window: Batches, loss: Callable[[Tensor, Tensor], Tensor], shares: Any) -> None:
        stepper.zero_grad()
        for (inputs, targets), share in zip(window, shares, strict=True):
            (loss(network(inputs), targets) * share).backward()
        clip(network.parameters())
        stepper.step()

    def complement(logits: Tensor, targets: Tensor) -> Tensor:
        value = published_complement_entropy(logits, targets)
        values[-1] += value.item() * int((targets != -100).sum()) / total
        return weight * value

    network.train()
    steps = 0
    for epoch in range(epochs):
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            step(optimizer, window, F.cross_entropy, [1 / accumulate] * len(window))
            steps += 1
            if due(epoch, steps):
                counts = [int((targets != -100).sum()) for _, targets in window]
                total = sum(counts)
                values.append(0.0)
                kept = [group["lr"] for group in optimizer.param_groups]
                for source, other in zip(optimizer.param_groups, complement_optimizer.param_groups, strict=True):
                    if type(complement_optimizer) is type(optimizer):
                        other.update({name: value for name, value in source.items() if name != "params"})
                    other["lr"] = source["lr"] * lr_ratio
                step(complement_optimizer, window, complement, [count / total for count in counts])
                for group, rate in zip(optimizer.param_groups, kept, strict=True):
                    group["lr"] = rate
            if scheduler is not None:
                scheduler.step()
    return values


def adam(parameters: Iterable[Any]) -> Optimizer:
    return Adam(parameters, lr=0.01)


def adamw(parameters: Iterable[Any]) -> Optimizer:
    return AdamW(parameters, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99))


def sgd(parameters: Iterable[Any]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


def one_cycle(optimizer: Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=20)  # moves momentum and betas too


def largest_gap(a: nn.Module, b: nn.Module) -> float:
    """Over parameters and buffers (BatchNorm's statistics see both passes)."""
    state = b.state_dict()
    return max((value.double() - state[name].double()).abs().max().item() for name, value in a.state_dict().items())


def by_norm(parameters: Iterable[Tensor]) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, 0.05)


def by_value(parameters: Iterable[Tensor]) -> None:
    torch.nn.utils.clip_grad_value_(parameters, 0.01)
