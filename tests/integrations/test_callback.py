"""The callback: its own knobs, the batches it understands, and what else a Trainer does, which it must not break."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.loops import adam, adamw, by_norm, largest_gap, published_complement_entropy, sgd, two_step_loop
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from cot_kernels import ComplementEntropy, complement_entropy
from lightning_integration import ComplementObjectiveEngine, ComplementObjectiveTraining, causal_lm_logits_and_targets

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

PLAIN_SGD = partial(SGD, lr=0.5, momentum=0.5)


def halving(optimizer: Optimizer) -> dict[str, Any]:
    return {"scheduler": LambdaLR(optimizer, lambda step: 0.5**step), "interval": "step"}


# ----------------------------------------------------------------------------------------------- knobs


def test_an_optimizer_of_its_own_follows_the_primarys_learning_rate(
    classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    module = classifier(network(), adam, None, halving)
    cot = ComplementObjectiveTraining(optimizer=PLAIN_SGD, lr_ratio=10.0)
    trainer(callbacks=[cot]).fit(module, loader)

    expected = network()
    optimizer = adam(expected.parameters())
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    two_step_loop(
        expected, list(loader), optimizer, PLAIN_SGD(expected.parameters()), lr_ratio=10.0, scheduler=schedule
    )
    assert largest_gap(module.network, expected) < 1e-8


def test_an_optimizer_with_groups_of_its_own_follows_the_first(
    classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    def two_groups(parameters: Iterable[Any]) -> Optimizer:
        first, *rest = parameters
        return SGD([{"params": [first]}, {"params": rest}], lr=1.0)

    module = classifier(network(), sgd, None)
    trainer(callbacks=[ComplementObjectiveTraining(optimizer=two_groups, lr_ratio=2.0)]).fit(module, loader)
    expected = network()
    primary, other = sgd(expected.parameters()), SGD(expected.parameters(), lr=0.1)
    for inputs, targets in list(loader) * 2:
        for optimizer, loss in ((primary, F.cross_entropy), (other, published_complement_entropy)):
            optimizer.zero_grad()
            loss(expected(inputs), targets).backward()
            optimizer.step()
    assert largest_gap(module.network, expected) < 1e-8


def test_frozen_batchnorm_statistics_are_those_of_the_primary_passes(
    classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    module = classifier(network(), sgd, None)
    trainer(callbacks=[ComplementObjectiveTraining(freeze_batchnorm_stats=True)]).fit(module, loader)

    expected = network()
    primary, other = sgd(expected.parameters()), sgd(expected.parameters())
    for inputs, targets in list(loader) * 2:
        primary.zero_grad()
        F.cross_entropy(expected(inputs), targets).backward()
        primary.step()
        buffers = {name: buffer.clone() for name, buffer in expected.named_buffers()}
        other.zero_grad()
        published_complement_entropy(expected(inputs), targets).backward()
        other.step()
        expected.load_state_dict(buffers, strict=False)
    assert largest_gap(module.network, expected) < 1e-8
    assert module.network[1].num_batches_tracked == 2 * len(loader)


def test_objective_and_log_name(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    ended: list[Tensor] = []

    class Doubled(ComplementEntropy):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            ended.append(2 * super().forward(input, target))
            return ended[-1]

    fit = trainer(callbacks=[ComplementObjectiveTraining(Doubled(5), weight=7.0, log_name="flatness")])
    fit.fit(classifier(network(), adam, None), loader)
    assert fit.callback_metrics["flatness"] == ended[-1].detach()
    assert fit.progress_bar_metrics["flatness"] == pytest.approx(ended[-1].item())
    assert "train_complement" not in fit.callback_metrics


# --------------------------------------------------------------------------------------------- batches


class Tagger(nn.Module):
    """Token classification as Hugging Face models do it: a mapping in, an output with logits out."""

    def __init__(self, mapping: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)
        self.mapping = mapping
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        return {"logits": logits} if self.mapping else type("Output", (), {"logits": logits})()


def token_batches() -> list[dict[str, Tensor]]:
    """Five micro-batches with between none and all of their labels to be ignored."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for valid in (12, 3, 5, 0, 7):
        tokens = torch.randint(11, (3, 4), generator=generator)
        labels = torch.randint(5, (12,), generator=generator)
        labels[valid:] = -100
        batches.append({"input_ids": tokens, "labels": labels.view(3, 4), "attention_mask": torch.ones(3, 4)})
    return batches


