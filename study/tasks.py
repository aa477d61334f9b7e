"""What is learnt: six tasks whose data registry packages ship or generate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
from torch import nn

from . import numeric, text
from .data import Data, Part


@dataclass(frozen=True)
class Task:
    key: str
    label: str
    about: str
    classes: int
    load: Callable[[int | None], Data]
    network: Callable[[], nn.Module]
    optimizer: Literal["sgd", "adamw"]  # SGD has a momentum of 0.9
    rate: float  # in the middle of every search
    epochs: int
    batch_size: int
    attacks: tuple[float, float]  # strengths of the fast gradient sign method, in units of the input
    shots: int | None = None  # of a class, drawn anew by each seed
    score: Literal["accuracy", "f1"] = "accuracy"


TASKS: dict[str, Task] = {
    task.key: task
    for task in (
        Task(
            "digits", "digits", "scikit-learn's 8 x 8 images, 300 to learn from; two convolutions",
            10, numeric.digits, numeric.digits_network, "sgd", 0.1, 30, 30, (0.05, 0.1),
        ),
        Task(
            "mnist1d", "MNIST-1D", "signals of 40 values, 4,000 to learn from; three convolutions",
            10, numeric.mnist1d, numeric.mnist1d_network, "sgd", 0.2, 30, 100, (0.05, 0.1),
        ),
        Task(
            "bbc", "BBC News, 8 shots", "8 articles a topic; MiniLM's last layer and a head",
            5, text.bbc_news, functools.partial(text.LastLayer, 5, of_pieces=False),
            "adamw", 1e-3, 12, 20, (0.01, 0.03), shots=8,
        ),
        Task(
            "entities", "entities in tweets", "words of 400 tweets, ten types or none; MiniLM's last layer and a head",
            11, text.entities, functools.partial(text.LastLayer, 11, of_pieces=True),
            "adamw", 1e-3, 4, 20, (0.01, 0.03), score="f1",
        ),
        Task(
            "generated100", "generated, K = 100",
            "Gaussians in families of ten, 5,000 to learn from; two hidden layers",
            100, functools.partial(numeric.generated, 100, 5000, 3000, 6000),
            functools.partial(numeric.generated_network, 100), "sgd", 0.1, 20, 100, (0.05, 0.1),
        ),
        Task(
            "generated1000", "generated, K = 1000",
            "Gaussians in families of ten, 20,000 to learn from; two hidden layers",
            1000, functools.partial(numeric.generated, 1000, 20000, 4000, 8000),
            functools.partial(numeric.generated_network, 1000), "sgd", 0.3, 8, 250, (0.05, 0.1),
        ),
    )
}  # fmt: skip


def load(task: Task, limit: int | None, folder: Path) -> Data:
    """The task's data, which is kept in the folder once it is made."""
    file = folder / f"{task.key}{'' if limit is None else f'_{limit}'}.pt"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = task.load(limit)
        unfinished = file.with_suffix(".part")
        torch.save([[part.inputs, part.target] for part in data], unfinished)
        unfinished.replace(file)
    try:
        return Data(*(Part(tuple(inputs), target) for inputs, target in torch.load(file)))
    except (RuntimeError, ValueError, TypeError, OSError, EOFError, UnpicklingError) as error:
        raise OSError(f"{file} is no data of this study, remove it: {error}") from error
