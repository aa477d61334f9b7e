"""The optimizer of the complement step, and its learning rate."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeAlias

from torch.nn import Parameter
from torch.optim import Optimizer

ComplementOptimizer: TypeAlias = Literal["separate", "shared"] | Callable[[Iterable[Parameter]], Optimizer]


def second_optimizer(
    primary: Optimizer, build: Literal["separate"] | Callable[[Iterable[Parameter]], Optimizer] | str
) -> Optimizer:
    """An optimizer over the primary's parameters, its state empty: of the primary's class, or what `build` makes.

    Raises:
        RuntimeError: the primary's class cannot be built a second time.
        TypeError: `build` does not return an Optimizer.
    """
    if callable(build):
        optimizer = build([parameter for group in primary.param_groups for parameter in group["params"]])
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must return a torch.optim.Optimizer when called with the parameters, got "
                f"{type(optimizer).__name__}"
            )
        return optimizer
    # The groups carry every hyperparameter, so the constructor is only given what it names itself: `defaults` may
    # hold entries that it refuses (AdamW's `decoupled_weight_decay`).
    accepted = inspect.signature(type(primary)).parameters
    arguments = {name: value for name, value in primary.defaults.items() if name in accepted}
    groups = [{**group, "params": list(group["params"])} for group in primary.param_groups]
    try:
        return type(primary)(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise RuntimeError(
            f'optimizer="separate" could not build a second {type(primary).__name__} ({error}); use '
            'optimizer="shared", or pass a function from the parameters to an optimizer'
        ) from error


@contextlib.contextmanager
def scaled_learning_rate(primary: Optimizer, optimizer: Optimizer, ratio: float) -> Iterator[None]:
    """For a moment the learning rates of `optimizer` are `ratio` times the primary's."""
    before = [group["lr"] for group in optimizer.param_groups]
    rates = [group["lr"] for group in primary.param_groups]
    if len(rates) != len(before):
        rates = [rates[0]] * len(before)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * ratio
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate


def copy_hyperparameters(primary: Optimizer, separate: Optimizer) -> None:
    """Copies what schedulers and callbacks may have changed, and groups added since (gradual unfreezing)."""
    for group in primary.param_groups[len(separate.param_groups) :]:
        separate.add_param_group({**group, "params": list(group["params"])})
    for source, copied in zip(primary.param_groups, separate.param_groups, strict=True):
        copied.update({name: value for name, value in source.items() if name != "params"})
