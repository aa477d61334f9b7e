"""What complement objective training refuses, before training starts, and what the message says."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from integrations.loops import adam
from torch.optim import SGD

from lightning_integration import (
    ComplementObjectiveEngine,
    ComplementObjectiveMixin,
    ComplementObjectiveTraining,
    logits_and_targets,
)

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
@pytest.mark.parametrize("cls", [ComplementObjectiveEngine, ComplementObjectiveTraining])
def test_bad_arguments(cls: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(**arguments)


def test_bad_logits_function() -> None:
    with pytest.raises(TypeError, match=r"logits must be a callable .*got str"):
        ComplementObjectiveTraining(logits="model.logits")  # type: ignore[arg-type]


@pytest.fixture(params=["mixin", "callback"])
def refused(request: pytest.FixtureRequest, classifier: Any, network: Any, loader: Any, trainer: Any) -> Any:
    """Trains a module with COT in one of the two ways, which must raise before the first step."""

    def fit(message: str, cls: Any = classifier, optimizer: Any = adam, prepare: Any = None, **knobs: Any) -> None:
        mixin = request.param == "mixin"
        module = cls(network(), optimizer, ComplementObjectiveEngine(**knobs) if mixin else None)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        run = trainer(callbacks=[] if mixin else [ComplementObjectiveTraining(**knobs)])
        if prepare is not None:
            prepare(module, run)
        with pytest.raises(RuntimeError, match=message):
            run.fit(module, loader)
        assert module.calls == 0
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])

    return fit


def test_manual_optimization_is_refused(refused: Any) -> None:
    def manual(module: Any, run: Any) -> None:
        module.automatic_optimization = False

    refused("uses manual optimization .*leave automatic_optimization at True", prepare=manual)


def test_several_optimizers_are_refused(refused: Any, classifier: Any) -> None:
    class Several(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return [adam(self.parameters()), adam(self.parameters())]

    refused("multiple optimizers", Several)  # Lightning's own check comes first


def test_no_optimizer_is_refused(refused: Any, classifier: Any) -> None:
    class Without(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return None

    refused("needs exactly one optimizer, configure_optimizers of Without gave 0", Without)


def test_lbfgs_is_refused(refused: Any) -> None:
    refused("does not support LBFGS.*use a first-order optimizer", optimizer=torch.optim.LBFGS)


def test_dataloader_iter_is_refused(refused: Any, classifier: Any) -> None:
    class Iterating(classifier):  # type: ignore[misc]
        def training_step(self, dataloader_iter: Any) -> Any:
            return super().training_step(next(dataloader_iter)[0], 0)

    refused(r"takes dataloader_iter.*let it take \(batch, batch_idx\)", Iterating)


def test_strategies_that_step_by_themselves_are_refused(refused: Any) -> None:
    def deepspeed(module: Any, run: Any) -> None:
        run.strategy.__class__ = type(
            "DeepSpeedStrategy", (type(run.strategy),), {"handles_gradient_accumulation": True}
        )

    refused("does not support DeepSpeedStrategy.*use for example DDP", prepare=deepspeed)


def test_fsdp_needs_the_shared_optimizer(refused: Any) -> None:
    def fsdp(module: Any, run: Any) -> None:
        run.strategy.__class__ = type("FSDPStrategy", (type(run.strategy),), {})

    refused('use optimizer="shared"', prepare=fsdp)


def test_fsdp_takes_the_shared_optimizer(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    run = trainer(callbacks=[ComplementObjectiveTraining(optimizer="shared")], max_epochs=1)
    run.strategy.__class__ = type("FSDPStrategy", (type(run.strategy),), {})
    run.fit(classifier(network()), loader)
    assert "train_complement" in run.callback_metrics


def test_an_optimizer_that_cannot_be_rebuilt_is_refused(refused: Any) -> None:
    class Special(SGD):
        def __init__(self, params: Any, schedule: list[float]) -> None:
            super().__init__(params, lr=schedule[0])

    refused(
        r"could not build a second Special .*schedule.*use optimizer=\"shared\"",
        optimizer=lambda parameters: Special(parameters, [0.1]),
    )


def test_a_function_that_makes_no_optimizer_is_refused(
    classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    cot = ComplementObjectiveTraining(optimizer=lambda parameters: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"optimizer must return a torch\.optim\.Optimizer.*got NoneType"):
        trainer(callbacks=[cot]).fit(classifier(network()), loader)


def test_a_module_without_forward_is_refused(pl: ModuleType, trainer: Any, loader: Any) -> None:
    class Headless(pl.LightningModule):  # type: ignore[name-defined,misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError

        def configure_optimizers(self) -> Any:
            return SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    with pytest.raises(RuntimeError, match=r"Headless has no forward.*pass logits=function"):
        trainer(callbacks=[ComplementObjectiveTraining()]).fit(Headless(), loader)


def test_two_ways_at_once_are_refused(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    module = classifier(network(), adam, ComplementObjectiveEngine())
    with pytest.raises(RuntimeError, match="takes complement steps by itself"):
        trainer(callbacks=[ComplementObjectiveTraining()]).fit(module, loader)
    assert module.calls == 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(2, 6), "y": torch.zeros(2)}, r"got a dict with keys \['x', 'y'\]: pass logits=function"),
        ((torch.zeros(2, 6),) * 3, "got a list of 3: Tensor, Tensor, Tensor"),
        (torch.zeros(2, 6), r"got a Tensor of shape \(2, 6\)"),
    ],
)
def test_batches_without_logits_and_targets_are_refused_before_the_first_step(
    batch: Any, message: str, classifier: Any, network: Any, trainer: Any
) -> None:
    module = classifier(network(), adam, None)
    loader = torch.utils.data.DataLoader([batch if isinstance(batch, (dict, torch.Tensor)) else list(batch)], None)
    with pytest.raises(TypeError, match=message):
        trainer(callbacks=[ComplementObjectiveTraining()]).fit(module, loader)
    assert module.calls == 0


@pytest.mark.parametrize(
    ("module", "batch", "error", "message"),
    [
        (lambda x: None, (1, torch.zeros(2)), TypeError, "calling the module must give logits.*got a NoneType"),
        (lambda x: x[:, 0], (torch.zeros(2, 5), torch.zeros(2)), TypeError, r"got a Tensor of shape \(2,\)"),
        (
            lambda x: x,
            (torch.zeros(2, 5), torch.zeros(2, 1)),
            ValueError,
            r"\(2, 1\) do not fit logits.*ask for \(2,\)",
        ),
        (
            lambda ids: {"logits": ids},
            {"ids": torch.zeros(2, 3, 5), "labels": torch.zeros(2)},
            ValueError,
            r'"labels" of shape \(2,\) do not fit logits of shape \(2, 3, 5\), which ask for \(2, 3\)',
        ),
    ],
)
def test_outputs_without_logits_are_refused(module: Any, batch: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        logits_and_targets(module, batch)


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
