"""What a second pass through a `LightningModule` needs of it and of its Trainer."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .optimizers import check_first_order

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
            "optimizer and leave automatic_optimization at True, for the complement step needs no second one; or take "
            "both steps in training_step yourself, with cot_kernels.complement_entropy"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise RuntimeError(
            f"training_step of {name} takes dataloader_iter, so its batches cannot be kept for the complement "
            "step: let it take (batch, batch_idx)"
        )
    # Without optimizers Lightning puts one in their place that has no parameters.
    optimizers = [optimizer for optimizer in module.trainer.optimizers if optimizer.param_groups]
    check_one_optimizer(module, len(optimizers))
    check_first_order(optimizers[0])
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


def check_one_optimizer(module: LightningModule, count: int) -> None:
    """RuntimeError for more or fewer optimizers than one."""
    if count != 1:
        raise RuntimeError(
            f"complement objective training needs exactly one optimizer, configure_optimizers of "
            f"{type(module).__name__} gave {count}: let it return one over all parameters, in parameter groups where "
            "they differ"
        )


def check_configuration(module: LightningModule) -> None:
    """Lets `configure_optimizers` refuse several optimizers before Lightning does, which advises manual optimization.

    To be called before the Trainer sets its strategy up (the `setup` hooks).
    """
    configure = module.configure_optimizers

    @functools.wraps(configure)
    def checked() -> Any:
        put_back()
        configured: Any = configure()
        optimizers = configured
        if isinstance(configured, (list, tuple)) and len(configured) == 2 and isinstance(configured[0], list):
            optimizers = configured[0]  # ([optimizer, ...], [scheduler, ...])
        if isinstance(optimizers, (list, tuple)) and module.automatic_optimization:
            check_one_optimizer(module, len(optimizers))
        return configured

    put_back = stand_in(module, "configure_optimizers", checked)


class _StandIn(functools.partial[Any]):
    """What stands in for a method; a copy of the method's owner gets the method itself."""

    owner: object
    name: str

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def stand_in(module: LightningModule, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Lets `function` stand in for the method `name` of `module`; returns what puts the method back.

    An attribute on the instance may already shadow the class's method (torch.compile puts one there for
    `training_step`).
    """
    attributes = vars(module)
    own = {name: attributes[name]} if name in attributes else {}
    attributes[name] = _StandIn(function)
    attributes[name].owner, attributes[name].name = module, name

    def put_back() -> None:
        attributes.pop(name, None)
        attributes.update(own)

    return put_back


@contextlib.contextmanager
def replaced(module: LightningModule, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Lets `function` stand in for a method for a moment."""
    put_back = stand_in(module, name, function)
    try:
        yield
    finally:
        put_back()


@contextlib.contextmanager
def kept_buffers(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Puts the buffers of these layers themselves, such as running statistics, back afterwards."""
    kept = [
        (layer, name, buffer, buffer.clone())
        for layer in layers
        for name, buffer in layer.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        yield
    finally:
        for layer, name, buffer, before in kept:
            buffer.copy_(before)
            setattr(layer, name, buffer)


@contextlib.contextmanager
def kept_random_state(module: nn.Module) -> Iterator[None]:
    """Puts the state of all random number generators that a forward may draw from back afterwards."""
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    backends: list[tuple[Any, torch.device]] = [(getattr(torch, device.type, None), device) for device in devices]
    # torch.mps knows one device, and takes no name of it. Generators of the CPU are kept below.
    generators = [
        (backend, () if device.type == "mps" else (device,))
        for backend, device in backends
        if hasattr(backend, "get_rng_state")
    ]
    states = [backend.get_rng_state(*device) for backend, device in generators]
    cpu, python = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")  # whoever draws from it has imported it
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        for (backend, device), state in zip(generators, states, strict=True):
            backend.set_rng_state(state, *device)
        torch.set_rng_state(cpu)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
