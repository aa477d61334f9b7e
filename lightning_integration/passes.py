"""What a second pass through a `LightningModule` needs of it and of its Trainer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import LBFGS

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def check_trainable(module: LightningModule, *, shared: bool) -> None:
    """Whether `module` under its Trainer can take a complement step, with a shared optimizer or its own.

    Raises:
        RuntimeError: it cannot; the message names the mend.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise RuntimeError(
            f"{name} uses manual optimization (automatic_optimization=False), which "
            "complement objective training does not support: let configure_optimizers return one "
            "optimizer and leave automatic_optimization at True; the complement step needs no second one"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise RuntimeError(
            f"training_step of {name} takes dataloader_iter, so its batches cannot be kept for the complement "
            "step: let it take (batch, batch_idx)"
        )
    # Without optimizers Lightning puts one in their place that has no parameters.
    optimizers = [optimizer for optimizer in module.trainer.optimizers if optimizer.param_groups]
    if len(optimizers) != 1:
        raise RuntimeError(
            f"complement objective training needs exactly one optimizer, configure_optimizers of {name} gave "
            f"{len(optimizers)}: let it return one over all parameters, in groups where they differ"
        )
    if isinstance(optimizers[0], LBFGS):
        raise RuntimeError(
            "complement objective training does not support LBFGS, which evaluates its loss several "
            "times per step; use a first-order optimizer such as SGD or Adam"
        )
    strategy = module.trainer.strategy
    if strategy.handles_gradient_accumulation:
        raise RuntimeError(
            f"complement objective training does not support {type(strategy).__name__}, "
            "which steps the optimizer itself; use for example DDP"
        )
    if not shared and any(base.__name__ == "FSDPStrategy" for base in type(strategy).__mro__):
        raise RuntimeError(
            f"{type(strategy).__name__} saves and restores the optimizers it made itself, and no second one: use "
            'optimizer="shared"'
        )


@contextlib.contextmanager
def replaced_training_step(module: LightningModule, function: Callable[[Any], Tensor]) -> Iterator[None]:
    """Lets `strategy.training_step` run `function` for a moment.

    That method is the public way through the strategy's wrappers (DDP's forward, autocast), and it
    always calls `module.training_step`. An attribute on the instance may already shadow the class's
    method (torch.compile puts one there), hence the restore.
    """
    attributes = vars(module)
    had_own, own = "training_step" in attributes, attributes.get("training_step")
    attributes["training_step"] = function
    try:
        yield
    finally:
        if had_own:
            attributes["training_step"] = own
        else:
            del attributes["training_step"]


@contextlib.contextmanager
def kept_batchnorm_stats(module: torch.nn.Module) -> Iterator[None]:
    """Puts the running statistics of batch normalization back afterwards."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)
