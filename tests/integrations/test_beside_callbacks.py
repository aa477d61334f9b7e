"""The callback beside Lightning's own callbacks, copies of it and of its module, and Lightning's two names."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
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


def in_a_new_process(program: str, folder: Path) -> None:
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
    }
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_callback_may_be_imported_before_lightning(tmp_path: Path) -> None:
    """Its Trainer may be of either of Lightning's packages; CotBert is of the one that was imported, or the first."""
    for package in ("lightning", "pytorch_lightning", "transformers"):
        pytest.importorskip(package)
    program = """
        from lightning_integration import ComplementObjectiveTraining, CotBert
        import pytorch_lightning as pl, torch
        class Headless(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(3, 4)
            def training_step(self, batch, batch_idx):
                return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)
        class Net(Headless):
            def forward(self, x):
                return self.layer(x)
        def fit(module):
            data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randint(4, (8,)))
            cot = ComplementObjectiveTraining()
            trainer = pl.Trainer(
                callbacks=[cot], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False
            )
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
            return trainer
        assert issubclass(ComplementObjectiveTraining, __import__("lightning").pytorch.Callback)
        assert "train_complement" in fit(Net()).callback_metrics
        for module, error, message in (
            (Headless(), RuntimeError, "Headless has no forward"),
            (CotBert.__new__(CotBert), TypeError, "must be a `LightningModule`"),
        ):
            try:
                fit(module)
            except error as raised:
                assert message in str(raised), raised
            else:
                raise AssertionError(message)
    """
    in_a_new_process(program, tmp_path)


def test_under_lightnings_other_name(tmp_path: Path) -> None:
    for package in ("pytorch_lightning", "transformers"):
        pytest.importorskip(package)
    program = """
        import pytorch_lightning as pl, torch
        from lightning_integration import ComplementObjectiveTraining, CotBert
        assert issubclass(CotBert, pl.LightningModule)
        class Net(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(3, 4)
            def forward(self, x):
                return self.layer(x)
            def training_step(self, batch, batch_idx):
                return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)
        data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randint(4, (8,)))
        trainer = pl.Trainer(callbacks=[ComplementObjectiveTraining()], max_epochs=1, accelerator="cpu", logger=False)
        trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=4))
        trainer.save_checkpoint("one.ckpt")
        assert "train_complement" in trainer.callback_metrics
    """
    in_a_new_process(program, tmp_path)
