"""What the integration tests share: a small classifier in float64, its data, and a quiet Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.loops import OptimizerFactory, adam
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from lightning_integration import ComplementObjectiveEngine, ComplementObjectiveMixin

ROWS, FEATURES, CLASSES, BATCH = 22, 6, 5, 4  # six batches an epoch, the last with two rows


@pytest.fixture
def pl() -> ModuleType:
    """Lightning under either of its names."""
    try:
        return importlib.import_module("lightning.pytorch")
    except ModuleNotFoundError:
        return pytest.importorskip("pytorch_lightning")


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(CLASSES, (ROWS,), generator=generator)


@pytest.fixture
def loader(rows: tuple[Tensor, Tensor]) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*rows), batch_size=BATCH)


@pytest.fixture
def network() -> Callable[[], nn.Module]:
    """A new network with BatchNorm, always with the same parameters."""

    def build() -> nn.Module:
        torch.manual_seed(3)
        # A bias before BatchNorm has gradient zero, whose rounding noise Adam would blow up.
        first = nn.Linear(FEATURES, 16, bias=False)
        return nn.Sequential(first, nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, CLASSES)).double()

    return build


@pytest.fixture
def trainer(pl: ModuleType) -> Callable[..., Any]:
    def build(**options: Any) -> Any:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return pl.Trainer(**{**defaults, **options})

    return build


@pytest.fixture
def classifier(pl: ModuleType) -> Callable[..., Any]:
    """Builds a LightningModule with the mixin around a network."""

    class Classifier(ComplementObjectiveMixin, pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(
            self,
            network: nn.Module,
            optimizer: OptimizerFactory = adam,
            engine: ComplementObjectiveEngine | None = None,
            scheduler: Callable[[Optimizer], dict[str, Any]] | None = None,
        ) -> None:
            super().__init__()
            self.network, self.engine = network, engine
            self.make_optimizer, self.make_scheduler = optimizer, scheduler
            self.complement_values: list[float] = []
            self.calls = 0

        def configure_complement_objective(self) -> ComplementObjectiveEngine | None:
            return self.engine

        def forward(self, inputs: Tensor) -> Tensor:
            logits: Tensor = self.network(inputs)
            return logits

        def complement_logits(self, batch: Any) -> tuple[Tensor, Tensor]:
            return self(batch[0]), batch[1]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            loss = F.cross_entropy(self.network(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            metrics = self.trainer.callback_metrics
            if "train_complement" in metrics:
                self.complement_values.append(metrics["train_complement"].item())

        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(self.network.parameters())
            if self.make_scheduler is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    return Classifier


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """TrainingArguments for the CPU. Rows keep their order unless `shuffled`, which older Trainers always are."""
    from integrations import hugging_face_models as models  # which skips the test where transformers is missing

    def build(*, shuffled: bool = False, **options: Any) -> Any:
        if not shuffled:
            monkeypatch.setattr(
                models.transformers.Trainer,
                "_get_train_sampler",
                lambda trainer, *_: SequentialSampler(trainer.train_dataset),
            )
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "per_device_train_batch_size": models.BATCH,
            "num_train_epochs": models.EPOCHS,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        return models.transformers.TrainingArguments(**{**defaults, **options})

    return build


@pytest.fixture
def trained(arguments: Any) -> Callable[..., Any]:
    """A Trainer that has trained `network`."""
    from integrations import hugging_face_models as models

    def train(
        network: nn.Module,
        data: models.Batch,
        make_optimizer: Callable[[nn.Module], Optimizer] = models.sgd,
        make_scheduler: Callable[[Optimizer], Any] = models.constant,
        trainer: type[Any] = models.ComplementObjectiveTrainer,
        own: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        optimizer = make_optimizer(network)
        fit = trainer(
            network,
            arguments(**options),
            train_dataset=models.dataset(data),
            optimizers=(optimizer, make_scheduler(optimizer)),
            **(own or {}),
        )
        fit.train()
        return fit

    return train


VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "the",
    "of",
    "to",
    "and",
    "in",
    "said",
    "game",
    "film",
    "bank",
]


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained encoder as found on disk: configuration, weights and tokenizer of a tiny BERT."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("encoder")
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(1)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"network access: {arguments}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
