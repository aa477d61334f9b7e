"""A task of the study that trains in no time, and its data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("mnist1d")

from study.data import Data, Part
from study.methods import METHODS
from study.tasks import Task

METHOD_NAMES = list(METHODS)


def small_task(**changes: Any) -> Task:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    made = Task("small", "small", "", 4, lambda _: small_data(), network, "sgd", 0.1, 3, 10, (0.1, 0.2))
    return dataclasses.replace(made, **changes)


def small_part(size: int = 40, seed: int = 0) -> Part:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(4, (size,), generator=generator)
    inputs = F.one_hot(target, 6) + 0.5 * torch.randn(size, 6, generator=generator)
    return Part((inputs,), target)


def small_data() -> Data:
    return Data(small_part(40, 0), small_part(30, 1), small_part(20, 2))
