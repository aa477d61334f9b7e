"""Accumulated complement steps equal one on a large batch, wherever the targets come from; steps without targets."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.loops import largest_gap, published_complement_entropy
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_integration import (
    ComplementObjectiveEngine,
    ComplementObjectiveMixin,
    ComplementObjectiveTraining,
    causal_lm_logits_and_targets,
)

# Lightning's advice about loaders, loggers and step counts has no place in a unit test's output.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

TOKENS = 11


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(TOKENS, 8), nn.Linear(8, TOKENS)).double()


def sentences(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    ids = torch.randint(TOKENS, (len(lengths), 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return {"input_ids": ids, "labels": labels}


def split(batch: dict[str, Tensor], sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    parts = zip(*(value.split(sizes) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


SHIFTED = sentences((9, 9, 9, 9, 3, 1, 2, 1, 3, 2))  # rows of length 1 have no next token


def shifted(module: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return causal_lm_logits_and_targets(module, batch)


def own_names(module: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The first token of each row that has a label beyond the third, from a mapping without "labels"."""
    logits, targets = module(input_ids=batch["tokens"])["logits"][:, 0], batch["next"][:, 1]
    return logits, targets.masked_fill(batch["next"][:, 3] == -100, -100)


def reversed_pair(module: Any, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    targets, ids = batch
    return module(input_ids=ids)["logits"].flatten(0, 1), targets.flatten()


def soft(module: Any, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    return module(input_ids=batch[1])["logits"][:, 0], F.one_hot(batch[1][:, 1], TOKENS).double()


def soft_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.softmax(1) * targets).sum(1).mean()


CASES: dict[str, tuple[Callable[..., Any], Callable[[dict[str, Tensor]], Any], Callable[..., Tensor]]] = {
    "causal": (shifted, lambda batch: batch, published_complement_entropy),
    "names of its own": (
        own_names,
        lambda batch: {"tokens": batch["input_ids"], "next": batch["labels"]},
        published_complement_entropy,
    ),
    "reversed pair": (
        reversed_pair,
        lambda batch: [batch["labels"], batch["input_ids"]],
        published_complement_entropy,
    ),
    "class probabilities": (soft, lambda batch: [batch["labels"], batch["input_ids"]], soft_loss),
}


@pytest.fixture
def complement_only(pl: ModuleType) -> Callable[..., Any]:
    """A language model whose cross-entropy moves nothing, so that only complement steps do."""

    class Model(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, dtype: torch.dtype = torch.float64) -> None:
            super().__init__()
            self.network = language_model().to(dtype)

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.network(input_ids)}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0.0 * sum(parameter.sum() for parameter in self.parameters())  # type: ignore[return-value]

        def configure_optimizers(self) -> Optimizer:
            return SGD(self.parameters(), lr=1.0, momentum=0.5)

    return Model


@pytest.mark.parametrize("way", ["mixin", "callback"])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_large_batch(name: str, way: str, complement_only: Any, trainer: Any) -> None:
    logits, pack, objective = CASES[name]
    windows = [(2, 4, 1, 2, 1), (3, 3, 4)]  # the second is ragged

    if way == "mixin":

        class Mixed(ComplementObjectiveMixin, complement_only):  # type: ignore[misc]
            complement_logits = logits

            def configure_complement_objective(self) -> ComplementObjectiveEngine:
                return ComplementObjectiveEngine(objective, weight=2.0)

        module, callbacks = Mixed(), []
    else:
        module, callbacks = complement_only(), [ComplementObjectiveTraining(objective, logits=logits, weight=2.0)]
    batches = [pack(part) for sizes in windows for part in split(SHIFTED, sizes)]
    run = trainer(max_epochs=1, accumulate_grad_batches=5, callbacks=callbacks)
    run.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))

    expected = language_model()
    optimizer = SGD(expected.parameters(), lr=1.0, momentum=0.5)
    for _ in windows:
        optimizer.zero_grad()
        loss = objective(*logits(lambda input_ids: {"logits": expected(input_ids)}, pack(SHIFTED)))
        (2 * loss).backward()
        optimizer.step()
    assert largest_gap(module.network, expected) < 1e-12
    assert largest_gap(expected, language_model()) > 1e-3
    assert run.callback_metrics["train_complement"].item() == pytest.approx(loss.item(), abs=1e-12)


def test_with_a_gradient_scaler(pl: ModuleType, complement_only: Any, trainer: Any) -> None:
    """Scaled gradients are weighted as others, clipping comes after."""
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    module, cot = complement_only(torch.float32), ComplementObjectiveTraining(logits=shifted, optimizer="shared")
    run = trainer(max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=0.01, plugins=[plugin], callbacks=[cot])
    run.fit(module, torch.utils.data.DataLoader(split(SHIFTED, (2, 2, 4, 2)), batch_size=None))  # type: ignore[arg-type]

    expected = language_model().float()
    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        logits, targets = shifted(lambda input_ids: {"logits": expected(input_ids)}, SHIFTED)
    published_complement_entropy(logits.double(), targets).backward()
    nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
    SGD(expected.parameters(), lr=1.0).step()
    assert largest_gap(module.network, expected) < 2e-5
    assert largest_gap(expected, language_model().float()) > 1e-3
    assert plugin.scaler.get_scale() == 1024


OBJECTIVES = {
    "default": {},
    "published": {"objective": published_complement_entropy},
    "cross-entropy": {"objective": F.cross_entropy},
    # Its gradient without targets is 0 / 0 as well.
    "masked": {"objective": lambda z, t: -(z.softmax(1).square().sum(1) * (t != -100)).sum() / (t != -100).sum()},
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_windows_without_targets_have_no_gradients(
    name: str, accumulate: int, complement_only: Any, trainer: Any
) -> None:
    seen: list[float] = []

    class Watched(complement_only):  # type: ignore[misc]
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if "train_complement" in self.trainer.callback_metrics:
                seen.append(self.trainer.callback_metrics["train_complement"].item())

        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            total = sum(parameter.grad.abs().sum().item() for parameter in self.parameters())
            (gradients_of_complement if in_complement else gradients).append(total)
            in_complement.append(True) if not in_complement else in_complement.clear()

    gradients: list[float] = []
    gradients_of_complement: list[float] = []
    in_complement: list[bool] = []
    nothing = {"input_ids": SHIFTED["input_ids"], "labels": torch.full_like(SHIFTED["labels"], -100)}
    module, cot = Watched(), ComplementObjectiveTraining(logits=shifted, **OBJECTIVES[name])
    batches = [nothing] * accumulate + [SHIFTED, nothing][:accumulate]
    run = trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[cot])
    run.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]

    expected = language_model()
    objective = OBJECTIVES[name].get("objective", published_complement_entropy)
    loss = objective(*shifted(lambda input_ids: {"logits": expected(input_ids)}, SHIFTED))
    loss.backward()
    SGD(expected.parameters(), lr=1.0).step()
    assert gradients_of_complement[0] == 0
    assert largest_gap(module.network, expected) < 1e-6  # the default objective has another eps
    assert seen[0] == 0
    assert seen[-1] == pytest.approx(loss.item(), abs=1e-6)
