"""How the kernels of a test run: as compiled, on a GPU or emulated, or in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch

Case = TypeVar("Case")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = torch.cuda.is_available() or "EMULATED_GPU" in os.environ


def some(cases: Sequence[Case], *fewer: Case) -> Sequence[Case]:
    """All cases for compiled kernels, which ``make test`` executes too; fewer in the interpreter, which is slower and
    knows neither alignment nor layouts of threads."""
    assert set(fewer) <= set(cases)
    return cases if COMPILED else fewer
