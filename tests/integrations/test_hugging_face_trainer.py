"""What else the Hugging Face Trainer does: logs, evaluation, resuming, half precision and several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.hugging_face_models import (
    EPOCHS,
    LOSS_ROUNDING,
    ROWS,
    Batch,
    ComplementObjectiveTrainer,
    accelerate,
    bert,
    constant,
    dataset,
    labelled_texts,
    labelled_tokens,
    logged,
    one_cycle,
    part,
    rows_of,
    sgd,
    transformers,
    two_step_loop,
    windows,
)
from integrations.loops import largest_gap
from torch import Tensor, nn

from cot_kernels import complement_entropy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("begin")

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("substep")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("optimizer")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("end")


def test_callbacks_and_schedulers_see_one_step(trained: Any) -> None:
    runs = []
    for trainer in (transformers.Trainer, ComplementObjectiveTrainer):
        recorder = Recorder()
        own = {"callbacks": [recorder]}
        fit = trained(bert(), labelled_texts(), sgd, one_cycle, trainer, own, gradient_accumulation_steps=4)
        runs.append((recorder.events, fit.state.global_step, logged(fit, "learning_rate"), logged(fit, "epoch")))
    assert runs[0] == runs[1]


def test_logs_are_means_since_the_last(trained: Any) -> None:
    each = trained(bert(), labelled_texts())
    thirds = trained(bert(), labelled_texts(), logging_steps=3)
    for name, tolerance in (("loss", 2 * LOSS_ROUNDING), ("train_complement", 1e-6)):
        values = logged(each, name)
        means = [sum(values[at : at + 3]) / 3 for at in range(0, len(values), 3)]
        assert logged(thirds, name) == pytest.approx(means, abs=tolerance)
    assert "train_complement" not in thirds.state.log_history[-1]  # the summary of the run


def test_evaluation_is_the_trainer_s(trained: Any) -> None:
    data = labelled_tokens()
    network = bert("TokenClassification")
    fit = trained(network, data, label_smoothing_factor=0.1)
    plain = transformers.Trainer(network, fit.args)
    ours, theirs = (trainer.evaluate(dataset(data))["eval_loss"] for trainer in (fit, plain))
    assert ours == theirs
    ours, theirs = (trainer.predict(dataset(data)).predictions for trainer in (fit, plain))
    assert (ours == theirs).all()


@pytest.mark.parametrize("stop", [3, 8])  # in the first epoch, and in the second
def test_resumed_training_equals_uninterrupted(stop: int, trained: Any, arguments: Any, tmp_path: Path) -> None:
    options = {
        "gradient_accumulation_steps": 1,
        "save_strategy": "steps",
        "save_steps": stop,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "shuffled": True,
    }

    def trainer(seed: int) -> Any:
        network = bert(dropout=0.1)
        if seed:
            nn.init.normal_(network.classifier.weight)
        return ComplementObjectiveTrainer(network, arguments(**options), train_dataset=dataset(labelled_texts()))

    whole = trainer(0)
    whole.train()
    resumed = trainer(1)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert whole.state.global_step == resumed.state.global_step == 12
    assert largest_gap(resumed.model, whole.model) == 0.0
    assert logged(resumed, "train_complement") == logged(whole, "train_complement")


def test_a_run_that_was_cut_short_leaves_nothing_behind(arguments: Any) -> None:
    class CutShort(transformers.TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    expected, network, data = bert(), bert(), labelled_texts()
    two_step_loop(expected, data, sgd(expected), accumulate=4)
    optimizer = sgd(network)
    fit = ComplementObjectiveTrainer(
        network,
        arguments(gradient_accumulation_steps=4),
        train_dataset=dataset(data),
        optimizers=(optimizer, constant(optimizer)),
        callbacks=[CutShort],
    )
    with pytest.raises(KeyboardInterrupt):
        fit.train()
    fit.remove_callback(CutShort)
    fit.train()
    assert largest_gap(network, expected) < 1e-8


def test_bf16_autocast(trained: Any) -> None:
    def find(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets = rows_of(network, batch)
        return logits.float(), targets

    expected, network, data = bert().float(), bert().float(), labelled_texts()
    two_step_loop(expected, data, sgd(expected), find=find, epochs=1)
    trained(network, data, bf16=True, num_train_epochs=1)
    assert largest_gap(network, expected) < 1e-5
    single = bert().float()
    two_step_loop(single, data, sgd(single), epochs=1)
    assert largest_gap(network, single) > 1e-4  # it was autocast indeed


def test_half_precision_with_a_gradient_scaler(arguments: Any) -> None:
    """On the CPU, where accelerate only takes a scaler that it is handed."""

    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)  # overflows at first

    network, data = bert().float(), labelled_texts()
    optimizer = sgd(network)
    fit = ComplementObjectiveTrainer(
        network,
        arguments(max_grad_norm=0.5),
        train_dataset=dataset(data),
        optimizers=(optimizer, one_cycle(optimizer)),
    )
    fit.accelerator.state._mixed_precision = "fp16"
    fit.accelerator.native_amp = True
    fit.accelerator.scaler = scaler()
    fit.train()

    expected = bert().float()
    optimizer, expected_scaler = sgd(expected), scaler()
    scheduler = one_cycle(optimizer)
    skipped = []
    for window in windows(data, 1) * EPOCHS:
        for loss in (F.cross_entropy, complement_entropy):
            with torch.autocast("cpu", torch.float16):
                logits, targets = rows_of(expected, window)
            optimizer.zero_grad()
            expected_scaler.scale(loss(logits.float(), targets)).backward()
            expected_scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
            expected_scaler.step(optimizer)
            scale = expected_scaler.get_scale()
            expected_scaler.update()
            skipped.append(expected_scaler.get_scale() < scale)
        if not skipped[-1]:
            scheduler.step()
    assert any(skipped) and not all(skipped)
    assert fit.accelerator.scaler.get_scale() == expected_scaler.get_scale()
    assert largest_gap(network, expected) < 1e-5


@pytest.mark.parametrize(
    ("average", "items", "factor"), [(True, 11, 2 * ROWS / 11), (False, 11, ROWS / 11), (True, None, 1.0)]
)
def test_shares_of_several_processes(
    average: bool, items: int | None, factor: float, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, data = bert().train(), labelled_texts()
    fit = ComplementObjectiveTrainer(network, arguments(average_tokens_across_devices=average))
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 2)
    mean = F.cross_entropy(*rows_of(network, data)).item()
    assert fit.compute_loss(network, data, num_items_in_batch=items).item() == pytest.approx(factor * mean, rel=1e-6)


DISTRIBUTED = """
    import os
    import sys
    import torch
    import transformers
    from lightning_integration import ComplementObjectiveTrainer
    assert not {"lightning", "pytorch_lightning"} & set(sys.modules), sorted(sys.modules)

    class InOrder(ComplementObjectiveTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    if __name__ == "__main__":
        torch.set_num_threads(1)
        folder = sys.argv[1]
        data = torch.load(f"{folder}/data.pt")
        network = torch.load(f"{folder}/network.pt", weights_only=False)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        trainer = InOrder(
            network,
            transformers.TrainingArguments(
                output_dir=folder, use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=2, logging_steps=1,
                gradient_accumulation_steps=2, num_train_epochs=2, max_grad_norm=0.05, save_strategy="no",
                lr_scheduler_type="constant", report_to=[], disable_tqdm=True,
            ),
            train_dataset=data,
            optimizers=(optimizer, None),
        )
        synchronised = []
        network.register_forward_pre_hook(
            lambda *_: synchronised.append(trainer.model_wrapped.require_backward_grad_sync)
        )
        trainer.train()
        if trainer.is_world_process_zero():
            torch.save((network.state_dict(), trainer.state.log_history, synchronised), f"{folder}/result.pt")
        torch.distributed.barrier()
        # Threads of gloo may still ask for the interpreter when that has gone, or end while they are joined: an abort.
        os._exit(0)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_equal_one_with_batches_twice_as_large(tmp_path: Path) -> None:
    data = part(labelled_tokens(), ROWS - 20, ROWS)  # as many rows for each process
    expected = bert("TokenClassification")
    torch.save(expected, tmp_path / "network.pt")
    torch.save(dataset(data), tmp_path / "data.pt")
    (tmp_path / "distributed.py").write_text(textwrap.dedent(DISTRIBUTED))
    root = Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    command = [sys.executable, str(tmp_path / "distributed.py"), str(tmp_path)]
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error[-3000:] for error in errors)

    history = two_step_loop(expected, data, sgd(expected), accumulate=2, clip=0.05)
    state, log, synchronised = torch.load(tmp_path / "result.pt")
    for name, value in state.items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-8)
    for at, (name, tolerance) in enumerate((("loss", LOSS_ROUNDING), ("train_complement", 1e-6))):
        values = [entry[name] for entry in log if name in entry]
        assert values == pytest.approx([each[at] for each in history], abs=tolerance)
    # Gradients cross processes once for each of the two steps, in windows of two, two and one batches.
    assert synchronised == ([False, True] * 4 + [True] * 2) * EPOCHS
