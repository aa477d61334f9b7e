"""Complement objective training as a callback: one line turns a classifier into COT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from cot_kernels import complement_entropy

from .batches import HOW_TO_SAY_WHERE, logits_and_targets
from .lightning_package import Callback, pl
from .loss import ComplementLoss
from .mixin import ComplementObjectiveMixin
from .optimizers import ComplementOptimizer
from .passes import check_configuration, stand_in
from .training import ComplementObjectiveEngine

ModuleLogitsFunction: TypeAlias = Callable[[Any, Any], Any]  # (logits, targets); see ComplementLoss for Any


class ComplementObjectiveTraining(Callback):
    """Trains any classifier in automatic optimization with complement objective training (COT).

        trainer = pl.Trainer(callbacks=[ComplementObjectiveTraining()])  # with SGD; Adam and its kin: see optimizer

    After each of the module's own optimizer steps, which train it on cross-entropy as before, the same batch
    is passed through the updated weights again, and a second step is taken on the complement loss (Chen et
    al., "Complement Objective Training", ICLR 2019, arXiv 1903.01182). `training_step` is not run twice:
    metrics and logs update once, `trainer.global_step`, `max_steps` and schedulers count primary steps. The
    Trainer's precision, clipping, accumulation and strategy apply to both steps. See
    `ComplementObjectiveEngine` for what accumulation means in the second step.

    The complement optimizer's state is saved with the callback's, so that checkpoints interchange with plain
    training: either kind loads into the other.

    Args:
        objective: complement loss, `(logits, targets) -> scalar`, a mean over valid targets: any loss of
            `cot_kernels`, or your own.
        optimizer: "separate" (the primary's class and groups, with a state of its own), "shared" (the primary
            steps a second time), or a function from the parameters to an optimizer. With Adam and its kin take
            "shared": a separate one makes full steps of the small gradients of the complement loss.
        lr_ratio: learning rate of the complement step over that of the primary, whose schedule it follows.
        weight: factor on the complement loss. In nats, `ComplementEntropy(normalization="none", eps=0.0)`,
            docs/evidence.md recommends 0.5 with the shared optimizer; the default is as published.
        every_n_steps: the complement step follows each n-th primary step.
        start_epoch: first epoch with complement steps, counted from 0.
        logits: `(module, batch) -> (logits, targets)`. The default understands pairs `(x, y)`, with `module(x)`
            giving logits (N, K, ...), and Hugging Face mappings with "labels", in which -100 is ignored; for
            causal language models pass `lightning_integration.causal_lm_logits_and_targets`.
        freeze_batchnorm_stats: leave running means and variances of batch normalization as the primary pass
            left them.
        log_name: name of the complement loss in the logs and in `trainer.callback_metrics`, or None not to log it.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError, TypeError, ValueError: when training starts, if the module or its Trainer cannot take a second
            step: manual optimization, several optimizers, LBFGS, `dataloader_iter`, DeepSpeed, FSDP with an optimizer
            of its own; or on the first batch, before any step, if `logits` or `objective` does not return what it
            must. The message names the mend.
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
        logits: ModuleLogitsFunction = logits_and_targets,
        freeze_batchnorm_stats: bool = False,
        log_name: str | None = "train_complement",
    ) -> None:
        super().__init__()
        if not callable(logits):
            raise TypeError(
                f"logits must be a callable (module, batch) -> (logits, targets), got {type(logits).__name__}"
            )
        self.logits = logits
        self.engine = ComplementObjectiveEngine(
            objective,
            optimizer=optimizer,
            lr_ratio=lr_ratio,
            weight=weight,
            every_n_steps=every_n_steps,
            start_epoch=start_epoch,
            freeze_batchnorm_stats=freeze_batchnorm_stats,
            log_name=log_name,
        )
        self._module: pl.LightningModule | None = None

        self._put_back: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # While it trains, the Trainer puts its module's log methods here too.
        of_this_run = {"log", "log_dict"}
        state = {name: value for name, value in vars(self).items() if name not in of_this_run}
        return {**state, "_module": None, "_put_back": None}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_configuration(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, ComplementObjectiveMixin) and pl_module.configure_complement_objective() is not None:
            raise RuntimeError(
                f"{type(pl_module).__name__} takes complement steps by itself (ComplementObjectiveMixin): leave the "
                "ComplementObjectiveTraining callback out, or let configure_complement_objective return None"
            )
        # By name: LightningModule is a class of its own in each of Lightning's two packages.
        has_forward = type(pl_module).forward.__qualname__ != "LightningModule.forward"
        if self.logits is logits_and_targets and not has_forward:
            raise RuntimeError(
                f"{type(pl_module).__name__} has no forward, from which its logits could be had: give it one, or "
                f"{HOW_TO_SAY_WHERE}"
            )
        self.engine.start(pl_module)
        self._module = pl_module
        step = partial(self.engine.optimizer_step, pl_module, partial(self.logits, pl_module), pl_module.optimizer_step)
        self._put_back = stand_in(pl_module, "optimizer_step", step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.engine.batch_started(pl_module, partial(self.logits, pl_module), batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.engine.backward_started()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine.backward_finished(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._put_back is not None and self._module is pl_module:
            self._put_back()
            self._put_back = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        return {} if self._module is None else self.engine.state_dict(self._module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.engine.load_state_dict(state_dict)
