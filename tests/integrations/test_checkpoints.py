"""Resuming, and checkpoints that interchange between cross-entropy and complement objective training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.loops import Batches, adamw, largest_gap, two_step_loop
from torch import nn

from lightning_integration import ComplementObjectiveEngine

# Lightning's advice about loaders, loggers and step counts has no place in a unit test's output.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


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
