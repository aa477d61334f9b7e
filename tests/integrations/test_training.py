"""The two-step engine against a plain PyTorch loop, in float64: a gap is a mistake, not rounding."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.loops import (
    OptimizerFactory,
    adam,
    adamw,
    by_norm,
    by_value,
    largest_gap,
    one_cycle,
    published_complement_entropy,
    sgd,
    two_step_loop,
)
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_integration import ComplementObjectiveEngine, ComplementObjectiveMixin, ComplementObjectiveTraining

# Lightning's advice about loaders, loggers and step counts has no place in a unit test's output.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@dataclass(frozen=True)
class Setting:
    """Of the plain loop, and what says the same to Lightning."""

    optimizer: OptimizerFactory = adam
    accumulate: int = 1
    clip: Callable[[Iterable[Tensor]], Any] = lambda parameters: None
    schedule: bool = False
    knobs: dict[str, Any] = field(default_factory=dict)
    due: Callable[[int, int], bool] = lambda epoch, step: True

    @property
    def trainer(self) -> dict[str, Any]:
        options: dict[str, Any] = {"accumulate_grad_batches": self.accumulate}
        if self.clip is by_norm:
            options["gradient_clip_val"] = 0.05
        if self.clip is by_value:
            options |= {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
        return options


SETTINGS = {
    "adam": Setting(),
    "adamw": Setting(adamw),
    "sgd": Setting(sgd),
    "clipping": Setting(sgd, clip=by_norm),
    "clipping by value": Setting(sgd, clip=by_value),
    "accumulation": Setting(accumulate=4),  # windows of four and, at the end of the epoch, two batches
    "schedule": Setting(sgd, schedule=True),
    "weight": Setting(sgd, knobs={"weight": 3.0}),
    "lr_ratio": Setting(adam, knobs={"lr_ratio": 0.3}),  # no scheduler sets the primary's rate anew
    "every_n_steps": Setting(adam, knobs={"every_n_steps": 4}, due=lambda epoch, step: step % 4 == 0),
    "start_epoch": Setting(adam, knobs={"start_epoch": 1}, due=lambda epoch, step: epoch >= 1),
    "everything": Setting(
        adamw, 4, by_norm, True, {"weight": 3.0, "lr_ratio": 2.0, "every_n_steps": 3}, lambda epoch, step: step % 3 == 0
    ),
}


@pytest.mark.parametrize("way", ["mixin", "callback"])
@pytest.mark.parametrize("mode", ["shared", "separate"])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_a_plain_pytorch_loop(
    name: str, mode: Any, way: str, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    setting = SETTINGS[name]
    expected = network()
    optimizer = setting.optimizer(expected.parameters())
    expected_values = two_step_loop(
        expected,
        list(loader),
        optimizer,
        optimizer if mode == "shared" else setting.optimizer(expected.parameters()),
        accumulate=setting.accumulate,
        clip=setting.clip,
        weight=setting.knobs.get("weight", 1.0),
        lr_ratio=setting.knobs.get("lr_ratio", 1.0),
        due=setting.due,
        scheduler=one_cycle(optimizer) if setting.schedule else None,
    )

    schedule = {"interval": "step"}
    knobs = {"optimizer": mode, **setting.knobs}
    module = classifier(
        network(),
        setting.optimizer,
        ComplementObjectiveEngine(**knobs) if way == "mixin" else None,
        (lambda o: {"scheduler": one_cycle(o), **schedule}) if setting.schedule else None,
    )
    fit = trainer(callbacks=[] if way == "mixin" else [ComplementObjectiveTraining(**knobs)], **setting.trainer)
    fit.fit(module, loader)

    assert largest_gap(module.network, expected) < 1e-8
    assert fit.callback_metrics["train_complement"].item() == pytest.approx(expected_values[-1], abs=1e-6)
    assert fit.global_step == 2 * -(-len(loader) // setting.accumulate)
    assert module.calls == 2 * len(loader)  # training_step: once a batch


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_works_under_both_names_of_lightning(package: str, network: Any, loader: Any) -> None:
    lightning = pytest.importorskip(package)

    class Minimal(ComplementObjectiveMixin, lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def complement_logits(self, batch: Any) -> tuple[Tensor, Tensor]:
            return self.network(batch[0]), batch[1]

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(*self.complement_logits(batch))

        def configure_optimizers(self) -> Optimizer:
            return adam(self.parameters())

    module = Minimal()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(accelerator="cpu", max_epochs=2, enable_model_summary=False, **quiet).fit(module, loader)

    expected = network()
    two_step_loop(expected, list(loader), adam(expected.parameters()), adam(expected.parameters()))
    assert largest_gap(module.network, expected) < 1e-8


def test_training_module_imports_no_lightning() -> None:
    program = """
        import sys
        import lightning_integration.training
        assert not {"lightning", "pytorch_lightning", "transformers"} & set(sys.modules), sorted(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_without_engine_training_is_plain_lightning(
    pl: ModuleType, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    class Plain(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return adamw(self.parameters())

    plain, off = Plain(), classifier(network(), adamw, None)
    for module in (plain, off):
        fit = trainer(accumulate_grad_batches=4, gradient_clip_val=0.5)
        fit.fit(module, loader)
        assert "train_complement" not in fit.callback_metrics
    assert largest_gap(off.network, plain.network) == 0.0


def test_train_complement_is_on_the_progress_bar(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    fit = trainer(max_epochs=1)
    fit.fit(classifier(network(), engine=ComplementObjectiveEngine()), loader)
    assert -1 < fit.progress_bar_metrics["train_complement"] < 0
    assert "train_complement" in fit.callback_metrics


def test_max_steps_counts_primary_steps(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    module = classifier(network(), engine=ComplementObjectiveEngine(optimizer="separate"))
    fit = trainer(max_epochs=-1, max_steps=7)
    fit.fit(module, loader)
    assert (fit.global_step, module.calls, len(module.complement_values)) == (7, 7, 7)


def test_plateau_scheduler_is_stepped(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    seen: list[float] = []

    class Recorder(ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: int | None = None) -> None:
            seen.append(float(metrics))

    def schedule(optimizer: Optimizer) -> dict[str, Any]:
        return {"scheduler": Recorder(optimizer), "interval": "step", "frequency": 2, "monitor": "train_loss"}

    trainer().fit(classifier(network(), adam, ComplementObjectiveEngine(), schedule), loader)
    assert len(seen) == 6  # every second of six batches, two epochs
    assert len(set(seen)) == 6


def test_batches_that_training_step_skips_get_no_complement_step(
    classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    class Skipping(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skipping(network(), sgd, ComplementObjectiveEngine(optimizer="shared"))
    trainer(max_epochs=1, accumulate_grad_batches=3).fit(module, loader)

    expected = network()
    optimizer = sgd(expected.parameters())
    batches = list(loader)
    for window in ([batches[0], batches[2]], batches[3:]):
        for loss in (F.cross_entropy, published_complement_entropy):
            optimizer.zero_grad()
            for inputs, targets in window:
                scale = 1 / 3 if loss is F.cross_entropy else len(targets) / sum(len(g) for _, g in window)
                (loss(expected(inputs), targets) * scale).backward()
            optimizer.step()
    assert largest_gap(module.network, expected) < 1e-8


def test_training_step_may_take_its_batch_apart(
    classifier: Any, network: Any, rows: tuple[Tensor, Tensor], trainer: Any
) -> None:
    class Popping(classifier):  # type: ignore[misc]
        def complement_logits(self, batch: Any) -> tuple[Tensor, Tensor]:
            return self.network(batch["inputs"]), batch["labels"]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            labels = batch.pop("labels")
            return F.cross_entropy(self.network(batch.pop("inputs")), labels)

    batches = [{"inputs": rows[0], "labels": rows[1]}]
    module = Popping(network(), adam, ComplementObjectiveEngine())
    trainer(max_epochs=1).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert len(module.complement_values) == 1


def test_parameter_groups_added_while_training(
    pl: ModuleType, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    class Unfreeze(pl.Callback):  # type: ignore[name-defined,misc]
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": module.network[0].parameters(), "lr": 0.002})

    def head_only(parameters: Iterable[Any]) -> Optimizer:
        return adam(list(parameters)[1:])

    module = classifier(network(), head_only, ComplementObjectiveEngine(optimizer="separate"))
    trainer(callbacks=[Unfreeze()]).fit(module, loader)

    expected = network()
    optimizers = [head_only(expected.parameters()) for _ in range(2)]
    two_step_loop(expected, list(loader), *optimizers, epochs=1)
    for optimizer in optimizers:
        optimizer.add_param_group({"params": expected[0].parameters(), "lr": 0.002})
    # The first layer's gradients of the last step are still there: zero_grad only clears what it steps.
    expected[0].zero_grad()
    two_step_loop(expected, list(loader), *optimizers, epochs=1)
    assert largest_gap(module.network, expected) < 1e-8
