"""Handwritten digits (scikit-learn's, 8 x 8 pixels) and a small convolutional net: plain Lightning, no COT in sight.

    python -m lightning_integration fit --config examples/digits_cross_entropy.yaml
    python -m lightning_integration fit --config examples/digits.yaml

The second adds complement objective training, in the configuration alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

# As `import lightning.pytorch as pl`; this one is pytorch_lightning where that was imported first.
from lightning_integration.lightning_package import pl

CLASSES = 10


class DigitsNet(pl.LightningModule):
    """Two convolutions with batch normalization, trained on cross-entropy.

    Args:
        channels: of the first convolution; the second has twice as many.
        learning_rate: of AdamW at its peak; it follows a one-cycle schedule.
    """

    def __init__(self, channels: int = 16, learning_rate: float = 5e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.network = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 4 * 4, CLASSES),
        )
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.test_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = F.cross_entropy(self(images), digits)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits (N, 10)."""
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, digits = batch
        logits = self(images)
        accuracy.update(logits, digits)
        self.log(f"{stage}_loss", F.cross_entropy(logits, digits), prog_bar=True)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True)


class Digits(pl.LightningDataModule):
    """The 1,797 images: 1,000 to train on, 297 for validation, 500 to test and predict.

    Batches are pairs: images (N, 1, 8, 8) with values in [0, 1], digits (N).

    Args:
        batch_size: of training.
        seed: of the split and of the order of training batches.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        pixels, digits = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        images_and_digits = TensorDataset(images, torch.tensor(digits))
        generator = torch.Generator().manual_seed(self.seed)
        self.train, self.validation, self.test = random_split(images_and_digits, (1000, 297, 500), generator)

    def train_dataloader(self) -> DataLoader[Any]:
        # A generator of its own: the order of batches does not depend on what else draws random numbers.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.validation, batch_size=500)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=500)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()
