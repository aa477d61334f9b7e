"""What complement objective training refuses, before training starts, and what the message says."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from integrations.loops import adam
from torch.optim import SGD

from lightning_integration import ComplementObjectiveEngine, ComplementObjectiveMixin

# Lightning's advice about loaders, loggers and step counts has no place in a unit test's output.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"objective": 3}, TypeError, "objective must be a callable"),
        ({"optimizer": "both"}, ValueError, "optimizer must be .*got 'both'"),
        ({"weight": "1"}, TypeError, "weight must be a number, got str"),
        ({"weight": 0}, ValueError, "weight must be positive and finite, got 0"),
        ({"weight": float("nan")}, ValueError, "weight must be positive"),
        ({"lr_ratio": -1.0}, ValueError, "lr_ratio must be positive and finite, got -1.0"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be at least 1, got 0"),
        ({"every_n_steps": 1.5}, TypeError, "every_n_steps must be an int, got float"),
        ({"start_epoch": -1}, ValueError, "start_epoch must be at least 0, got -1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ComplementObjectiveEngine(**arguments)


def test_manual_optimization_is_refused(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    module = classifier(network(), engine=ComplementObjectiveEngine())
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="uses manual optimization"):
        trainer().fit(module, loader)
    assert module.calls == 0


def test_several_optimizers_are_refused(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    class Several(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return [adam(self.parameters()), adam(self.parameters())]

    module = Several(network(), engine=ComplementObjectiveEngine())
    with pytest.raises(RuntimeError, match="multiple optimizers"):  # Lightning's own check comes first
        trainer().fit(module, loader)
    assert module.calls == 0


def test_lbfgs_is_refused(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    module = classifier(network(), torch.optim.LBFGS, ComplementObjectiveEngine())
    with pytest.raises(RuntimeError, match="does not support LBFGS"):
        trainer().fit(module, loader)
    assert module.calls == 0


def test_an_optimizer_that_cannot_be_rebuilt_is_refused(
    classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    class Special(SGD):
        def __init__(self, params: Any, schedule: list[float]) -> None:
            super().__init__(params, lr=schedule[0])

    module = classifier(network(), lambda p: Special(p, [0.1]), ComplementObjectiveEngine(optimizer="separate"))
    with pytest.raises(RuntimeError, match=r"could not build a second Special .*schedule"):
        trainer().fit(module, loader)


def test_complement_logits_must_be_overridden(
    pl: ModuleType, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    class Forgetful(classifier):  # type: ignore[misc]
        complement_logits = ComplementObjectiveMixin.complement_logits

    module = Forgetful(network(), engine=ComplementObjectiveEngine())
    with pytest.raises(NotImplementedError, match=r"Forgetful must override complement_logits\(batch\)"):
        trainer().fit(module, loader)
    assert module.calls == 0


def test_the_mixin_comes_first(pl: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"write class Wrong\(ComplementObjectiveMixin, LightningModule\)"):
        type("Wrong", (pl.LightningModule, ComplementObjectiveMixin), {})


@pytest.mark.parametrize(
    ("hook", "override"),
    [
        (
            "optimizer_step",
            lambda self, epoch, batch_idx, optimizer, closure: optimizer.step(closure=closure),
        ),
        ("on_train_batch_start", lambda self, batch, batch_idx: None),
        ("on_after_backward", lambda self: None),
    ],
)
def test_overrides_that_leave_out_super_are_found(
    hook: str, override: Any, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    forgetful = type("Forgetful", (classifier,), {hook: override})
    with pytest.raises(RuntimeError, match=rf"Forgetful.*overridden {hook} must call super\(\)\.{hook}\("):
        trainer().fit(forgetful(network(), engine=ComplementObjectiveEngine()), loader)


def test_a_loss_that_is_not_a_scalar_is_refused(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    engine = ComplementObjectiveEngine(lambda logits, targets: logits.sum(dim=1))
    with pytest.raises(ValueError, match=r"must return a scalar, got shape \(4,\)"):
        trainer().fit(classifier(network(), engine=engine), loader)
