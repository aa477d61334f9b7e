"""A transformer text classifier trained with complement objective training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision
from transformers import AutoModelForSequenceClassification

from cot_kernels import complement_cross_entropy, complement_entropy

from .checks import check_count, check_nonnegative, check_positive
from .encoders import ModelPath, resolved
from .lightning_package import pl
from .loss import ComplementLoss
from .mixin import ComplementObjectiveMixin
from .training import ComplementObjectiveEngine

__all__ = ["CotBert"]


class CotBert(ComplementObjectiveMixin, pl.LightningModule):
    """Fine-tunes a pretrained transformer to classify texts, with two-step COT or without.

    With `use_cot=True` each batch takes two optimizer steps: cross-entropy, then, after a fresh forward, the
    complement loss (Chen et al., ICLR 2019, arXiv 1903.01182; see `ComplementObjectiveMixin`). With
    `use_cot=False` it takes one, on cross-entropy plus `one_step_weight` times the negated complement
    entropy in nats,

        loss = -ln p_g + one_step_weight * sum_{j != g} q_j ln q_j,    q = softmax of the logits without z_g

    which with the default weight 0 is cross-entropy, and otherwise complement cross-entropy (Kim et al.,
    2021, arXiv 2009.02189).

    Batches are mappings as Hugging Face collators make them: "labels" of shape (N), and whatever the encoder
    takes ("input_ids" and "attention_mask" of shape (N, length), ...). The optimizer is Adam; its learning
    rate is lowered by `ReduceLROnPlateau` on `train_loss`, looked at every tenth batch, or once an epoch where
    epochs are shorter.

    Logged, and shown on the progress bar: `train_loss` and `train_complement` per step;
    `train_accuracy`, `train_precision`, `val_loss`, `val_accuracy` and `val_precision` per epoch.
    Testing logs `test_loss`, `test_accuracy` and `test_precision`. Losses other than `train_loss` are
    cross-entropy in all cases; accuracy is over all texts, precision is the mean over classes.
    `Trainer.predict` gives the logits of each batch.

    Args:
        model_path: folder of a pretrained model, its name on the Hugging Face hub, or a function that gives either.
        num_labels: number of classes, at least 2 (with 2 the complement is one class and its entropy always 0).
        use_cot: two-step COT.
        learning_rate: of Adam, at the start.
        complement_optimizer: "shared" (the same Adam takes both steps) or "separate" (one of its own).
        objective: loss of the second step, `(logits, targets) -> scalar`. It is not saved in checkpoints: give
            it to `load_from_checkpoint` again when it is not the default.
        one_step_weight: weight of one nat of complement entropy in the one-step loss; needs `use_cot=False`.

    Raises:
        TypeError, ValueError: an argument is not as described.
        OSError: there is no model at `model_path`.
    """

    def __init__(
        self,
        model_path: ModelPath,
        num_labels: int,
        use_cot: bool = True,
        *,
        learning_rate: float = 5e-5,
        complement_optimizer: Literal["shared", "separate"] = "shared",
        objective: ComplementLoss = complement_entropy,
        one_step_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("num_labels", num_labels, least=2)
        check_positive("learning_rate", learning_rate)
        check_nonnegative("one_step_weight", one_step_weight)
        if use_cot and one_step_weight > 0:
            raise ValueError(
                f"one_step_weight={one_step_weight} needs use_cot=False: the complement is trained either in "
                "a step of its own or in the sum"
            )
        model_path = resolved(model_path)  # checkpoints hold plain values only
        self.save_hyperparameters(ignore="objective")
        self.learning_rate = learning_rate
        self.one_step_weight = one_step_weight
        self._configured_engine = (
            ComplementObjectiveEngine(objective, optimizer=complement_optimizer) if use_cot else None
        )
        # float32 whatever the file holds; Trainer(precision=...) is the place to lower it. And
        # from_pretrained leaves the model in eval mode, which Lightning would keep: training would run
        # without dropout.
        self.model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=num_labels)
        self.model.float().train()

        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_labels, average="micro"),
                "precision": MulticlassPrecision(num_labels, average="macro"),
            }
        )
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    def configure_complement_objective(self) -> ComplementObjectiveEngine | None:
        return self._configured_engine

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (N, num_labels) of encoded texts, as in `model(**tokenizer(texts, return_tensors="pt"))`."""
        logits: Tensor = self.model(**inputs).logits
        return logits

    def complement_logits(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (N, num_labels) and labels (N) of a batch.

        Raises:
            KeyError: the batch has no "labels".
        """
        if "labels" not in batch:
            raise KeyError(f'the batch must hold "labels", got {sorted(batch)}')
        logits: Tensor = self(**_encoder_inputs(batch))
        return logits, batch["labels"]

    def on_train_start(self) -> None:
        super().on_train_start()
        # Lightning counts batches within an epoch: a shorter one would never reach the tenth.
        for config in self.trainer.lr_scheduler_configs:
            config.frequency = int(min(config.frequency, self.trainer.num_training_batches))

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels = self.complement_logits(batch)
        if self.one_step_weight > 0:
            weight = self.one_step_weight
            loss = complement_cross_entropy(logits, labels, gamma=-weight, normalization="none")
        else:
            loss = F.cross_entropy(logits, labels)
        self.train_metrics.update(logits, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val_loss", self.val_metrics)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test_loss", self.test_metrics)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Logits (N, num_labels); the batch may hold labels or not."""
        logits: Tensor = self(**_encoder_inputs(batch))
        return logits

    def configure_optimizers(self) -> Any:
        optimizer = Adam(self.parameters(), lr=self.learning_rate)
        scheduler = {
            "scheduler": ReduceLROnPlateau(optimizer),
            "interval": "step",
            "frequency": 10,
            "monitor": "train_loss",
        }
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _evaluate(self, batch: Mapping[str, Tensor], loss_name: str, metrics: MetricCollection) -> None:
        logits, labels = self.complement_logits(batch)
        metrics.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(loss_name, loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)


def _encoder_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}
