"""The optimizer of the complement step, and its learning rate."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeAlias

from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

ComplementOptimizer: TypeAlias = Literal["separate", "shared"] | Callable[[Iterable[Parameter]], Optimizer]

# Of names of classes, other packages' too: "ada" is in Adam and its kin, Adagrad, Adadelta and Adafactor.
SCALE_INVARIANT = ("ada", "rmsprop", "rprop", "lion", "muon")
"""Optimizers whose steps are as long when all gradients are a thousand times smaller."""


def second_optimizer(
    primary: Optimizer,
    build: Literal["separate"] | Callable[[Iterable[Parameter]], Optimizer] | str,
    groups: int | None = None,
) -> Optimizer:
    """An optimizer over the primary's parameters, its state empty: of the primary's class, or what `build` makes.

    Args:
        primary: the optimizer of the first step.
        build: "separate", or a function from the parameters to an optimizer.
        groups: how many of the primary's first groups a separate optimizer takes; None: all.

    Raises:
        RuntimeError: the primary's class cannot be built a second time, or the optimizer is LBFGS.
        TypeError: `build` does not return an Optimizer.
        ValueError: it returns one over other parameters than the primary's, or without learning rates.
    """
    if callable(build):
        parameters = [parameter for group in primary.param_groups for parameter in group["params"]]
        optimizer = build(parameters)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must return a torch.optim.Optimizer when called with the parameters, got "
                f"{type(optimizer).__name__}"
            )
        check_first_order(optimizer)
        known = {id(parameter) for parameter in parameters}
        others = sum(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"])
        if others > 0:
            raise ValueError(
                f"optimizer must return one over the parameters it is called with, got a {type(optimizer).__name__} "
                f"with {others} that are not among them: pass a function such as "
                "lambda parameters: SGD(parameters, lr=0.1)"
            )
        check_learning_rates(optimizer)
        return optimizer
    # The groups carry every hyperparameter, so the constructor is only given what it names itself: `defaults` may
    # hold entries that it refuses (AdamW's `decoupled_weight_decay`).
    accepted = inspect.signature(type(primary)).parameters
    arguments = {name: value for name, value in primary.defaults.items() if name in accepted}
    copied = [{**group, "params": list(group["params"])} for group in primary.param_groups[:groups]]
    try:
        return type(primary)(copied, **arguments)
    except (TypeError, ValueError) as error:
        raise RuntimeError(
            f'optimizer="separate" could not build a second {type(primary).__name__} ({error}); use '
            'optimizer="shared", or pass a function from the parameters to an optimizer'
        ) from error


def warn_of_full_steps(optimizer: Optimizer, lr_ratio: float) -> None:
    """Warns where an optimizer of the complement step's own takes steps as long as those on cross-entropy."""
    name = type(optimizer).__name__
    names = [base.__name__.lower() for base in type(optimizer).__mro__]
    if lr_ratio < 1 or not any(word in each for word in SCALE_INVARIANT for each in names):
        return
    warnings.warn(
        f"the complement step has an optimizer of its own, {name}, which divides by the size of the gradients: the "
        "small gradients of the complement loss make steps as long as those of cross-entropy, whatever the weight, and "
        'can undo these. Pass optimizer="shared", best with the loss in nats: objective=ComplementEntropy('
        'normalization="none", eps=0.0), optimizer="shared", weight=0.5. Or lower lr_ratio, '
        f"which is {lr_ratio:g}: to 0.1, for example",
        stacklevel=2,
    )


def check_first_order(optimizer: Optimizer) -> None:
    """RuntimeError for LBFGS."""
    if isinstance(optimizer, LBFGS):
        raise RuntimeError(
            "complement objective training does not support LBFGS, which evaluates its loss several "
            "times per step; use a first-order optimizer such as SGD or Adam"
        )


def check_learning_rates(optimizer: Optimizer) -> None:
    """ValueError where a parameter group has no learning rate."""
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError(
            f"complement objective training needs a learning rate in each parameter group, {type(optimizer).__name__} "
            'has groups without "lr", to which lr_ratio applies: use an optimizer with a learning rate "lr"'
        )


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


def scale_gradients(optimizer: Optimizer, factor: Tensor) -> None:
    """Multiplies the gradients that there are with a scalar, in place."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.device))


def copy_hyperparameters(primary: Optimizer, separate: Optimizer) -> None:
    """Copies what schedulers and callbacks may have changed, and groups added since (gradual unfreezing)."""
    for group in primary.param_groups[len(separate.param_groups) :]:
        separate.add_param_group({**group, "params": list(group["params"])})
    for source, copied in zip(primary.param_groups, separate.param_groups, strict=True):
        copied.update({name: value for name, value in source.items() if name != "params"})
