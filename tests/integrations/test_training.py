"""The two-step engine against a plain PyTorch loop, in float64: a gap is a mistake, not rounding."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from lightning_integration import ComplementObjectiveEngine, ComplementObjectiveMixin

# Lightning's advice about loaders, loggers and step counts has no place in a unit test's output.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Batches = list[tuple[Tensor, Tensor]]


def published_complement_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Complement entropy in the operations of its paper, for float64."""
    probabilities = logits.softmax(dim=1)
    target_probability = probabilities.gather(1, targets[:, None])
    others = probabilities / (1 - target_probability + 1e-7)
    terms = (others * others.log()).scatter(1, targets[:, None], 0.0)
    return terms.sum() / logits.numel()


def two_step_loop(
    network: nn.Module,
    batches: Batches,
    optimizer: Optimizer,
    complement_optimizer: Optimizer,
    *,
    epochs: int = 2,
    accumulate: int = 1,
    clip: float | None = None,
    weight: float = 1.0,
    scheduler: Any = None,
) -> list[float]:
    """Complement objective training without Lightning; returns the complement loss of each step."""
    values = []

    def step(stepper: Optimizer, window: Batches, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        stepper.zero_grad()
        total = 0.0
        for inputs, targets in window:
            value = loss(network(inputs), targets)
            (value / accumulate).backward()
            total += value.item() / len(window)
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        stepper.step()
        return total

    network.train()
    for _ in range(epochs):
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            step(optimizer, window, F.cross_entropy)
            for source, other in zip(optimizer.param_groups, complement_optimizer.param_groups, strict=True):
                other.update({name: value for name, value in source.items() if name != "params"})
            values.append(
                step(complement_optimizer, window, lambda z, g: weight * published_complement_entropy(z, g)) / weight
            )
            if scheduler is not None:
                scheduler.step()
    return values


def adam(parameters: Iterable[Any]) -> Optimizer:
    return Adam(parameters, lr=0.01)


def adamw(parameters: Iterable[Any]) -> Optimizer:
    return AdamW(parameters, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99))


