"""Trains a network by a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .data import Part
from .methods import Criterion, Recipe
from .tasks import Task

WARM_UP = 0.05  # of all batches
MOMENTUM = 0.9


class Training:
    """A network, its examples and the steps that a batch takes; the learning rate rises, then falls as a cosine.

    The seed decides on the weights, the order of examples and dropout: methods of one seed differ by their recipe.
    """

    def __init__(self, task: Task, part: Part, recipe: Recipe, rate: float, seed: int, epochs: int) -> None:
        torch.manual_seed(seed)
        self.part, self.recipe, self.epochs = part, recipe, epochs * recipe.epochs
        self.batch_size = task.batch_size
        self.network = task.network().to(part.target.device).train()
        self.batches = self.epochs * math.ceil(part.size / task.batch_size)
        self._order = torch.Generator().manual_seed(seed)
        shared = self._optimizer(task, rate)
        self._optimizers = [
            self._optimizer(task, rate * step.rate) if step.own_optimizer else shared for step in recipe.steps
        ]
        self._schedules = [LambdaLR(optimizer, self._factor) for optimizer in dict.fromkeys(self._optimizers)]
        self._taken = 0

    def run(self) -> nn.Module:
        """The network, trained."""
        for index in self.order():
            self.batch(index)
        return self.network.eval()

    def order(self) -> Iterator[Tensor]:
        """The indices of every batch."""
        for _ in range(self.epochs):
            permuted = torch.randperm(self.part.size, generator=self._order).to(self.part.target.device)
            yield from torch.split(permuted, self.batch_size)

    def batch(self, index: Tensor) -> None:
        """All steps of a batch."""
        batch = self.part.at(index)
        self._taken += 1
        for step, optimizer in zip(self.recipe.steps, self._optimizers, strict=True):
            if criterion := step.criterion if self._taken % step.every == 0 else step.otherwise:
                self._step(criterion, optimizer, batch)
        for schedule in self._schedules:
            schedule.step()

    def _step(self, criterion: Criterion, optimizer: Optimizer, batch: Part) -> None:
        optimizer.zero_grad()
        logits = self.network(*batch.inputs)
        criterion(logits.flatten(0, -2), batch.target.flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def _optimizer(self, task: Task, rate: float) -> Optimizer:
        parameters, decay = self.network.parameters(), self.recipe.weight_decay
        if task.optimizer == "sgd":
            return SGD(parameters, rate, momentum=MOMENTUM, weight_decay=decay)
        return AdamW(parameters, rate, weight_decay=decay)

    def _factor(self, batch: int) -> float:
        warm = WARM_UP * self.batches
        if batch < warm:
            return (batch + 1) / (warm + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (batch - warm) / max(1.0, self.batches - warm))
