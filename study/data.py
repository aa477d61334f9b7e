"""Examples of a task, in three parts."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # the class of what is no example, such as padding


class Part(NamedTuple):
    """What the network takes, each of N examples, and the classes (N) or (N, T), where -100 is no example.

    The adversary perturbs the first input.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor

    def at(self, index: Tensor | slice) -> Part:
        return Part(tuple(each[index] for each in self.inputs), self.target[index])

    def to(self, device: torch.device) -> Part:
        return Part(tuple(each.to(device) for each in self.inputs), self.target.to(device))

    @property
    def size(self) -> int:
        return len(self.target)


class Data(NamedTuple):
    """Networks learn from the first part, are chosen by the second, and meet the third once."""

    train: Part
    validation: Part
    test: Part

    def to(self, device: torch.device) -> Data:
        return Data(*(part.to(device) for part in self))


def in_three(part: Part, train: int, validation: int, limit: int | None) -> Data:
    """The first examples, the next, and the rest; at most `limit` of each."""
    ends = (0, train, train + validation, part.size)
    pieces = (slice(start, end) for start, end in itertools.pairwise(ends))
    return Data(*(part.at(piece).at(slice(limit)) for piece in pieces))


def few_of_each(part: Part, shots: int, seed: int) -> Part:
    """`shots` examples of each class, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(part.size, generator=generator)
    classes = part.target.cpu()[order]
    chosen = [order[classes == each][:shots] for each in torch.unique(classes)]
    return part.at(torch.cat(chosen).to(part.target.device))
