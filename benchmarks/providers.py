"""Who is measured: ways to compute a loss of (logits, target), what each claims to compute, and what it may cost.

A provider is a loss with reduction "mean". Those that another package brings are imported when they are loaded; where
that fails they are missing, and the rest is measured.

Cut-cross-entropy is not here: it takes hidden states and a projection instead of logits, and counting it on logits
would count a matrix product more than the others do; :mod:`.linear` measures it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

import cot_kernels
from cot_kernels import reference

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Provider:
    """A way to compute a loss.

    ``load`` returns it, or raises ImportError. ``formula`` is what it claims to compute, summed over rows, in the
    precision of its input. ``tensors`` estimates how many tensors of the size of the logits are alive at the peak,
    the logits not counted.
    """

    name: str
    load: Callable[[], Loss]
    formula: Loss
    tensors: int = 2
    rounds_operations: bool = False  # each operation rounds to the dtype of the logits
    overwrites: bool = False  # forms the gradient in the forward pass, in place of the logits
    rows_only: bool = False  # takes (N, K) logits alone
    gpu_only: bool = False
    slow: bool = False  # takes seconds to get ready for a shape
    ours: bool = False

    def passes(self, mode: str) -> int:
        """Times that an ideal implementation of the algorithm moves a tensor of the logits' size through memory.

        Statistics forward: one read; gradient backward: one read, one write. In place in the forward pass: one read
        and one write there, and nothing that must be done in the backward pass.
        """
        if self.overwrites:
            return {"forward": 2, "backward": 0, "both": 2}[mode]
        return {"forward": 1, "backward": 2, "both": 3}[mode]

    @property
    def modes(self) -> tuple[str, ...]:
        """Those with something to count."""
        return tuple(mode for mode in MODES if self.passes(mode))


def _given(loss: Loss) -> Callable[[], Loss]:
    return lambda: loss


def _compiled(loss: Loss) -> Callable[[], Loss]:
    def load() -> Loss:
        torch._dynamo.reset()  # a graph a shape, whatever was compiled before
        compiled: Loss = torch.compile(loss, fullgraph=True, dynamic=False)
        return compiled

    return load


def _liger() -> Loss:
    loss: Loss = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return loss


def _quack() -> Loss:
    """Its mean of the rows: the gradient of its own has a stride of 0, which its backward pass refuses."""
    rows = partial(importlib.import_module("quack.cross_entropy").cross_entropy, reduction="none")
    return lambda logits, target: (rows(logits, target) * (1 / len(target))).sum()


_published = reference.complement_entropy
_published_sum = partial(reference.complement_entropy, reduction="sum")
_cross_entropy_sum = partial(F.cross_entropy, reduction="sum")

PROVIDERS: tuple[Provider, ...] = (
    Provider("published", _given(_published), _published_sum, tensors=7, rounds_operations=True),
    Provider(
        "published, compiled", _compiled(_published), _published_sum, tensors=4, rounds_operations=True, slow=True
    ),
    Provider("F.cross_entropy", _given(F.cross_entropy), _cross_entropy_sum, tensors=3, rounds_operations=True),
    Provider("Liger cross_entropy", _liger, _cross_entropy_sum, overwrites=True, rows_only=True, gpu_only=True),
    Provider("quack cross_entropy", _quack, _cross_entropy_sum, rows_only=True, gpu_only=True),
    Provider("complement_entropy", _given(cot_kernels.complement_entropy), _published_sum, ours=True),
    Provider(
        "complement_entropy, eps=0",
        _given(partial(cot_kernels.complement_entropy, eps=0.0)),
        partial(reference.complement_entropy, reduction="sum", eps=0.0),
        ours=True,
    ),
    Provider(
        "guided_complement_entropy",
        _given(cot_kernels.guided_complement_entropy),
        partial(reference.guided_complement_entropy, reduction="sum"),
        ours=True,
    ),
    Provider(
        "complement_cross_entropy",
        _given(cot_kernels.complement_cross_entropy),
        partial(reference.complement_cross_entropy, reduction="sum"),
        ours=True,
    ),
    Provider("cross_entropy", _given(cot_kernels.cross_entropy), _cross_entropy_sum, ours=True),
)
