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
import math
from collections.abc import Callable, MutableMapping, MutableSequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from cot_kernels import complement_entropy

from .batches import target_shares
from .optimizers import ComplementOptimizer, copy_hyperparameters, scaled_learning_rate, second_optimizer
from .passes import check_trainable, kept_batchnorm_stats, replaced_training_step

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
else:
    LightningModule = object

__all__ = ["ComplementLoss", "ComplementObjectiveEngine", "ComplementObjectiveMixin", "LogitsFunction"]

# Any, not Tensor: jsonargparse takes what returns a class for a factory of its instances.
ComplementLoss = Callable[[Tensor, Tensor], Any]
"""`(logits, targets) -> scalar`, for example `cot_kernels.complement_entropy`."""

LogitsFunction = Callable[[Any], tuple[Tensor, Tensor]]
"""`batch -> (logits, targets)`, run with gradients and in training mode."""

CHECKPOINT_KEY = "complement_optimizer"


class ComplementObjectiveEngine:
    """The second of COT's two steps, for a `LightningModule` in automatic optimization.

    The engine is told what happens during training (`start`, `batch_started`, `backward_finished`) and
    takes both steps when asked (`optimizer_step`). `ComplementObjectiveMixin` makes these calls from the
    module's own hooks, `ComplementObjectiveTraining` from those of a callback.

    With `accumulate_grad_batches=n` the complement step covers the same micro-batches as the primary
    step did, in the same order. Its loss is their mean weighted by valid targets (all that are not -100),
    which is the loss of one large batch, in a last window of fewer than n too; where the targets cannot be
    found in the batches, all weigh the same.

    Args:
        objective: complement loss, `(logits, targets) -> scalar`, a mean over valid targets. Default:
            `cot_kernels.complement_entropy`, whose values are <= 0.
        optimizer: of the complement step. "separate": one of the primary's class over the same parameter groups,
            with a state of its own; before each step learning rates and all other hyperparameters are copied
            from the primary. "shared": the primary steps a second time, so both losses feed the same momenta.
            Or a function from the parameters to an optimizer, which keeps its own hyperparameters but for the
            learning rate.
        lr_ratio: learning rate of the complement step over that of the primary, > 0, whatever the optimizer: it
            follows the primary's schedule. A group that the primary does not have follows the primary's first.
        weight: factor on the complement loss, > 0.
        every_n_steps: the complement step follows each n-th primary step, n >= 1.
        start_epoch: first epoch with complement steps, counted from 0.
        freeze_batchnorm_stats: leave running means and variances of batch normalization as the primary pass
            left them. Otherwise the second pass updates them too.
        log_name: name of the complement loss in the logs.

    Raises:
        TypeError: an argument is not of the kind described.
        ValueError: `optimizer` is an unknown word, or a number is out of range.
    """

    def __init__(
        self,
        objective: ComplementLoss = complement_entropy,
        *,
        optimizer: ComplementOptimizer = "separate",
        lr_ratio: float = 1.0,
        weight: float = 1.0,
        every_n_steps: int = 1,
        start_epoch: int = 0,
        freeze_batchnorm_stats: bool = False,
        log_name: str = "train_complement",
    ) -> None:
        if not callable(objective):
            raise TypeError(
                f"objective must be a callable (logits, targets) -> scalar Tensor, got {type(objective).__name__}"
            )
        if optimizer not in ("shared", "separate") and not callable(optimizer):
            raise ValueError(
                'optimizer must be "separate", "shared" or a callable from parameters to an Optimizer, '
                f"got {optimizer!r}"
            )
        check_positive("lr_ratio", lr_ratio)
        check_positive("weight", weight)
        _check_count("every_n_steps", every_n_steps, least=1)
        _check_count("start_epoch", start_epoch, least=0)
        self.objective = objective
        self.optimizer = optimizer
        self.lr_ratio = lr_ratio
        self.weight = weight
        self.every_n_steps = every_n_steps
        self.start_epoch = start_epoch
        self.freeze_batchnorm_stats = freeze_batchnorm_stats
        self.log_name = log_name
        self._forget()

    def _forget(self) -> None:
        self._primary: Optimizer | None = None
        self._own: Optimizer | None = None  # the complement step's, unless it is shared
        self._restored: dict[str, Any] | None = None
        self._window: list[Any] = []  # micro-batches whose gradients the coming primary step will use
        self._window_step = 0  # trainer.global_step when the window was filled
        self._batch: Any = None
        self._in_complement_pass = False

    def __getstate__(self) -> dict[str, Any]:
        # Copies, for spawned processes too, get the settings: optimizers and batches belong to one run.
        fresh = object.__new__(type(self))
        fresh._forget()
        return {**vars(self), **vars(fresh)}

    def start(self, module: LightningModule) -> None:
        """Checks that `module` and its Trainer can take a complement step; builds the complement optimizer.

        To be called when the Trainer has set up its optimizers and before the first batch (`on_fit_start`).

        Raises:
            RuntimeError: manual optimization, a `training_step` that takes the data loader's iterator, more or
                fewer than one optimizer, LBFGS, a strategy that cannot take the step, or an optimizer that
                cannot be built a second time.
            TypeError: the function given as `optimizer` does not return an Optimizer.
        """
        check_trainable(module, shared=self.optimizer == "shared")
        self._prepare(module)
        self._window.clear()
        self._batch = None
        # When a checkpoint was only read for its weights (load_from_checkpoint, trainer.test) the
        # primary optimizer starts afresh, so the complement optimizer's state must not come back either.
        if module.trainer.ckpt_path is None:
            self._restored = None

    def _prepare(self, module: LightningModule) -> None:
        self._primary = module.trainer.optimizers[0]
        self._own = None if self.optimizer == "shared" else second_optimizer(self._primary, self.optimizer)

    def batch_started(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers the micro-batch that is about to be trained on.

        Raises:
            RuntimeError: the primary optimizer stepped on the previous batches and no complement step followed.
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

    def optimizer_step(
        self,
        module: LightningModule,
        logits: LogitsFunction,
        primary_step: Callable[..., None],
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        closure: Callable[[], Any] | None,
    ) -> None:
        """Both steps: `primary_step(epoch, batch_idx, optimizer, closure)`, then the complement's over the window.

        The mean complement loss, without its weight, is logged under `log_name`. There is no complement step
        before `start_epoch`, between every n-th steps, and where every micro-batch of the window was skipped.

        Args:
            module: the module in training.
            logits: `batch -> (logits, targets)`.
            primary_step: the `optimizer_step` of the module without this engine.
            epoch, batch_idx, optimizer, closure: as given to the `optimizer_step` hook.

        Raises:
            RuntimeError: a backward pass was not reported with `backward_finished`.
            ValueError: the objective did not return a scalar.
        """
        primary_step(epoch, batch_idx, optimizer, None if closure is None else self._checked(module, closure))
        # The hook runs before global_step counts the primary step.
        due = (module.trainer.global_step + 1) % self.every_n_steps == 0 and epoch >= self.start_epoch
        if self._window and due:
            self._complement_step(module, logits, epoch, batch_idx)
        self._window.clear()

    def _checked(self, module: LightningModule, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            loss = closure()  # None when training_step skipped the batch
            if loss is not None and self._batch is not None:
                raise RuntimeError(
                    f"a backward pass of {type(module).__name__} was not recorded for its complement step; "
                    "an overridden on_after_backward must call super().on_after_backward()"
                )
            return loss

        return run

    def _complement_step(self, module: LightningModule, logits: LogitsFunction, epoch: int, batch_idx: int) -> None:
        if self._primary is not module.trainer.optimizers[0]:  # the learning rate finder trains before the start
            self._prepare(module)
        assert self._primary is not None
        optimizer = self._own or self._primary
        if self._own is not None and self._restored is not None:
            self._own.load_state_dict(self._restored)
            self._restored = None
        strategy = module.trainer.strategy
        values: list[Tensor] = []

        def complement_loss(share: Tensor | float, batch: Any) -> Tensor:
            value = self.objective(*logits(batch))
            if value.ndim != 0:
                raise ValueError(f"the objective must return a scalar, got shape {tuple(value.shape)}")
            # The mean over no targets is NaN; its share is 0 and must stay out of the sum.
            part = value * share if isinstance(share, float) else torch.where(share > 0, value * share, 0)
            values.append(part.detach())
            return part * self.weight

        def closure() -> Tensor:
            module.optimizer_zero_grad(epoch, batch_idx, optimizer)
            for left, batch, share in zip(
                reversed(range(len(self._window))), self._window, target_shares(self._window), strict=True
            ):
                # As in the primary pass, gradients cross processes once per step.
                block_sync = getattr(strategy, "block_backward_sync", contextlib.nullcontext)
                with (
                    block_sync() if left else contextlib.nullcontext(),
                    replaced_training_step(module, partial(complement_loss, share)),
                ):
                    strategy.backward(cast(Tensor, strategy.training_step(batch)), optimizer)
            return torch.stack(values).sum()  # not None, which would tell the scaler to skip the step

        if self.optimizer == "separate":
            copy_hyperparameters(self._primary, optimizer)
        frozen = kept_batchnorm_stats(module) if self.freeze_batchnorm_stats else contextlib.nullcontext()
        self._in_complement_pass = True
        try:
            with torch.enable_grad(), frozen, scaled_learning_rate(self._primary, optimizer, self.lr_ratio):
                strategy.optimizer_step(optimizer, closure)
        finally:
            self._in_complement_pass = False
        module.log(self.log_name, torch.stack(values).sum(), on_step=True, on_epoch=False, prog_bar=True)

    def state_dict(self, module: LightningModule) -> dict[str, Any]:
        """The complement optimizer's state; empty when the optimizer is shared."""
        if self._restored is not None:  # no step since it was loaded
            return self._restored
        if self._own is None:
            return {}
        return dict(module.trainer.strategy.optimizer_state(self._own))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, when training resumes.

        An empty `state` (a checkpoint from plain training, or with a shared optimizer) means a fresh one.
        """
        # Strategies restore checkpoints before or after the optimizers exist; the first step is after both.
        self._restored = state if state and self.optimizer != "shared" else None


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
        if (engine := self._engine()) is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        engine.optimizer_step(
            self, self.complement_logits, super().optimizer_step, epoch, batch_idx, optimizer, optimizer_closure
        )

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


def check_positive(name: str, value: float) -> None:
    """TypeError or ValueError, naming the argument, for all but a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _check_count(name: str, value: int, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
