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
from collections.abc import Callable, MutableMapping, MutableSequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from cot_kernels import complement_entropy

from .checks import check_count, check_positive
from .loss import ComplementLoss, LogitsFunction, WindowLoss, check_objective
from .optimizers import (
    ComplementOptimizer,
    check_learning_rates,
    copy_hyperparameters,
    scale_gradients,
    scaled_learning_rate,
    second_optimizer,
    warn_of_full_steps,
)
from .passes import check_trainable, kept_buffers, kept_random_state, replaced

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["ComplementObjectiveEngine"]


class ComplementObjectiveEngine:
    """The second of COT's two steps, for a `LightningModule` in automatic optimization.

    The engine is told what happens during training (`start`, `batch_started`, `backward_started`,
    `backward_finished`) and takes both steps when asked (`optimizer_step`). `ComplementObjectiveMixin` makes these
    calls from the module's own hooks, `ComplementObjectiveTraining` from those of a callback.

    With `accumulate_grad_batches=n` the complement step covers the same micro-batches as the primary
    step did, in the same order. Its loss is their mean weighted by valid targets (all that are not -100; class
    probabilities count as their rows), which is the loss of one large batch, in a last window of fewer than n too.
    Without valid targets loss and gradients are zero.

    Args:
        objective: complement loss, `(logits, targets) -> scalar`, a mean over valid targets. Default:
            `cot_kernels.complement_entropy`, whose values are <= 0.
        optimizer: of the complement step. "separate": one of the primary's class over the same parameter groups,
            with a state of its own; before each step learning rates and all other hyperparameters are copied
            from the primary. "shared": the primary steps a second time, so both losses feed the same momenta; take
            this one with Adam and its kin, whose separate steps are of full length however small the loss.
            Or a function from the parameters to an optimizer, which keeps its own hyperparameters but for the
            learning rate.
        lr_ratio: learning rate of the complement step over that of the primary, > 0, whatever the optimizer: it
            follows the primary's schedule. A group that the primary does not have follows the primary's first.
        weight: factor on the complement loss, > 0.
        every_n_steps: the complement step follows each n-th primary step, n >= 1.
        start_epoch: first epoch with complement steps, counted from 0.
        freeze_batchnorm_stats: leave running means and variances of batch normalization as the primary pass
            left them. Otherwise the second pass updates them too.
        log_name: name of the complement loss in the logs, or None not to log it.

    Raises:
        TypeError: an argument is not of the kind described.
        ValueError: `optimizer` is an unknown word, a number is out of range, or `log_name` is empty.
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
        log_name: str | None = "train_complement",
    ) -> None:
        check_objective("objective", objective)
        if optimizer not in ("shared", "separate") and not callable(optimizer):
            raise ValueError(
                'optimizer must be "separate", "shared" or a callable from parameters to an Optimizer, '
                f"got {optimizer!r}"
            )
        check_positive("lr_ratio", lr_ratio)
        check_positive("weight", weight)
        check_count("every_n_steps", every_n_steps, least=1)
        check_count("start_epoch", start_epoch, least=0)
        if not isinstance(freeze_batchnorm_stats, bool):
            raise TypeError(f"freeze_batchnorm_stats must be a bool, got {type(freeze_batchnorm_stats).__name__}")
        if log_name is not None and not isinstance(log_name, str):
            raise TypeError(f"log_name must be a str, or None not to log, got {type(log_name).__name__}")
        if log_name == "":
            raise ValueError("log_name must not be empty; pass None not to log the complement loss")
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
        self._in_backward = False
        self._in_complement_pass = False
        self._rehearsed = False
        self._logged = False

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
            ValueError: it returns one over other parameters, or an optimizer has no learning rate.

        Warns where an optimizer of the complement step's own divides by the size of the gradients (Adam and its kin)
        and steps at the primary's rate.
        """
        check_trainable(module, shared=self.optimizer == "shared")
        self._prepare(module)
        if self._own is not None and module.trainer.is_global_zero:
            warn_of_full_steps(self._own, self.lr_ratio)
        self._window.clear()
        self._batch = None
        self._rehearsed = False
        # When a checkpoint was only read for its weights (load_from_checkpoint, trainer.test) the
        # primary optimizer starts afresh, so the complement optimizer's state must not come back either.
        if module.trainer.ckpt_path is None:
            self._restored = None

    def _prepare(self, module: LightningModule) -> None:
        self._primary = module.trainer.optimizers[0]
        check_learning_rates(self._primary)
        self._own = None if self.optimizer == "shared" else second_optimizer(self._primary, self.optimizer)

    def batch_started(self, module: LightningModule, logits: LogitsFunction, batch: Any, batch_idx: int) -> None:
        """Remembers the micro-batch that is about to be trained on; rehearses the complement loss on the first.

        Raises:
            RuntimeError: the primary optimizer stepped on the previous batches and no complement step followed.
            TypeError, ValueError: `logits` or the objective does not return what it must.
        """
        if batch_idx % module.trainer.accumulate_grad_batches == 0:  # Lightning's own rule for a new window
            if self._window and module.trainer.global_step > self._window_step:
                raise RuntimeError(
                    f"the optimizer of {type(module).__name__} stepped without its complement step; an "
                    "overridden optimizer_step must call "
                    "super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)"
                )
            self._window.clear()
        if not self._rehearsed:
            self._rehearse(module, logits, _copied(batch))
        # A training_step may pop the labels out of its batch; the second pass must still find them.
        self._batch, self._in_backward = _copied(batch), False

    def _rehearse(self, module: LightningModule, logits: LogitsFunction, batch: Any) -> None:
        def loss(batch: Any) -> Tensor:
            with torch.enable_grad():
                return WindowLoss(self.objective, logits).part(batch).detach()

        # Through the strategy, as the real pass; without gradients, for DDP would wait for their backward pass.
        with (
            kept_random_state(module),
            kept_buffers(module.modules()),
            replaced(module, "training_step", loss),
            torch.no_grad(),
        ):
            module.trainer.strategy.training_step(batch)
        self._rehearsed = True

    def backward_started(self) -> None:
        """Tells a loss without a backward pass, as for the statistics of averaged weights, from an unreported one."""
        self._in_backward = not self._in_complement_pass

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
        self._batch, self._in_backward = None, False

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
        before `start_epoch`, between every n-th steps, and where no micro-batch of the window had a backward pass.

        Args:
            module: the module in training.
            logits: `batch -> (logits, targets)`.
            primary_step: the `optimizer_step` of the module without this engine.
            epoch, batch_idx, optimizer, closure: as given to the `optimizer_step` hook.

        Raises:
            RuntimeError: a backward pass was not reported with `backward_finished`, the optimizer evaluates its loss
                more than once a step, or the module logs something else under `log_name`.
            TypeError, ValueError: `logits` or the objective did not return what it must.
        """
        primary_step(epoch, batch_idx, optimizer, None if closure is None else self._checked(module, closure))
        # The hook runs before global_step counts the primary step.
        due = (module.trainer.global_step + 1) % self.every_n_steps == 0 and epoch >= self.start_epoch
        if self._window and due:
            self._complement_step(module, logits, epoch, batch_idx)
        self._window.clear()

    def _checked(self, module: LightningModule, closure: Callable[[], Any]) -> Callable[[], Any]:
        evaluated = False

        def run() -> Any:
            nonlocal evaluated
            if evaluated:
                raise RuntimeError(
                    f"complement objective training does not support {type(self._primary).__name__}, which evaluates "
                    "its loss more than once a step; use a first-order optimizer such as SGD or Adam"
                )
            evaluated = True
            loss = closure()
            if self._in_backward:
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
        self._restore()
        optimizer = self._own or self._primary
        strategy = module.trainer.strategy
        loss = WindowLoss(self.objective, logits)

        def closure() -> Tensor:
            nonlocal loss
            loss = WindowLoss(self.objective, logits)
            module.optimizer_zero_grad(epoch, batch_idx, optimizer)
            for left, batch in zip(reversed(range(len(self._window))), self._window, strict=True):
                # As in the primary pass, gradients cross processes once per step.
                block_sync = getattr(strategy, "block_backward_sync", contextlib.nullcontext)
                with block_sync() if left else contextlib.nullcontext():
                    with replaced(module, "training_step", loss.part):
                        part = cast(Tensor, strategy.training_step(batch))
                    if left < len(self._window) - 1:
                        scale_gradients(optimizer, loss.kept)
                    strategy.backward(part * self.weight, optimizer)
            return loss.mean  # not None, which would tell the scaler to skip the step

        if self.optimizer == "separate":
            copy_hyperparameters(self._primary, optimizer)
        layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        frozen = kept_buffers(layers) if self.freeze_batchnorm_stats else contextlib.nullcontext()
        self._in_complement_pass = True
        try:
            with torch.enable_grad(), frozen, scaled_learning_rate(self._primary, optimizer, self.lr_ratio):
                strategy.optimizer_step(optimizer, closure)
        finally:
            self._in_complement_pass = False
        self._log(module, loss.mean)

    def _restore(self) -> None:
        # Here, not when it was loaded: a callback may put the primary's groups back (BaseFinetuning) after the start.
        if self._own is None or self._restored is None:
            return
        if self.optimizer == "separate":
            assert self._primary is not None
            # The saved optimizer had the groups of its last step; copy_hyperparameters adds what came since.
            self._own = second_optimizer(self._primary, self.optimizer, len(self._restored["param_groups"]))
        self._own.load_state_dict(self._restored)
        self._restored = None

    def _log(self, module: LightningModule, value: Tensor) -> None:
        if self.log_name is None:
            return
        if not self._logged and self.log_name in module.trainer.callback_metrics:
            raise RuntimeError(
                f"{type(module).__name__} logs {self.log_name!r} itself, which is the name of the complement loss: "
                "choose another log_name, or None not to log it"
            )
        self._logged = True
        module.log(self.log_name, value, on_step=True, on_epoch=False, prog_bar=True)

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


def _copied(batch: Any) -> Any:
    return copy.copy(batch) if isinstance(batch, (MutableMapping, MutableSequence)) else batch
