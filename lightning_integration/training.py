"""Complement objective training (COT) inside Lightning's automatic optimization.

Per batch COT takes two steps (Chen et al., "Complement Objective Training", ICLR 2019, arXiv 1903.01182):

1. forward, cross-entropy, backward, step: Lightning's own, untouched;
2. a *fresh* forward on the updated weights, complement entropy, backward, step.

The second step runs inside the `LightningModule.optimizer_step` hook, right after the first, and goes
through the Trainer's `Strategy`. Distributed wrappers, autocast, the gradient scaler and the Trainer's
gradient clipping therefore apply to it exactly as to the first step, while `trainer.global_step`,
`max_steps` and learning rate schedulers count primary steps only. Manual optimization, the obvious
alternative, would lose all of these.

This module imports no Lightning: it works with `lightning.pytorch` and with `pytorch_lightning`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from cot_kernels import complement_entropy

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
else:
    LightningModule = object

__all__ = ["ComplementLoss", "ComplementObjectiveEngine", "ComplementObjectiveMixin", "LogitsFunction"]

ComplementLoss = Callable[[Tensor, Tensor], Tensor]
"""`(logits, targets) -> scalar`, for example `cot_kernels.complement_entropy`."""

LogitsFunction = Callable[[Any], tuple[Tensor, Tensor]]
"""`batch -> (logits, targets)`, run with gradients and in training mode."""

CHECKPOINT_KEY = "complement_optimizer"


class ComplementObjectiveEngine:
    """The second of COT's two steps, for a `LightningModule` in automatic optimization.

    The engine is told what happens during training (`start`, `batch_started`, `backward_finished`) and
    takes the complement step when asked (`step`). `ComplementObjectiveMixin` makes these calls from the
    module's own hooks.

    With `accumulate_grad_batches=n` the complement step covers the same micro-batches as the primary
    step did, in the same order, each loss divided by n as Lightning divides its own (also in a last
    window with fewer than n).

    Args:
        loss: complement loss, `(logits, targets) -> scalar`. Default: `cot_kernels.complement_entropy`, whose
            values are <= 0.
        optimizer: "shared" steps the primary optimizer a second time, so both losses feed the same momenta.
            "separate" steps a second optimizer of the same class over the same parameters, with a state
            of its own; learning rate and all other hyperparameters are copied from the primary before
            each step, so one scheduler drives both.
        weight: factor on the complement loss, > 0.

    Raises:
        TypeError: `loss` is not callable, or `weight` is not a number.
        ValueError: `optimizer` is neither "shared" nor "separate", or `weight` is not positive and finite.
    """

    def __init__(
        self,
        loss: ComplementLoss = complement_entropy,
        *,
        optimizer: Literal["shared", "separate"] = "shared",
        weight: float = 1.0,
    ) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a callable (logits, targets) -> scalar Tensor, got {type(loss).__name__}")
        if optimizer not in ("shared", "separate"):
            raise ValueError(f'optimizer must be "shared" or "separate", got {optimizer!r}')
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"weight must be a number, got {type(weight).__name__}")
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight must be positive and finite, got {weight!r}")
        self.loss = loss
        self.optimizer = optimizer
        self.weight = weight
        self._primary: Optimizer | None = None
        self._separate: Optimizer | None = None
        self._restored: dict[str, Any] | None = None
        self._window: list[Any] = []  # micro-batches whose gradients the coming primary step will use
        self._window_step = 0  # trainer.global_step when the window was filled
        self._batch: Any = None
        self._in_complement_pass = False

    def start(self, module: LightningModule) -> None:
        """Checks that `module` and its Trainer can take a complement step; builds the separate optimizer.

        To be called when the Trainer has set up its optimizers and before the first batch (`on_fit_start`).

        Raises:
            RuntimeError: manual optimization, more or fewer than one optimizer, LBFGS, a strategy that
                handles gradient accumulation itself, or an optimizer that cannot be built a second time.
        """
        if not module.automatic_optimization:
            raise RuntimeError(
                f"{type(module).__name__} uses manual optimization (automatic_optimization=False), which "
                "complement objective training does not support: let configure_optimizers return one "
                "optimizer and leave automatic_optimization at True; the complement step needs no second one"
            )
        optimizers = module.trainer.optimizers
        if len(optimizers) != 1:
            raise RuntimeError(
                f"complement objective training needs exactly one optimizer, configure_optimizers of "
                f"{type(module).__name__} gave {len(optimizers)}"
            )
        if isinstance(optimizers[0], LBFGS):
            raise RuntimeError(
                "complement objective training does not support LBFGS, which evaluates its loss several "
                "times per step; use a first-order optimizer such as SGD or Adam"
            )
        if module.trainer.strategy.handles_gradient_accumulation:
            raise RuntimeError(
                f"complement objective training does not support {type(module.trainer.strategy).__name__}, "
                "which steps the optimizer itself; use for example DDP"
            )
        self._primary = optimizers[0]
        self._separate = _second_optimizer(self._primary) if self.optimizer == "separate" else None
        self._window.clear()
        self._batch = None
        # When a checkpoint was only read for its weights (load_from_checkpoint, trainer.test) the
        # primary optimizer starts afresh, so the complement optimizer's state must not come back either.
        if module.trainer.ckpt_path is None:
            self._restored = None

    def batch_started(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers the micro-batch that is about to be trained on.

        Raises:
            RuntimeError: the primary optimizer stepped on the previous batches and `step` was not called.
        """
        if batch_idx % module.trainer.accumulate_grad_batches == 0:  # Lightning's own rule for a new window
            if self._window and module.trainer.global_step > self._window_step:
                raise RuntimeError(
                    f"the optimizer of {type(module).__name__} stepped without its complement step; an "
                    "overridden optimizer_step must call "
                    "super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)"
                )
            self._window.clear()
        # A training_step may pop the labels out of its batch; the second pass must still find them.
        self._batch = copy.copy(batch) if isinstance(batch, (MutableMapping, MutableSequence)) else batch

    def backward_finished(self, module: LightningModule) -> None:
        """Puts the current micro-batch into the window.

        Batches whose `training_step` returned None have no backward pass and never get here.

        Raises:
            RuntimeError: `batch_started` was not called for this batch.
        """
        if self._in_complement_pass:
            return
        if self._batch is None:
            raise RuntimeError(
                f"a batch of {type(module).__name__} was not recorded for its complement step; an overridden "
                "on_train_batch_start must call super().on_train_batch_start(batch, batch_idx)"
            )
        self._window.append(self._batch)
        self._window_step = module.trainer.global_step
        self._batch = None

    def checked(self, module: LightningModule, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The primary optimizer's closure, with a check that its last backward pass was reported.

        Raises:
            RuntimeError: when the closure runs, if `backward_finished` was not called for this batch.
        """

        def run() -> Any:
            loss = closure()  # None when training_step skipped the batch
            if loss is not None and self._batch is not None:
                raise RuntimeError(
                    f"a backward pass of {type(module).__name__} was not recorded for its complement step; "
                    "an overridden on_after_backward must call super().on_after_backward()"
                )
            return loss

        return run

    def step(self, module: LightningModule, logits: LogitsFunction, epoch: int, batch_idx: int) -> None:
        """Takes the complement step over the window; logs its mean loss, unweighted, as `train_complement`.

        To be called right after the primary optimizer has stepped. Does nothing when every micro-batch of the
        window was skipped.

        Args:
            module: the module in training.
            logits: `batch -> (logits, targets)`.
            epoch: as given to the `optimizer_step` hook.
            batch_idx: as given to the `optimizer_step` hook.

        Raises:
            RuntimeError: `start` was not called.
            ValueError: the loss did not return a scalar.
        """
        if not self._window:
            return
        if self._primary is None or self._primary is not module.trainer.optimizers[0]:
            raise RuntimeError(
                f"complement objective training was not started for {type(module).__name__}; an overridden "
                "on_fit_start must call super().on_fit_start()"
            )
        optimizer = self._primary
        if self._separate is not None:
            optimizer = self._separate
            if self._restored is not None:
                optimizer.load_state_dict(self._restored)
                self._restored = None
            _copy_hyperparameters(self._primary, optimizer)

        window, strategy = self._window, module.trainer.strategy
        values: list[Tensor] = []

        def complement_loss(batch: Any) -> Tensor:
            value = self.loss(*logits(batch))
            if value.ndim != 0:
                raise ValueError(f"the complement loss must return a scalar, got shape {tuple(value.shape)}")
            values.append(value.detach())
            return value * (self.weight / module.trainer.accumulate_grad_batches)

        def closure() -> Tensor:
            module.optimizer_zero_grad(epoch, batch_idx, optimizer)
            with torch.enable_grad(), _replaced_training_step(module, complement_loss):
                for index, batch in enumerate(window):
                    last = index == len(window) - 1
                    # As in the primary pass, gradients cross processes once per step.
                    block_sync = getattr(strategy, "block_backward_sync", contextlib.nullcontext)
                    with contextlib.nullcontext() if last else block_sync():
                        strategy.backward(cast(Tensor, strategy.training_step(batch)), optimizer)
            return torch.stack(values).mean()  # not None, which would tell the scaler to skip the step

        self._in_complement_pass = True
        try:
            strategy.optimizer_step(optimizer, closure)
        finally:
            self._in_complement_pass = False
        value = torch.stack(values).mean()
        module.log("train_complement", value, on_step=True, on_epoch=False, prog_bar=True)
        window.clear()

    def state_dict(self, module: LightningModule) -> dict[str, Any]:
        """The separate optimizer's state; empty when the optimizer is shared."""
        if self._restored is not None:  # no step since it was loaded
            return self._restored
        if self._separate is None:
            return {}
        return dict(module.trainer.strategy.optimizer_state(self._separate))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, when training resumes.

        An empty `state` (a checkpoint from plain training, or with a shared optimizer) means a fresh one.
        """
        # Strategies restore checkpoints before or after the optimizers exist; the first step is after both.
        self._restored = state if state and self.optimizer == "separate" else None


class ComplementObjectiveMixin(LightningModule):
    """Adds the complement step to a `LightningModule`; list it before the module class.

        class Classifier(ComplementObjectiveMixin, pl.LightningModule):
            def complement_logits(self, batch):
                x, y = batch
                return self(x), y

    Nothing else changes: `training_step` computes the cross-entropy, `configure_optimizers` returns one
    optimizer. Per batch the optimizer steps on that loss and then, after a fresh forward, on the
    complement entropy of `complement_logits` (Chen et al., ICLR 2019, arXiv 1903.01182). The mean
    complement loss of each step is logged as `train_complement`.

    `training_step` is not run a second time, so metrics and logs update once. Hooks around the backward
    pass and the optimizer step (`on_before_backward`, `on_after_backward`, `on_before_optimizer_step`,
    `optimizer_zero_grad`, `configure_gradient_clipping`) run for both steps. Overrides of
    `on_fit_start`, `on_train_batch_start`, `on_after_backward`, `optimizer_step`, `on_save_checkpoint`
    and `on_load_checkpoint` must call `super()`.

    With a separate optimizer its state travels in the checkpoint beside the primary's. Checkpoints
    interchange with plain training: either kind loads into the other.
    """

    _complement_engine: ComplementObjectiveEngine | None = None
    _complement_configured = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(ComplementObjectiveMixin)]:
            if "optimizer_step" in vars(base) and not issubclass(base, ComplementObjectiveMixin):
                raise TypeError(
                    f"{cls.__name__} lists {base.__name__} before ComplementObjectiveMixin, which would "
                    "leave the complement step out; write "
                    f"class {cls.__name__}(ComplementObjectiveMixin, {base.__name__})"
                )

    def complement_logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The logits of a batch, with their graph, and its targets: the complement loss's arguments."""
        raise NotImplementedError(
            f"{type(self).__name__} must override complement_logits(batch) -> (logits, targets) "
            "for complement objective training"
        )

    def configure_complement_objective(self) -> ComplementObjectiveEngine | None:
        """Override to choose another loss, optimizer or weight, or return None for plain training.

        Called once, before the first batch.
        """
        return ComplementObjectiveEngine()

    def _engine(self) -> ComplementObjectiveEngine | None:
        if not self._complement_configured:
            self._complement_engine = self.configure_complement_objective()
            self._complement_configured = True
        return self._complement_engine

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if (engine := self._engine()) is not None:
            if type(self).complement_logits is ComplementObjectiveMixin.complement_logits:
                self.complement_logits(None)  # raises, with advice, before any training
            engine.start(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if (engine := self._engine()) is not None:
            engine.batch_started(self, batch, batch_idx)
        return super().on_train_batch_start(batch, batch_idx)

    def on_after_backward(self) -> None:
        super().on_after_backward()
        if (engine := self._engine()) is not None:
            engine.backward_finished(self)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        engine = self._engine()
        if engine is not None and optimizer_closure is not None:
            optimizer_closure = engine.checked(self, optimizer_closure)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if engine is not None:
            engine.step(self, self.complement_logits, epoch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        engine = self._engine()
        # Weights-only checkpoints carry no optimizer state, neither the primary's nor this one's.
        if engine is not None and "optimizer_states" in checkpoint and (state := engine.state_dict(self)):
            checkpoint[CHECKPOINT_KEY] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if (engine := self._engine()) is not None:
            engine.load_state_dict(checkpoint.get(CHECKPOINT_KEY, {}))


@contextlib.contextmanager
def _replaced_training_step(module: LightningModule, function: Callable[[Any], Tensor]) -> Iterator[None]:
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


def _second_optimizer(primary: Optimizer) -> Optimizer:
    """A new optimizer of the primary's class over the same parameter groups, its state empty.

    The groups carry every hyperparameter, so the constructor is only given what it names itself:
    `defaults` may hold entries that it refuses (AdamW's `decoupled_weight_decay`).
    """
    accepted = inspect.signature(type(primary)).parameters
    arguments = {name: value for name, value in primary.defaults.items() if name in accepted}
    groups = [{**group, "params": list(group["params"])} for group in primary.param_groups]
    try:
        return type(primary)(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise RuntimeError(
            f'optimizer="separate" could not build a second {type(primary).__name__} ({error}); use optimizer="shared"'
        ) from error


def _copy_hyperparameters(primary: Optimizer, separate: Optimizer) -> None:
    """Copies what schedulers and callbacks may have changed, and groups added since (gradual unfreezing)."""
    for group in primary.param_groups[len(separate.param_groups) :]:
        separate.add_param_group({**group, "params": list(group["params"])})
    for source, copied in zip(primary.param_groups, separate.param_groups, strict=True):
        copied.update({name: value for name, value in source.items() if name != "params"})
