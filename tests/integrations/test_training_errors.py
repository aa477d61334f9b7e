"""What complement objective training refuses, before training starts, and what the message says."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from integrations.loops import adam
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

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
        ({"freeze_batchnorm_stats": "no"}, TypeError, "freeze_batchnorm_stats must be a bool, got str"),
        ({"freeze_batchnorm_stats": 1}, TypeError, "freeze_batchnorm_stats must be a bool, got int"),
        ({"log_name": 5}, TypeError, "log_name must be a str, or None not to log, got int"),
        ({"log_name": ""}, ValueError, "log_name must not be empty; pass None"),
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

    def fit(
        message: str,
        cls: Any = classifier,
        optimizer: Any = adam,
        prepare: Any = None,
        error: type[Exception] = RuntimeError,
        **knobs: Any,
    ) -> None:
        mixin = request.param == "mixin"
        if "optimizer_function" in knobs:
            knobs["optimizer"] = knobs.pop("optimizer_function")
        module = cls(network(), optimizer, ComplementObjectiveEngine(**knobs) if mixin else None)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        run = trainer(callbacks=[] if mixin else [ComplementObjectiveTraining(**knobs)])
        if prepare is not None:
            prepare(module, run)
        with pytest.raises(error, match=message):
            run.fit(module, loader)
        assert module.calls == 0
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])

    return fit


def test_manual_optimization_is_refused(refused: Any) -> None:
    def manual(module: Any, run: Any) -> None:
        module.automatic_optimization = False

    message = "uses manual optimization .*leave automatic_optimization at True.* in training_step yourself, with cot_k"
    refused(message, prepare=manual)


@pytest.mark.parametrize(
    "returned",
    [
        lambda optimizers: optimizers,
        tuple,
        lambda optimizers: (optimizers, [StepLR(optimizer, 1) for optimizer in optimizers]),
        lambda optimizers: [{"optimizer": optimizer} for optimizer in optimizers],
    ],
)
def test_several_optimizers_are_refused(returned: Any, refused: Any, classifier: Any) -> None:
    """Before Lightning refuses them, for its message advises manual optimization."""
    calls: list[int] = []

    class Several(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            calls.append(1)
            return returned([adam(self.parameters()), adam(self.parameters())])

    refused(r"configure_optimizers of Several gave 2: let it return one over all parameters, in parameter gr", Several)
    assert len(calls) == 1


def test_a_setup_that_leaves_out_super_leaves_the_refusal_to_lightning(
    classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    """The mixin has no earlier hook from which it could see what configure_optimizers returns; the callback has."""

    class Several(classifier):  # type: ignore[misc]
        def setup(self, stage: str) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return [adam(self.parameters()), adam(self.parameters())]

    with pytest.raises(RuntimeError, match="multiple optimizers"):
        trainer().fit(Several(network(), engine=ComplementObjectiveEngine()), loader)


@pytest.mark.parametrize(
    "returned",
    [
        lambda optimizer: [optimizer],
        lambda optimizer: ([optimizer], [StepLR(optimizer, 1)]),
        lambda optimizer: {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1)},
    ],
)
@pytest.mark.parametrize("engine", [None, ComplementObjectiveEngine()])
def test_one_optimizer_in_whatever_form_is_taken(
    engine: Any, returned: Any, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    class One(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return returned(adam(self.parameters()))

    module = One(network(), engine=engine)
    run = trainer(max_epochs=1, callbacks=[] if engine else [ComplementObjectiveTraining()])
    run.fit(module, loader)
    assert "train_complement" in run.callback_metrics
    assert "configure_optimizers" not in vars(module)


def test_no_optimizer_is_refused(refused: Any, classifier: Any) -> None:
    class Without(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return None

    refused("needs exactly one optimizer, configure_optimizers of Without gave 0", Without)


def test_lbfgs_is_refused(refused: Any) -> None:
    refused("does not support LBFGS.*use a first-order optimizer", optimizer=torch.optim.LBFGS)


class AdamOfAnotherPackage(SGD):
    """Such as AdamW8bit: known by its name alone."""


@pytest.mark.parametrize("way", ["mixin", "callback"])
@pytest.mark.parametrize(
    ("optimizer", "knobs", "told"),
    [
        (torch.optim.Adam, {}, True),
        (torch.optim.AdamW, {"weight": 0.01}, True),
        (torch.optim.Adagrad, {"lr_ratio": 2.0}, True),
        (torch.optim.RMSprop, {}, True),
        (AdamOfAnotherPackage, {}, True),
        (SGD, {"optimizer": torch.optim.AdamW}, True),
        (torch.optim.Adam, {"lr_ratio": 0.1}, False),
        (torch.optim.Adam, {"optimizer": "shared"}, False),
        (torch.optim.Adam, {"optimizer": SGD}, False),
        (SGD, {}, False),
        (torch.optim.ASGD, {}, False),
    ],
)
def test_a_separate_optimizer_that_takes_full_steps_draws_a_warning(
    way: str, optimizer: Any, knobs: Any, told: bool, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    mixin = way == "mixin"
    module = classifier(network(), lambda parameters: optimizer(parameters, lr=0.01))
    module.engine = ComplementObjectiveEngine(**knobs) if mixin else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [] if mixin else [ComplementObjectiveTraining(**knobs)]
        trainer(max_epochs=2, callbacks=callbacks).fit(module, loader)
    messages = [str(each.message) for each in caught if "divides by the size of the gradients" in str(each.message)]
    assert len(messages) == told
    if told:
        assert 'Pass optimizer="shared"' in messages[0]
        assert knobs.get("optimizer", optimizer).__name__ in messages[0]


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


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda parameters: None, TypeError, r"must return a torch\.optim\.Optimizer.*got NoneType"),
        (torch.optim.LBFGS, RuntimeError, "does not support LBFGS.*use a first-order optimizer"),
        (
            lambda parameters: SGD([*parameters, torch.nn.Parameter(torch.zeros(2))], lr=1.0),
            ValueError,
            "over the parameters it is called with, got a SGD with 1 that are not among them: pass a function",
        ),
    ],
)
def test_what_a_function_for_the_optimizer_returns(build: Any, error: Any, message: str, refused: Any) -> None:
    refused(message, error=error, optimizer_function=build)


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
            lambda x: x,
            (torch.zeros(2, 5), torch.full((2, 5), 0.2)),
            ValueError,
            r"shape \(2, 5\), that of the logits, are class probabilities .* return these, for example y\.argmax\(1\)",
        ),
        (
            lambda ids: {"logits": ids},
            {"ids": torch.zeros(2, 5), "labels": torch.eye(5)[:2]},
            TypeError,
            r'"labels" must be class indices, an integer Tensor of shape \(2,\) .* soft labels are not supported',
        ),
        (
            lambda ids: {"logits": ids},
            {"ids": torch.zeros(2, 5, 4, 4), "labels": torch.zeros(2, 4, 4).long()},
            ValueError,
            r"\(2, 5, 4, 4\), which ask for \(2, 5, 4\), classes last: pass logits=function.*complement_logits",
        ),
        (
            lambda ids: {"logits": ids},
            {"ids": torch.zeros(2, 3, 5), "labels": torch.zeros(2).long()},
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


def test_a_metric_under_the_name_of_the_loss_is_refused(
    classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    for engine in (None, ComplementObjectiveEngine(log_name="train_loss")):
        cot = [] if engine else [ComplementObjectiveTraining(log_name="train_loss")]
        with pytest.raises(RuntimeError, match=r"logs 'train_loss' itself.*choose another log_name, or None"):
            trainer(callbacks=cot).fit(classifier(network(), engine=engine), loader)


def test_without_a_name_nothing_is_logged(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    run = trainer(max_epochs=1, callbacks=[ComplementObjectiveTraining(log_name=None)])
    run.fit(classifier(network(), adam, None), loader)
    assert set(run.callback_metrics) == {"train_loss"}
