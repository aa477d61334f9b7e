"""The problems that are measured: shapes of logits, by part of the suite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """Logits of shape (batch, classes, *trailing) with one target for each of batch * prod(trailing) rows."""

    batch: int
    classes: int
    trailing: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return " x ".join(str(size) for size in self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.classes, *self.trailing)

    @property
    def target_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.trailing)

    @property
    def rows(self) -> int:
        return math.prod(self.target_shape)

    def logits_bytes(self, dtype: torch.dtype) -> int:
        """One pass over the logits."""
        return self.rows * self.classes * dtype.itemsize


GPU_PARTS = ("small", "widths", "tokens")
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)

PARTS: dict[str, tuple[Case, ...]] = {
    "small": (
        Case(128, 10),
        Case(256, 100),
        Case(256, 1000),
        Case(4096, 1000),
        Case(8, 21, (512, 512)),
        Case(64, 128256),
    ),
    # As many logits as the large vocabularies have, in shorter rows.
    "widths": (Case(268800, 1000), Case(65536, 4096), Case(16384, 16384)),
    "tokens": tuple(Case(8192, classes) for classes in VOCABULARIES),
    "cpu": (
        Case(128, 10),
        Case(256, 1000),
        Case(4096, 100),
        Case(1024, 1000),
        Case(512, 32000),
        Case(128, 151936),
    ),
    "quick": (Case(16, 10), Case(2, 5, (4, 3)), Case(8, 300)),
}
