"""The two steps in half precision, in several processes, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.loops import by_norm, largest_gap, published_complement_entropy, sgd, two_step_loop
from torch import Tensor, nn
from torch.optim import Adam

from cot_kernels import complement_entropy
from lightning_integration import ComplementObjectiveEngine

# Lightning's advice about loaders, loggers and step counts has no place in a unit test's output.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_half_precision_with_a_gradient_scaler(
    pl: ModuleType, classifier: Any, network: Any, rows: tuple[Tensor, Tensor], trainer: Any
) -> None:
    batches = [(rows[0][i : i + 4].float(), rows[1][i : i + 4]) for i in range(0, 20, 4)]
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", growth_interval=3))
    module = classifier(network().float(), sgd, ComplementObjectiveEngine(optimizer="shared"))
    fit = trainer(plugins=[plugin], gradient_clip_val=0.5)
    fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]

    expected = network().float()
    optimizer, scaler = sgd(expected.parameters()), torch.amp.GradScaler("cpu", growth_interval=3)
    for inputs, targets in batches * 2:
        for loss in (F.cross_entropy, complement_entropy):
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
    from lightning_integration import (
        ComplementObjectiveEngine, ComplementObjectiveMixin, ComplementObjectiveTraining
    )

    class Plain(pl.LightningModule):
        def __init__(self, unused):
            super().__init__()
            torch.manual_seed(3)
            layers = torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)
            self.network = torch.nn.Sequential(*layers).double()
            if unused:
                self.unused = torch.nn.Linear(2, 2)

        def forward(self, inputs):
            return self.network(inputs)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

        def train_dataloader(self):
            data = TensorDataset(*torch.load("rows.pt"))
            sampler = DistributedSampler(data, num_replicas=2, rank=self.global_rank, shuffle=False)
            return DataLoader(data, batch_size=2, sampler=sampler)

        def on_fit_end(self):
            if self.global_rank == 0:
                torch.save(self.network.state_dict(), "network.pt")

    class Mixed(ComplementObjectiveMixin, Plain):
        def complement_logits(self, batch):
            return self(batch[0]), batch[1]

    if __name__ == "__main__":
        way, options = sys.argv[1], eval(sys.argv[2])
        torch.set_num_threads(1)
        strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", **options)
        pl.Trainer(
            accelerator="cpu", devices=2, strategy=strategy,
            callbacks=[] if way == "mixin" else [ComplementObjectiveTraining()],
            use_distributed_sampler=False, max_epochs=2, accumulate_grad_batches=int(sys.argv[3]),
            gradient_clip_val=0.05, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        ).fit((Mixed if way == "mixin" else Plain)("find_unused_parameters" in options))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(
    ("way", "options", "accumulate"),
    [
        ("mixin", {}, 2),
        # Without accumulation: DDP itself fails when the first pass of a static graph does not synchronise.
        ("callback", {"static_graph": True}, 1),
        ("callback", {"find_unused_parameters": True}, 2),
        ("callback", {"start_method": "spawn"}, 2),  # pickles the callback
    ],
)
def test_two_processes_equal_one_with_batches_twice_as_large(
    way: str, options: dict[str, Any], accumulate: int, pl: ModuleType, rows: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    inputs, targets = rows[0][:20], rows[1][:20]
    trained = trained_in_two_processes(inputs, targets, way, options, accumulate, tmp_path)

    torch.manual_seed(3)
    expected = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    batches = [(inputs[i : i + 4], targets[i : i + 4]) for i in range(0, 20, 4)]
    optimizers = [Adam(expected.parameters(), lr=0.01) for _ in range(2)]
    two_step_loop(expected, batches, *optimizers, accumulate=accumulate, clip=by_norm)
    for name, value in trained.items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-8)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_processes_average_the_means_over_their_own_targets(
    pl: ModuleType, rows: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """In each process the mean over a window's targets, however they are spread over its micro-batches."""
    inputs, targets = rows[0][:20], rows[1][:20].clone()
    targets[[0, 4, 5, 8, 11, 12, 17]] = -100
    trained = trained_in_two_processes(inputs, targets, "callback", {}, 2, tmp_path)

    torch.manual_seed(3)
    expected = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    optimizers = [Adam(expected.parameters(), lr=0.01) for _ in range(2)]
    ranks = [[(inputs[rank::2][i : i + 2], targets[rank::2][i : i + 2]) for i in range(0, 10, 2)] for rank in (0, 1)]
    for start in (0, 2, 4) * 2:
        windows = [batches[start : start + 2] for batches in ranks]
        optimizers[0].zero_grad()
        sum(F.cross_entropy(expected(x), y) / 4 for window in windows for x, y in window).backward()  # type: ignore
        by_norm(expected.parameters())
        optimizers[0].step()
        optimizers[1].zero_grad()
        for window in windows:
            x, y = (torch.cat(parts) for parts in zip(*window, strict=True))
            (published_complement_entropy(expected(x), y) / 2).backward()
        by_norm(expected.parameters())
        optimizers[1].step()
    for name, value in trained.items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-8)


def trained_in_two_processes(
    inputs: Tensor, targets: Tensor, way: str, options: dict[str, Any], accumulate: int, folder: Path
) -> dict[str, Tensor]:
    torch.save((inputs, targets), folder / "rows.pt")
    script = folder / "distributed.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    command = [sys.executable, str(script), way, repr(options), str(accumulate)]
    environment = child_environment(Path(__file__).parents[2])
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    state: dict[str, Tensor] = torch.load(folder / "network.pt")
    return state


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
    two_step_loop(expected, batches, optimizer, other, accumulate=4, clip=by_norm)
    assert largest_gap(module.network.cpu(), expected.cpu()) < 1e-8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_on_a_gpu_learns(
    precision: str, classifier: Any, network: Any, rows: tuple[Tensor, Tensor], trainer: Any
) -> None:
    data = torch.utils.data.TensorDataset(rows[0].float(), rows[1])
    module = classifier(network().float(), partial(Adam, lr=0.1), ComplementObjectiveEngine())
    fit = trainer(accelerator="gpu", precision=precision, max_epochs=80)
    fit.fit(module, torch.utils.data.DataLoader(data, batch_size=22))
    assert fit.callback_metrics["train_loss"] < 0.5
    assert module.complement_values[-1] < module.complement_values[0]