def sgd(parameters: Iterable[Any]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


@pytest.fixture
def classifier(pl: ModuleType) -> Callable[..., Any]:
    """Builds a LightningModule with the mixin around a network."""

    class Classifier(ComplementObjectiveMixin, pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(
            self,
            network: nn.Module,
            optimizer: OptimizerFactory = adam,
            engine: ComplementObjectiveEngine | None = None,
            scheduler: Callable[[Optimizer], dict[str, Any]] | None = None,
        ) -> None:
            super().__init__()
            self.network, self.engine = network, engine
            self.make_optimizer, self.make_scheduler = optimizer, scheduler
            self.complement_values: list[float] = []
            self.calls = 0

        def configure_complement_objective(self) -> ComplementObjectiveEngine | None:
            return self.engine

        def complement_logits(self, batch: Any) -> tuple[Tensor, Tensor]:
            return self.network(batch[0]), batch[1]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            loss = F.cross_entropy(self.network(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            metrics = self.trainer.callback_metrics
            if "train_complement" in metrics:
                self.complement_values.append(metrics["train_complement"].item())

        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(self.network.parameters())
            if self.make_scheduler is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    return Classifier


def largest_gap(a: nn.Module, b: nn.Module) -> float:
    """Over parameters and buffers (BatchNorm's statistics see both passes)."""
    state = b.state_dict()
    return max((value.double() - state[name].double()).abs().max().item() for name, value in a.state_dict().items())


def one_cycle(optimizer: Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=20)  # moves momentum and betas too


@dataclass(frozen=True)
class Setting:
    optimizer: OptimizerFactory = adam
    accumulate: int = 1
    clip: float | None = None
    weight: float = 1.0
    schedule: bool = False


SETTINGS = {
    "adam": Setting(),
    "adamw": Setting(adamw),
    "sgd": Setting(sgd),
    "clipping": Setting(sgd, clip=0.05),
    "accumulation": Setting(accumulate=4),  # windows of four and, at the end of the epoch, two batches
    "weight": Setting(sgd, weight=3.0),
    "schedule": Setting(sgd, schedule=True),
    "everything": Setting(adamw, accumulate=4, clip=0.05, weight=3.0, schedule=True),
}


@pytest.mark.parametrize("mode", ["shared", "separate"])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_a_plain_pytorch_loop(
    name: str, mode: Any, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    setting = SETTINGS[name]
    expected = network()
    optimizer = setting.optimizer(expected.parameters())
    complement_optimizer = optimizer if mode == "shared" else setting.optimizer(expected.parameters())
    expected_values = two_step_loop(
        expected,
        list(loader),
        optimizer,
        complement_optimizer,
        accumulate=setting.accumulate,
        clip=setting.clip,
        weight=setting.weight,
        scheduler=one_cycle(optimizer) if setting.schedule else None,
    )

    schedule = {"interval": "step"}
    module = classifier(
        network(),
        setting.optimizer,
        ComplementObjectiveEngine(optimizer=mode, weight=setting.weight),
        (lambda o: {"scheduler": one_cycle(o), **schedule}) if setting.schedule else None,
    )
    fit = trainer(accumulate_grad_batches=setting.accumulate, gradient_clip_val=setting.clip)
    fit.fit(module, loader)

    assert largest_gap(module.network, expected) < 1e-8
    assert module.complement_values[-1] == pytest.approx(expected_values[-1], abs=1e-6)
    assert fit.global_step == len(expected_values)
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
    optimizer = adam(expected.parameters())
    two_step_loop(expected, list(loader), optimizer, optimizer)
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

    module = Skipping(network(), sgd, ComplementObjectiveEngine())
    trainer(max_epochs=1, accumulate_grad_batches=3).fit(module, loader)

    expected = network()
    optimizer = sgd(expected.parameters())
    batches = list(loader)
    for window in ([batches[0], batches[2]], batches[3:]):
        for loss in (F.cross_entropy, published_complement_entropy):
            optimizer.zero_grad()
            for inputs, targets in window:
                (loss(expected(inputs), targets) / 3).backward()
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


# --------------------------------------------------------------------------------------- checkpoints


def checkpoint_after(epochs: int, module: Any, loader: Any, trainer: Any, path: Path) -> str:
    fit = trainer(max_epochs=epochs)
    fit.fit(module, loader)
    fit.save_checkpoint(path)
    return str(path)


@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_resumed_training_equals_uninterrupted(
    mode: Any, classifier: Any, network: Any, loader: Any, trainer: Any, tmp_path: Path
) -> None:
    whole = classifier(network(), adamw, ComplementObjectiveEngine(optimizer=mode))
    trainer(max_epochs=4).fit(whole, loader)

    first = classifier(network(), adamw, ComplementObjectiveEngine(optimizer=mode))
    path = checkpoint_after(2, first, loader, trainer, tmp_path / "two.ckpt")
    # In a new module, and in one whose engine has been through another training.
    for resumed in (classifier(network(), adamw, ComplementObjectiveEngine(optimizer=mode)), first):
        trainer(max_epochs=4).fit(resumed, loader, ckpt_path=path)
        assert largest_gap(resumed.network, whole.network) == 0.0


def test_complement_state_is_in_checkpoints_saved_before_the_next_step(
    classifier: Any, network: Any, loader: Any, trainer: Any, tmp_path: Path
) -> None:
    module = classifier(network(), adamw, ComplementObjectiveEngine(optimizer="separate"))
    path = checkpoint_after(1, module, loader, trainer, tmp_path / "one.ckpt")
    resumed = classifier(network(), adamw, ComplementObjectiveEngine(optimizer="separate"))
    fit = trainer(max_epochs=1)
    fit.fit(resumed, loader, ckpt_path=path)  # nothing left to train
    fit.save_checkpoint(tmp_path / "again.ckpt")
    saved, again = (torch.load(tmp_path / name, weights_only=True) for name in ("one.ckpt", "again.ckpt"))
    assert saved["complement_optimizer"]["state"][0]["exp_avg"].any()
    torch.testing.assert_close(again["complement_optimizer"], saved["complement_optimizer"], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_checkpoints_interchange_with_cross_entropy(
    mode: Any, classifier: Any, network: Any, loader: Any, trainer: Any, tmp_path: Path
) -> None:
    def resumed(engine: ComplementObjectiveEngine | None, path: str) -> Any:
        module = classifier(network(), adamw, engine)
        trainer(max_epochs=3).fit(module, loader, ckpt_path=path)
        return module

    def continued(module: Any, batches: Batches, complement: bool) -> nn.Module:
        """One more epoch in plain PyTorch on the checkpoint's weights and primary optimizer."""
        saved = torch.load(module, weights_only=True)
        expected = network()
        expected.load_state_dict({k.removeprefix("network."): v for k, v in saved["state_dict"].items()})
        optimizer = adamw(expected.parameters())
        optimizer.load_state_dict(saved["optimizer_states"][0])
        if complement:
            other = optimizer if mode == "shared" else adamw(expected.parameters())
            two_step_loop(expected, batches, optimizer, other, epochs=1)
        else:
            for inputs, targets in batches:
                optimizer.zero_grad()
                F.cross_entropy(expected(inputs), targets).backward()
                optimizer.step()
        return expected

    plain = checkpoint_after(2, classifier(network(), adamw, None), loader, trainer, tmp_path / "ce.ckpt")
    engine = ComplementObjectiveEngine(optimizer=mode)
    cot = checkpoint_after(2, classifier(network(), adamw, engine), loader, trainer, tmp_path / "cot.ckpt")

    into_cot = resumed(ComplementObjectiveEngine(optimizer=mode), plain)
    assert largest_gap(into_cot.network, continued(plain, list(loader), complement=True)) < 1e-8
    into_plain = resumed(None, cot)
    assert largest_gap(into_plain.network, continued(cot, list(loader), complement=False)) < 1e-8


def test_a_new_training_starts_with_fresh_complement_state(
    classifier: Any, network: Any, loader: Any, trainer: Any, tmp_path: Path
) -> None:
    """Reading a checkpoint for its weights must not bring half of the optimizer state into the next fit."""

    def separate() -> ComplementObjectiveEngine:
        return ComplementObjectiveEngine(optimizer="separate")

    path = checkpoint_after(1, classifier(network(), adamw, separate()), loader, trainer, tmp_path / "c.ckpt")
    loaded = classifier.load_from_checkpoint(
        path, network=network(), optimizer=adamw, engine=separate(), weights_only=True
    )
    weights_only = classifier(network(), adamw, separate())
    weights_only.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    for module in (loaded, weights_only):
        trainer(max_epochs=1).fit(module, loader)
    assert largest_gap(loaded.network, weights_only.network) == 0.0


def test_weights_only_checkpoints_hold_no_optimizer(
    classifier: Any, network: Any, loader: Any, trainer: Any, tmp_path: Path
) -> None:
    fit = trainer(max_epochs=1)
    fit.fit(classifier(network(), engine=ComplementObjectiveEngine(optimizer="separate")), loader)
    fit.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "complement_optimizer" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)


# -------------------------------------------------------------------- precision, processes, devices


def test_half_precision_with_a_gradient_scaler(
    pl: ModuleType, classifier: Any, network: Any, rows: tuple[Tensor, Tensor], trainer: Any
) -> None:
    batches = [(rows[0][i : i + 4].float(), rows[1][i : i + 4]) for i in range(0, 20, 4)]
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", growth_interval=3))
    module = classifier(network().float(), sgd, ComplementObjectiveEngine())
    fit = trainer(plugins=[plugin], gradient_clip_val=0.5)
    fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]

    expected = network().float()
    optimizer, scaler = sgd(expected.parameters()), torch.amp.GradScaler("cpu", growth_interval=3)
    for inputs, targets in batches * 2:
        for loss in (F.cross_entropy, ComplementObjectiveEngine().loss):
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                value = loss(expected(inputs), targets)
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
    assert plugin.scaler.get_scale() == scaler.get_scale() > 65536
    assert largest_gap(module.network, expected) < 1e-6


DISTRIBUTED = """
    import sys
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    try:
        import lightning.pytorch as pl
    except ModuleNotFoundError:
        import pytorch_lightning as pl
    from lightning_integration import ComplementObjectiveEngine, ComplementObjectiveMixin

    class Classifier(ComplementObjectiveMixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            layers = torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)
            self.network = torch.nn.Sequential(*layers).double()

        def configure_complement_objective(self):
            return ComplementObjectiveEngine(optimizer="separate")

        def complement_logits(self, batch):
            return self.network(batch[0]), batch[1]

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(*self.complement_logits(batch))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

        def train_dataloader(self):
            data = TensorDataset(*torch.load(sys.argv[1]))
            sampler = DistributedSampler(data, num_replicas=2, rank=self.global_rank, shuffle=False)
            return DataLoader(data, batch_size=2, sampler=sampler)

    if __name__ == "__main__":
        torch.set_num_threads(1)
        module = Classifier()
        pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, max_epochs=2,
            accumulate_grad_batches=2, gradient_clip_val=0.05, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(module)
        if module.global_rank == 0:
            torch.save(module.network.state_dict(), sys.argv[2])
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_equal_one_with_batches_twice_as_large(
    pl: ModuleType, rows: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    inputs, targets = rows[0][:20], rows[1][:20]
    torch.save((inputs, targets), tmp_path / "rows.pt")
    script = tmp_path / "distributed.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    command = [sys.executable, str(script), str(tmp_path / "rows.pt"), str(tmp_path / "network.pt")]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=child_environment(root), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]

    torch.manual_seed(3)
    expected = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    batches = [(inputs[i : i + 4], targets[i : i + 4]) for i in range(0, 20, 4)]
    optimizers = [Adam(expected.parameters(), lr=0.01) for _ in range(2)]
    two_step_loop(expected, batches, *optimizers, accumulate=2, clip=0.05)
    for name, value in torch.load(tmp_path / "network.pt").items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-8)


def child_environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_on_a_gpu_equals_a_plain_pytorch_loop(
    mode: Any, classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    module = classifier(network(), sgd, ComplementObjectiveEngine(optimizer=mode))
    trainer(accelerator="gpu", accumulate_grad_batches=4, gradient_clip_val=0.05).fit(module, loader)

    expected = network().cuda()
    optimizer = sgd(expected.parameters())
    other = optimizer if mode == "shared" else sgd(expected.parameters())
    batches = [(inputs.cuda(), targets.cuda()) for inputs, targets in loader]
    two_step_loop(expected, batches, optimizer, other, accumulate=4, clip=0.05)
    assert largest_gap(module.network.cpu(), expected.cpu()) < 1e-8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_on_a_gpu_learns(
    precision: str, classifier: Any, network: Any, rows: tuple[Tensor, Tensor], trainer: Any
) -> None:
    data = torch.utils.data.TensorDataset(rows[0].float(), rows[1])
    module = classifier(network().float(), adam, ComplementObjectiveEngine())
    fit = trainer(accelerator="gpu", precision=precision, max_epochs=40)
    fit.fit(module, torch.utils.data.DataLoader(data, batch_size=22))
    assert fit.callback_metrics["train_loss"] < 0.5
    assert module.complement_values[-1] < module.complement_values[0]


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": 3}, TypeError, "loss must be a callable"),
        ({"optimizer": "both"}, ValueError, 'optimizer must be "shared" or "separate", got \'both\''),
        ({"weight": "1"}, TypeError, "weight must be a number, got str"),
        ({"weight": 0}, ValueError, "weight must be positive and finite, got 0"),
        ({"weight": float("nan")}, ValueError, "weight must be positive"),
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
        ("on_fit_start", lambda self: None),
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
