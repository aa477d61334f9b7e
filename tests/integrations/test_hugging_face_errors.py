"""The one-step loss in the plain Trainer, and what both refuse."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.hugging_face_models import (
    CLASSES,
    EPOCHS,
    ROWS,
    TASKS,
    VOCABULARY,
    ComplementObjectiveTrainer,
    accelerate,
    bert,
    continued_texts,
    dataset,
    gpt2,
    hugging_face,
    labelled_texts,
    llama,
    logged,
    next_tokens_of,
    sgd,
    transformers,
    windows,
)
from integrations.loops import largest_gap
from torch import Tensor, nn
from torch.optim import LBFGS

import lightning_integration
from cot_kernels import complement_statistics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
complement_compute_loss = hugging_face.complement_compute_loss
causal_lm_complement_compute_loss = hugging_face.causal_lm_complement_compute_loss


@pytest.mark.parametrize("task", ["texts", "tokens", "llama"])
@pytest.mark.parametrize(
    ("options", "weight"),
    [({}, lambda classes: -1 / (classes - 1)), ({"gamma": 0.5, "normalization": "classes"}, lambda k: 0.5 / k)],
)
def test_one_step_loss_in_the_plain_trainer(
    task: str, options: dict[str, Any], weight: Callable[[int], float], trained: Any
) -> None:
    of = TASKS[task]
    expected, network = of.network(), of.network()
    optimizer = sgd(expected)
    for window in windows(of.data(), 4) * EPOCHS:
        logits, targets = of.find(expected, window)
        logits, targets = logits[targets != -100], targets[targets != -100]
        classes = logits.shape[1]
        wrong = logits[~F.one_hot(targets, classes).bool()].reshape(-1, classes - 1)
        entropy = torch.special.entr(wrong.softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        (F.cross_entropy(logits, targets) + weight(classes) * entropy).backward()
        optimizer.step()

    make = causal_lm_complement_compute_loss if of.find is next_tokens_of else complement_compute_loss
    own = {"compute_loss_func": pickle.loads(pickle.dumps(make(**options)))}
    trained(network, of.data(), trainer=transformers.Trainer, own=own, gradient_accumulation_steps=4)
    assert largest_gap(network, expected) < 1e-8


def test_one_step_loss_by_itself() -> None:
    logits = torch.randn(3, 4, CLASSES, dtype=torch.float64)
    labels = torch.tensor([[0, 1, -100, 2], [3, -100, -100, -100], [4, 4, 0, 1]])
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits.flatten(0, 1), labels.flatten(), strict=True):
        if label != -100:
            others = torch.cat([row[:label], row[label + 1 :]]).softmax(0)
            total += F.cross_entropy(row, label) - 0.3 * torch.special.entr(others).sum()
    loss = complement_compute_loss(gamma=-0.3, normalization="none")
    outputs = transformers.modeling_outputs.TokenClassifierOutput(logits=logits)
    assert loss(outputs, labels).item() == pytest.approx(total.item() / 8)
    assert loss(outputs, labels, num_items_in_batch=11).item() == pytest.approx(total.item() / 11)
    assert loss(outputs, labels, num_items_in_batch=torch.tensor(11)).item() == pytest.approx(total.item() / 11)
    shifted = causal_lm_complement_compute_loss(gamma=-0.3, normalization="none")
    assert shifted(outputs, labels).item() == pytest.approx(
        loss({"logits": logits[:, :-1]}, labels[:, 1:]).item(), abs=1e-12
    )


# -------------------------------------------------------------------------------- imports and errors


def test_names_are_found_in_the_package() -> None:
    for name in hugging_face.__all__:
        assert getattr(lightning_integration, name) is getattr(hugging_face, name)
    assert dir(lightning_integration) == sorted(lightning_integration.__all__)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "lightning_integration.hugging_face")
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"cot-kernels\[transformers\]\""):
        importlib.import_module("lightning_integration.hugging_face")


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ({"complement_loss": 3}, TypeError, "complement_loss must be a callable .* got int"),
        ({"complement_weight": "1"}, TypeError, "complement_weight must be a number, got str"),
        ({"complement_weight": True}, TypeError, "complement_weight must be a number, got bool"),
        ({"complement_weight": 0}, ValueError, "complement_weight must be positive and finite, got 0"),
        ({"complement_weight": float("inf")}, ValueError, "complement_weight must be positive and finite, got inf"),
        ({"logits": "logits"}, TypeError, "logits must be a callable .* got str"),
        ({"compute_loss_func": complement_compute_loss()}, ValueError, "compute_loss_func must be None"),
    ],
)
def test_bad_arguments(own: dict[str, Any], error: type[Exception], message: str, arguments: Any) -> None:
    with pytest.raises(error, match=message):
        ComplementObjectiveTrainer(bert(), arguments(), **own)


def test_other_label_names_are_refused(arguments: Any) -> None:
    with pytest.raises(
        ValueError, match=r"label_names must hold \"labels\", got \['start_positions', 'end_positions'\]"
    ):
        ComplementObjectiveTrainer(bert("QuestionAnswering"), arguments())


@pytest.mark.parametrize("network", [gpt2, llama])
def test_causal_language_models_need_shifted_labels(network: Any, arguments: Any) -> None:
    with pytest.raises(ValueError, match="pass logits=causal_lm_logits_and_targets"):
        ComplementObjectiveTrainer(network(), arguments())


def test_causal_language_models_are_found_inside_a_wrapper(arguments: Any) -> None:
    class Adapters(nn.Module):
        """Wraps a model as PEFT does."""

        def __init__(self) -> None:
            super().__init__()
            self.base = llama()
            self.config = self.base.config

        def get_base_model(self) -> Any:
            return self.base

        def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
            return self.base(labels=labels, **inputs)

    with pytest.raises(ValueError, match="pass logits=causal_lm_logits_and_targets"):
        ComplementObjectiveTrainer(Adapters(), arguments())


def test_encoder_decoders_do_not_shift_their_labels(arguments: Any) -> None:
    sizes = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    network = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    ComplementObjectiveTrainer(network, arguments())


@pytest.mark.parametrize("name", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_strategies_that_split_the_model_are_refused(name: str, arguments: Any) -> None:
    class Enabled(ComplementObjectiveTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            setattr(self, name, True)

    with pytest.raises(RuntimeError, match=r"does not support (DeepSpeed|FSDP)"):
        Enabled(bert(), arguments())


def test_parallelism_inside_a_model_is_refused(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(RuntimeError, match="does not support tensor, context or sequence parallelism")
    if hasattr(accelerate, "ParallelismConfig"):  # since accelerate 1.10
        with refused:
            ComplementObjectiveTrainer(bert(), arguments(parallelism_config=accelerate.ParallelismConfig()))
    if hasattr(transformers.PreTrainedModel, "is_distributed_loading_by_transformers"):
        monkeypatch.setattr(transformers.PreTrainedModel, "is_distributed_loading_by_transformers", True)
        with refused:
            ComplementObjectiveTrainer(bert(), arguments())


def test_lbfgs_is_refused(trained: Any) -> None:
    network = bert()
    with pytest.raises(RuntimeError, match="does not support LBFGS, whose step needs a closure"):
        trained(network, labelled_texts(), lambda network: LBFGS(network.parameters()))
    assert largest_gap(network, bert()) == 0.0


def test_a_loss_that_is_not_a_scalar_is_refused(trained: Any) -> None:
    with pytest.raises(ValueError, match=r"complement_loss must return a scalar, got shape \(4,\)"):
        trained(bert(), labelled_texts(), own={"complement_loss": lambda logits, targets: logits.sum(dim=1)})


@pytest.mark.parametrize("make", [complement_compute_loss, causal_lm_complement_compute_loss])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": "1"}, TypeError, "gamma must be a number, got str"),
        ({"gamma": float("nan")}, ValueError, "gamma must be finite, got nan"),
        ({"normalization": "mean"}, ValueError, "normalization must be one of .*, got 'mean'"),
    ],
)
def test_bad_arguments_of_the_one_step_loss(make: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_the_one_step_loss_needs_logits_and_labels() -> None:
    loss = complement_compute_loss()
    with pytest.raises(ValueError, match="needs labels, got None"):
        loss({"logits": torch.zeros(2, CLASSES)}, None)
    with pytest.raises(TypeError, match="must give logits"):
        loss({"last_hidden_state": torch.zeros(2, CLASSES)}, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not fit logits"):
        loss({"logits": torch.zeros(2, CLASSES)}, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("network", [gpt2, llama])
def test_the_one_step_loss_refuses_causal_language_models(network: Any, arguments: Any) -> None:
    data = dataset(continued_texts())
    trainer = transformers.Trainer(
        network(), arguments(), train_dataset=data, compute_loss_func=complement_compute_loss()
    )
    with pytest.raises(ValueError, match=r"got CausalLMOutput.*=causal_lm_complement_compute_loss\(\)"):
        trainer.train()


# ------------------------------------------------------------------------------ batches that do not fit


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            torch.zeros(ROWS, CLASSES),
            TypeError,
            "must be class indices, .* multi-label problems, regression and soft l",
        ),
        (
            torch.zeros(ROWS, CLASSES).long(),
            TypeError,
            r"must be class indices, .* of one-hot .* take labels.argmax\(-1",
        ),
        (
            torch.zeros(ROWS, 2).long(),
            ValueError,
            r"\(4, 2\) do not fit logits of shape \(4, 5\), which ask for \(4,\)",
        ),
    ],
)
def test_labels_that_are_not_one_index_a_row(labels: Tensor, error: Any, message: str, trained: Any) -> None:
    """Neither way names an argument that it has not."""
    data = {**labelled_texts(), "labels": labels}
    with pytest.raises(error, match=message) as two_steps:
        trained(bert(), data)
    assert "complement_logits" not in str(two_steps.value)
    own = {"compute_loss_func": complement_compute_loss()}
    with pytest.raises(error, match=message) as one_step:
        trained(bert(), data, trainer=transformers.Trainer, own=own)
    assert "logits=" not in str(one_step.value)
    if error is ValueError:
        assert str(two_steps.value).endswith(
            "pass logits=function, called as function(module, batch) -> (logits, targets)"
        )
        assert "pass a compute_loss_func of your own" in str(one_step.value)


def test_logits_of_images_are_told_where_classes_are_expected() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5, 4, 4\), which ask for \(2, 5, 4\), classes last"):
        complement_compute_loss()({"logits": torch.zeros(2, 5, 4, 4)}, torch.zeros(2, 16, 16, dtype=torch.int64))


HALF = {"attention_heads": 2, "ffn_dim": 8}


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_decoders_need_the_decoders_inputs(name: str, trained: Any) -> None:
    torch.manual_seed(0)
    sizes = {
        "T5": {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
        "Bart": {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
        | {f"{half}_{size}": value for half in ("encoder", "decoder") for size, value in HALF.items()},
    }[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    network = getattr(transformers, f"{name}ForConditionalGeneration")(config).double()
    data = continued_texts()
    with pytest.raises(ValueError, match=rf"{name}ForCond.* must hold decoder_input_ids.*DataCollatorForSeq2Seq\(tok"):
        trained(network, data)
    inputs = network.prepare_decoder_input_ids_from_labels(data["labels"])
    losses = logged(trained(network, {**data, "decoder_input_ids": inputs}), "train_complement")
    assert len(losses) == 12 and all(loss < 0 for loss in losses)


def test_classifiers_on_encoder_decoders_need_no_more(trained: Any) -> None:
    """Their decoder reads the encoder's inputs, shifted: the labels are of the whole text."""
    torch.manual_seed(0)
    halves = {f"{half}_{size}": value for half in ("encoder", "decoder") for size, value in HALF.items()}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16, "num_labels": CLASSES}
    config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=8, eos_token_id=2, **halves, **layers)
    data = labelled_texts()
    data["input_ids"] = data["input_ids"].masked_fill(data["input_ids"] == 2, 3)
    data["input_ids"][:, 3] = 2  # one end a text, whose hidden state is classified
    network = transformers.BartForSequenceClassification(config).double()
    assert logged(trained(network, data), "train_complement")


def test_evaluation_of_the_one_step_loss(trained: Any) -> None:
    """As the page says: eval_loss has the complement in it, and label smoothing changes nothing."""
    data, losses = labelled_texts(), []
    for smoothing in (0.0, 0.3):
        own = {
            "compute_loss_func": complement_compute_loss(gamma=-0.5, normalization="none"),
            "eval_dataset": dataset(data),
        }
        trainer = trained(bert(), data, trainer=transformers.Trainer, own=own, label_smoothing_factor=smoothing)
        losses.append(trainer.evaluate()["eval_loss"])
    network = trainer.model.eval()
    logits = network(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    entropy = -complement_statistics(logits, data["labels"]).negentropy.mean()
    assert losses[0] == losses[1] == pytest.approx((F.cross_entropy(logits, data["labels"]) - 0.5 * entropy).item())