@pytest.mark.parametrize("mapping", [False, True])
def test_token_losses_of_a_window_are_those_of_one_large_batch(pl: ModuleType, trainer: Any, mapping: bool) -> None:
    class Tokens(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.tagger = Tagger(mapping)

        def forward(self, **inputs: Tensor) -> Any:
            return self.tagger(**inputs)

        def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
            output = self.tagger(batch["input_ids"])
            logits = output["logits"] if mapping else output.logits
            return 0.0 * logits.sum()  # only the complement step moves anything

        def configure_optimizers(self) -> Optimizer:
            return SGD(self.parameters(), lr=1.0)

    module, batches = Tokens(), token_batches()
    fit = trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[ComplementObjectiveTraining()])
    fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]

    expected = Tagger(True)
    optimizer = SGD(expected.parameters(), lr=1.0)
    for window in (batches[:3], batches[3:]):  # the last is ragged
        optimizer.zero_grad()
        tokens, labels = (torch.cat([batch[name] for batch in window]) for name in ("input_ids", "labels"))
        loss = published_complement_entropy(expected(tokens)["logits"].flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
    assert largest_gap(module.tagger, expected) < 1e-8
    assert fit.callback_metrics["train_complement"].item() == pytest.approx(loss.item(), abs=1e-6)


def test_classes_come_second_in_pairs(pl: ModuleType, trainer: Any) -> None:
    """Segmentation: (N, K, H, W) logits and (N, H, W) targets."""

    class Segmenter(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Conv2d(2, 4, 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.layer(image)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return SGD(self.parameters(), lr=0.0)

    module = Segmenter()
    batch = torch.randn(2, 2, 3, 5), torch.randint(4, (2, 3, 5))
    fit = trainer(max_epochs=1, callbacks=[ComplementObjectiveTraining()])
    fit.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    expected = complement_entropy(module(batch[0]), batch[1])
    torch.testing.assert_close(fit.callback_metrics["train_complement"], expected.detach())


def test_a_function_may_say_where_the_logits_are(classifier: Any, network: Any, rows: Any, trainer: Any) -> None:
    class Triples(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.network(batch["x"]), batch["y"])

    batches = [{"x": rows[0], "y": rows[1]}]
    cot = ComplementObjectiveTraining(logits=lambda module, batch: (module(batch["x"]), batch["y"]))
    module = Triples(network(), adam, None)
    trainer(max_epochs=1, callbacks=[cot]).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))

    expected = network()
    two_step_loop(expected, [rows], adam(expected.parameters()), adam(expected.parameters()), epochs=1)
    assert largest_gap(module.network, expected) < 1e-8


def test_causal_language_models_predict_the_next_token() -> None:
    logits, labels = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    got = causal_lm_logits_and_targets(lambda input_ids: {"logits": logits}, {"input_ids": labels, "labels": labels})
    torch.testing.assert_close(F.cross_entropy(*got), F.cross_entropy(logits[:, :3].transpose(1, 2), labels[:, 1:]))


# ------------------------------------------------------------------------------------------ the Trainer


def test_steps_are_counted_once_by_all_who_count(
    pl: ModuleType, classifier: Any, network: Any, loader: Any, trainer: Any, tmp_path: Path
) -> None:
    seen: list[float] = []

    class Recorder(ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: int | None = None) -> None:
            seen.append(float(metrics))

    def schedule(optimizer: Optimizer) -> dict[str, Any]:
        return {"scheduler": Recorder(optimizer), "interval": "step", "frequency": 2, "monitor": "train_loss"}

    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    rates = pl.callbacks.LearningRateMonitor("step")
    logger = pl.loggers.CSVLogger(tmp_path, name="log")
    fit = trainer(
        max_epochs=-1,
        max_steps=8,
        enable_checkpointing=True,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[ComplementObjectiveTraining(), checkpoints, rates],
    )
    fit.fit(classifier(network(), adam, None, schedule), loader)
    assert fit.global_step == 8
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt"]
    assert len(seen) == 4
    rows = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    assert {"train_loss", "train_complement", "lr-Adam"} <= set(header)
    steps = [row.split(",")[header.index("step")] for row in rows[1:] if row.split(",")[header.index("train_loss")]]
    assert steps == [str(step) for step in range(8)]


def test_weight_averaging(pl: ModuleType, classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    average = pl.callbacks.EMAWeightAveraging(decay=0.5, update_every_n_steps=2)
    module = classifier(network(), sgd, None)
    trainer(max_epochs=1, callbacks=[ComplementObjectiveTraining(), average]).fit(module, loader)

    expected = network()
    optimizers = [sgd(expected.parameters()) for _ in range(2)]
    averaged: dict[str, Tensor] = {}
    for step, batch in enumerate(loader, 1):
        two_step_loop(expected, [batch], *optimizers, epochs=1)
        if step % 2 == 1:  # it counts steps from 0
            now = {name: value.detach().clone() for name, value in expected.named_parameters()}
            averaged = {name: 0.5 * averaged[name] + 0.5 * value for name, value in now.items()} if averaged else now
    for name, value in module.network.named_parameters():  # training ends with the averages swapped in
        torch.testing.assert_close(value.detach(), averaged[name], rtol=0, atol=1e-8)


def test_learning_rate_finder(pl: ModuleType, classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    for cot, engine in (([ComplementObjectiveTraining()], None), ([], ComplementObjectiveEngine())):
        module = classifier(network(), adam, engine)
        module.lr = 0.01
        module.make_optimizer = lambda parameters, module=module: torch.optim.Adam(parameters, lr=module.lr)
        fit = trainer(callbacks=cot, max_epochs=10)
        pl.tuner.Tuner(fit).lr_find(module, loader, num_training=40)
        found = module.lr
        assert found != 0.01
        fit.fit_loop.max_epochs = 1
        fit.fit(module, loader)

        expected = network()
        two_step_loop(
            expected, list(loader), *(torch.optim.Adam(expected.parameters(), lr=found) for _ in range(2)), epochs=1
        )
        assert largest_gap(module.network, expected) < 1e-8


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(precision: str, classifier: Any, network: Any, rows: Any, trainer: Any) -> None:
    module = classifier(network().float(), sgd, None)
    dtypes: list[torch.dtype] = []

    def objective(logits: Tensor, targets: Tensor) -> Tensor:
        dtypes.append(logits.dtype)
        return complement_entropy(logits, targets)

    fit = trainer(precision=precision, max_epochs=1, callbacks=[ComplementObjectiveTraining(objective)])
    data = torch.utils.data.TensorDataset(rows[0].float(), rows[1])
    fit.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert set(dtypes) == {torch.bfloat16}
    assert -1 < fit.callback_metrics["train_complement"] < 0


def test_compiled_networks(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    module = classifier(network(), sgd, None)
    module.network.compile(backend="aot_eager")
    trainer(callbacks=[ComplementObjectiveTraining()]).fit(module, loader)
    expected = network()
    two_step_loop(expected, list(loader), sgd(expected.parameters()), sgd(expected.parameters()))
    assert largest_gap(module.network, expected) < 1e-8


@pytest.mark.parametrize("mode", ["shared", "separate", PLAIN_SGD])
def test_resumed_training_equals_uninterrupted(
    mode: Any, classifier: Any, network: Any, loader: Any, trainer: Any, tmp_path: Path
) -> None:
    def fit(module: Any, epochs: int, **options: Any) -> Any:
        run = trainer(max_epochs=epochs, callbacks=[ComplementObjectiveTraining(optimizer=mode)])
        run.fit(module, loader, **options)
        return run

    whole, first, resumed = (classifier(network(), adamw, None) for _ in range(3))
    fit(whole, 4)
    fit(first, 2).save_checkpoint(tmp_path / "two.ckpt")
    fit(resumed, 4, ckpt_path=tmp_path / "two.ckpt")
    assert largest_gap(resumed.network, whole.network) == 0.0


def test_checkpoints_interchange_with_plain_training(
    classifier: Any, network: Any, loader: Any, trainer: Any, tmp_path: Path
) -> None:
    for name, before, after in (
        ("ce", [], [ComplementObjectiveTraining()]),
        ("cot", [ComplementObjectiveTraining()], []),
    ):
        first = trainer(max_epochs=1, callbacks=before)
        first.fit(classifier(network(), adamw, None), loader)
        first.save_checkpoint(tmp_path / f"{name}.ckpt")
        second = trainer(max_epochs=2, callbacks=after)
        second.fit(classifier(network(), adamw, None), loader, ckpt_path=tmp_path / f"{name}.ckpt")
        assert second.global_step == 2 * len(loader)
        assert ("train_complement" in second.callback_metrics) == bool(after)


def test_the_module_is_left_as_it_was(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    module, cot = classifier(network(), adam, None), ComplementObjectiveTraining()
    trainer(callbacks=[cot], max_epochs=1).fit(module, loader)
    assert "optimizer_step" not in vars(module)

    class Stop(Exception):
        pass

    def stop(*arguments: Any) -> Tensor:
        raise Stop

    with pytest.raises(Stop):
        trainer(callbacks=[ComplementObjectiveTraining(stop)], max_epochs=1).fit(module, loader)
    assert "optimizer_step" not in vars(module)
    trainer(callbacks=[cot], max_epochs=1).fit(module, loader)  # the same callback again
    assert "optimizer_step" not in vars(module)


def test_an_optimizer_step_of_the_modules_own_is_kept(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    class Warmup(classifier):  # type: ignore[misc]
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            optimizer.param_groups[0]["lr"] = 0.001 * (1 + self.trainer.global_step)
            super().optimizer_step(epoch, batch_idx, optimizer, closure)

    module = Warmup(network(), sgd, None)
    trainer(callbacks=[ComplementObjectiveTraining()], max_epochs=1).fit(module, loader)
    expected = network()
    optimizers = [sgd(expected.parameters()) for _ in range(2)]
    for step, batch in enumerate(loader):
        optimizers[0].param_groups[0]["lr"] = 0.001 * (1 + step)
        two_step_loop(expected, [batch], *optimizers, epochs=1)
    assert largest_gap(module.network, expected) < 1e-8


def test_copies_hold_the_settings_only(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    cot = ComplementObjectiveTraining(ComplementEntropy(5), optimizer=PLAIN_SGD, lr_ratio=0.5, every_n_steps=2)
    trainer(callbacks=[cot], max_epochs=1).fit(classifier(network(), adam, None), loader)
    for copied in (pickle.loads(pickle.dumps(cot)), copy.deepcopy(cot)):
        assert copied.state_dict() == {}
        assert copied.engine._primary is None and copied.engine._own is None and copied.engine._window == []
        assert (copied.engine.lr_ratio, copied.engine.every_n_steps) == (0.5, 2)
        trainer(callbacks=[copied], max_epochs=1).fit(classifier(network(), adam, None), loader)


def test_two_classes_warn(pl: ModuleType, classifier: Any, rows: Any, trainer: Any) -> None:
    data = torch.utils.data.TensorDataset(rows[0], rows[1] % 2)
    module = classifier(nn.Linear(6, 2).double(), adam, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[ComplementObjectiveTraining()], max_epochs=1).fit(
            module, torch.utils.data.DataLoader(data, batch_size=22)
        )
    assert any("2 classes" in str(warning.message) for warning in caught)


def test_two_steps_with_clipping_equal_the_plain_loop_for_a_second_fit(
    classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    """A callback used for one training starts the next with fresh state."""
    cot = ComplementObjectiveTraining()
    for _ in range(2):
        module = classifier(network(), adamw, None)
        trainer(callbacks=[cot], gradient_clip_val=0.05).fit(module, loader)
        expected = network()
        two_step_loop(expected, list(loader), *(adamw(expected.parameters()) for _ in range(2)), clip=by_norm)
        assert largest_gap(module.network, expected) < 1e-8
