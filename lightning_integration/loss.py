"""The complement loss of a batch, and of the micro-batches of an accumulation window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batches import HOW_TO_SAY_WHERE, count_valid, described

# Any, not Tensor: jsonargparse takes what returns a class for a factory of its instances.
ComplementLoss = Callable[[Tensor, Tensor], Any]
"""`(logits, targets) -> scalar`, for example `cot_kernels.complement_entropy`."""

LogitsFunction = Callable[[Any], tuple[Tensor, Tensor]]
"""`batch -> (logits, targets)`, run with gradients and in training mode."""


def check_objective(name: str, objective: Any) -> None:
    """Whether the argument `name` can be a complement loss.

    Raises:
        TypeError: it cannot be called with logits and targets.
    """
    if isinstance(objective, type):
        raise TypeError(
            f"{name} must be a callable (logits, targets) -> scalar Tensor, got the class {objective.__name__}: "
            f"pass an instance, as in {objective.__name__}()"
        )
    if not callable(objective):
        raise TypeError(f"{name} must be a callable (logits, targets) -> scalar Tensor, got {type(objective).__name__}")


def checked_logits_and_targets(pair: Any) -> tuple[Tensor, Tensor]:
    """What a function for the logits of a batch returned.

    Raises:
        TypeError: it is not a pair of floating-point logits, with their graph, and integer targets.
        ValueError: there are not two classes.
    """
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(each, Tensor) for each in pair)):
        raise TypeError(
            f"the logits of a batch must come as a pair of Tensors (logits, targets), got {described(pair)}: "
            f"{HOW_TO_SAY_WHERE}"
        )
    logits, targets = pair
    if not logits.is_floating_point() or logits.dim() == 0:
        raise TypeError(
            f"logits must be a floating-point Tensor of shape (N, K, ...), got {described(logits)}: {HOW_TO_SAY_WHERE}"
        )
    if not logits.requires_grad:
        raise TypeError(
            "logits must come with their graph, got a Tensor that does not require grad: compute them without "
            "detach() and torch.no_grad(), from parameters that are not all frozen"
        )
    of_classes = targets.shape == logits.shape and targets.is_floating_point()  # probabilities, for a loss that can
    if not of_classes and (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool):
        raise TypeError(
            f"targets must be class indices, an integer Tensor such as torch.int64, got {described(targets)}: "
            f"{HOW_TO_SAY_WHERE}"
        )
    if (classes := logits.shape[min(1, logits.dim() - 1)]) < 2:
        raise ValueError(
            f"logits must be of at least 2 classes, better 3, got {classes} in shape {tuple(logits.shape)}: without "
            "wrong classes there is no complement; train a single logit on its own loss alone"
        )
    return logits, targets


def scalar_loss(name: str, objective: ComplementLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """`objective(logits, targets)`; `name` is what the argument is called.

    Raises:
        TypeError: the result is not a Tensor, or has no graph.
        ValueError: it is not a scalar.
    """
    value = objective(logits, targets)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a scalar Tensor, got {described(value)}")
    if value.ndim != 0:
        raise ValueError(
            f'{name} must return a scalar, got shape {tuple(value.shape)}: take the mean, as with reduction="mean"'
        )
    if not value.requires_grad:
        raise TypeError(
            f"{name} must return a loss to differentiate, got a Tensor that does not require grad: compute it from the "
            "logits without detach(), item() and torch.no_grad()"
        )
    return value


class WindowLoss:
    """The complement loss of a window whose micro-batches come one by one: their mean, weighted by valid targets.

    How many targets a micro-batch has is known after its forward. Each therefore enters a running mean,

        loss <- kept * loss + part,    kept = T / (T + c),    part = c / (T + c) * objective(logits, targets)

    with c its valid targets and T those before. The gradients of those before are to be multiplied with `kept` too.
    Where there are no valid targets, loss and gradients are zero. Nothing waits for the device.

    Args:
        objective: complement loss, a mean over valid targets.
        logits: where a batch's logits and targets are.
    """

    mean: Tensor
    kept: Tensor
    _count: Tensor | int = 0

    def __init__(self, objective: ComplementLoss, logits: LogitsFunction) -> None:
        self._objective, self._logits = objective, logits

    def part(self, batch: Any) -> Tensor:
        """Of the next micro-batch, with its graph; brings `mean` and `kept` up to date.

        Raises:
            TypeError, ValueError: as `checked_logits_and_targets` and `scalar_loss`.
        """
        logits, targets = checked_logits_and_targets(self._logits(batch))
        count = count_valid(targets, logits)
        # A mean over no targets, and perhaps its gradient, is NaN, which a weight of zero would not remove.
        value = scalar_loss("objective", self._objective, logits, targets.masked_fill(count == 0, 0))
        count = count.to(torch.promote_types(value.dtype, torch.float32))
        total = (self._count + count).clamp(min=1)
        part = count / total * value
        self.kept = self._count / total
        self.mean = part.detach() if isinstance(self._count, int) else self.kept * self.mean + part.detach()
        self._count = self._count + count
        return part
