"""The callback beside Lightning's own callbacks, copies of it and of its module, and Lightning's two names."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.loops import adam, adamw, largest_gap, sgd, two_step_loop
from torch.optim import Optimizer

from lightning_integration import ComplementObjectiveEngine, ComplementObjectiveTraining

# Lightning's advice about loaders, loggers and step counts has no place in a unit test's output.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_stochastic_weight_averaging(
    way: str, pl: ModuleType, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    """Its last epoch runs the loss without a backward pass, for the statistics of batch normalization."""
    averaged: list[Any] = []

    class Watching(classifier):  # type: ignore[misc]
        def on_train_epoch_start(self) -> None:
            averaged[:] = [copy.deepcopy(self.network)]  # Lightning's last step, on left-over gradients, comes after

    averaging = pl.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
    module = Watching(network(), sgd, ComplementObjectiveEngine() if way == "mixin" else None)
    cot = [] if way == "mixin" else [ComplementObjectiveTraining()]
    trainer(callbacks=[averaging, *cot]).fit(module, loader)
    assert module.calls == 3 * len(loader)
    assert len(set(module.complement_values)) == 2 * len(loader)

    expected = network()
    optimizers = [sgd(expected.parameters()) for _ in range(2)]
    before = []  # epochs: the weights before the first are averaged too
    for _ in range(2):
        before.append({name: value.detach().clone() for name, value in expected.named_parameters()})
        two_step_loop(expected, list(loader), *optimizers, epochs=1)
    for name, value in averaged[0].named_parameters():
        torch.testing.assert_close(value.detach(), (before[0][name] + before[1][name]) / 2, rtol=0, atol=1e-8)
    for inputs, _ in loader:
        averaged[0](inputs)
    for name, value in averaged[0].named_buffers():
        torch.testing.assert_close(value, module.network.get_buffer(name), rtol=0, atol=1e-8)


def unfreezing(pl: ModuleType, epoch: int) -> Any:
    class Unfreezing(pl.callbacks.BaseFinetuning):  # type: ignore[name-defined,misc]
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.network[0])

        def finetune_function(self, module: Any, current_epoch: int, optimizer: Optimizer) -> None:
            if current_epoch == epoch:
                self.unfreeze_and_add_param_group(module.network[0], optimizer, lr=0.005)

    return Unfreezing()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("unfrozen", [1, 2, 3])
@pytest.mark.parametrize("every", [1, 18])
def test_resuming_with_gradual_unfreezing(
    order: int,
    unfrozen: int,
    every: int,
    pl: ModuleType,
    classifier: Any,
    network: Any,
    loader: Any,
    trainer: Any,
    tmp_path: Path,
) -> None:
    """Groups added before, at and after the checkpoint, and a second optimizer that may not have seen them."""

    def trained_only(parameters: Any) -> Optimizer:
        return adam([parameter for parameter in parameters if parameter.requires_grad])

    def fit(module: Any, epochs: int, **options: Any) -> Any:
        cot = ComplementObjectiveTraining(every_n_steps=every)
        run = trainer(max_epochs=epochs, callbacks=[cot, unfreezing(pl, unfrozen)][::order])
        run.fit(module, loader, **options)
        return run

    whole, first, resumed = (classifier(network(), trained_only, None) for _ in range(3))
    fit(whole, 4)
    fit(first, 2).save_checkpoint(tmp_path / "two.ckpt")
    fit(resumed, 4, ckpt_path=tmp_path / "two.ckpt")

    # Lightning itself gives the momenta of groups added after the start to others when it resumes plain training, so
    # that the equal of an uninterrupted run is asked for only where there are none to restore.
    assert all(torch.isfinite(value).all() for value in resumed.network.state_dict().values())
    if unfrozen >= 2:
        assert largest_gap(resumed.network, whole.network) == 0.0


def test_a_second_training_under_a_learning_rate_finder(
    pl: ModuleType, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    """It trains before the start, with the optimizers of this training and not with those of the last."""

    def losses(module: Any) -> list[float]:
        finder = pl.callbacks.LearningRateFinder(num_training_steps=20)
        module.lr = 0.01
        module.make_optimizer = lambda parameters: torch.optim.Adam(parameters, lr=module.lr)
        trainer(max_epochs=1, callbacks=[finder]).fit(module, loader)
        return list(finder.optimal_lr.results["loss"])

    used = classifier(network(), adam, ComplementObjectiveEngine())
    trainer(max_epochs=1).fit(used, loader)
    new = classifier(copy.deepcopy(used.network), adam, ComplementObjectiveEngine())
    assert losses(used) == losses(new)


class Noting(ComplementObjectiveTraining):
    def __init__(self, note: str) -> None:
        super().__init__(lr_ratio=0.5)
        self.note = note


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies_keep_what_subclasses_add(
    copied: Callable[[Any], Any], classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    class CopyWhileTraining(classifier):  # type: ignore[misc]
        def on_train_batch_end(self, *arguments: Any) -> None:
            copies.append(copied(callback))

    copies: list[Any] = []
    callback = Noting("mine")
    trainer(callbacks=[callback], max_epochs=1).fit(CopyWhileTraining(network(), adam, None), loader)
    for each in (copied(callback), *copies):
        assert (each.note, each.engine.lr_ratio) == ("mine", 0.5)
        assert (each._module, each._put_back) == (None, None)
        assert not {"log", "log_dict"} & set(vars(each))
        trainer(callbacks=[each], max_epochs=1).fit(classifier(network(), adam, None), loader)


def test_copies_of_the_module_in_training_are_plain(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    class CopyWhileTraining(classifier):  # type: ignore[misc]
        def on_train_batch_end(self, *arguments: Any) -> None:
            if self.trainer.global_step == 2:
                trainer_of_this, self._trainer = self._trainer, None
                copies.append(copy.deepcopy(self))
                self._trainer = trainer_of_this

    copies: list[Any] = []
    module = CopyWhileTraining(network(), adamw, None)
    trainer(callbacks=[ComplementObjectiveTraining()], max_epochs=1).fit(module, loader)
    (copied,) = copies
    assert copied.optimizer_step.__func__ is type(copied).optimizer_step
    assert copied.optimizer_step.__self__ is copied

    plain = copy.deepcopy(copied.network)
    trainer(max_epochs=1).fit(copied, loader)
    optimizer = adamw(plain.parameters())
    for inputs, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        optimizer.step()
    assert largest_gap(copied.network, plain) < 1e-8
