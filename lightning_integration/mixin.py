"""Complement objective training as a base class of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .passes import check_configuration
from .training import ComplementObjectiveEngine

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
else:
    LightningModule = object

__all__ = ["ComplementObjectiveMixin"]

CHECKPOINT_KEY = "complement_optimizer"


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
    `optimizer_zero_grad`, `configure_gradient_clipping`) run for both steps. Overrides of `setup`,
    `on_fit_start`, `on_train_batch_start`, `on_before_backward`, `on_after_backward`, `optimizer_step`,
    `on_save_checkpoint` and `on_load_checkpoint` must call `super()`.

    On the first batch `complement_logits` and the loss are run once before any step, so that what cannot work is found
    then; random numbers and buffers are put back.

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

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self._engine() is not None:
            check_configuration(self)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if (engine := self._engine()) is not None:
            if type(self).complement_logits is ComplementObjectiveMixin.complement_logits:
                self.complement_logits(None)  # raises, with advice, before any training
            engine.start(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if (engine := self._engine()) is not None:
            engine.batch_started(self, self.complement_logits, batch, batch_idx)
        return super().on_train_batch_start(batch, batch_idx)

    def on_before_backward(self, loss: Tensor) -> None:
        super().on_before_backward(loss)
        if (engine := self._engine()) is not None:
            engine.backward_started()

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
