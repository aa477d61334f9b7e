"""The Python in README and docs runs as it stands there, with the names that the text takes as given."""

from __future__ import annotations

import re
import textwrap
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.loops import adam, largest_gap, sgd, two_step_loop
from torch import Tensor

from lightning_integration import ComplementObjectiveTraining

ROOT = Path(__file__).parents[2]


def run(page: str, heading: str, **given: Any) -> dict[str, Any]:
    """Runs the blocks of a section, one after the other; the names they leave."""
    text = (ROOT / page).read_text(encoding="utf-8")
    level, section = re.split(rf"^(#+) {re.escape(heading)}$", text, flags=re.MULTILINE)[1:]
    section = re.split(rf"^{level} ", section, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```$", section, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for _, block in blocks:
        exec(textwrap.dedent(block), given)
    return given


def test_classes_are_weighted_around_a_loss() -> None:
    """The block compares itself with F.cross_entropy, -100 among the targets."""
    run(
        "docs/pytorch.md",
        "What does not work",
        torch=torch,
        logits=torch.randn(5, 10),
        target=torch.tensor([3, -100, 0, 9, -100]),
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_another_ignored_index(pl: ModuleType, classifier: Any, network: Any, rows: Any, trainer: Any) -> None:
    """Windows of two batches with unlike numbers of valid targets: each target weighs the same in the second step."""

    class Segmentation(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], ignore_index=255)

    inputs, targets = rows[0], rows[1].clone()
    targets[[0, 1, 2, 9]] = 255
    batches = list(zip(inputs.split(4), targets.split(4), strict=True))
    given = {"ComplementObjectiveTraining": ComplementObjectiveTraining}
    callback = run("docs/training.md", "Where logits and targets are", **given)["callback"]
    module = Segmentation(network(), adam, None)
    trainer(callbacks=[callback], accumulate_grad_batches=2).fit(module, torch.utils.data.DataLoader(batches, None))
    expected = network()
    expected_batches = [(x, y.masked_fill(y == 255, -100)) for x, y in batches]
    two_step_loop(expected, expected_batches, *(adam(expected.parameters()) for _ in range(2)), accumulate=2)
    assert largest_gap(module.network, expected) < 1e-8


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_both_steps_in_manual_optimization(pl: ModuleType, network: Any, loader: Any, trainer: Any) -> None:
    class Classifier(run("docs/training.md", "What is refused", pl=pl)["Manual"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.network = network()

        def forward(self, inputs: Tensor) -> Any:
            return self.network(inputs)

        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    module, expected = Classifier(), network()
    trainer().fit(module, loader)
    optimizer = sgd(expected.parameters())
    two_step_loop(expected, list(loader), optimizer, optimizer)
    assert largest_gap(module.network, expected) < 1e-8


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_pages_on_hugging_face(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from integrations import hugging_face_models as models

    transformers = models.transformers
    trained: list[tuple[str, str]] = []
    train = transformers.Trainer.train

    def watched(trainer: Any) -> None:
        train(trainer)
        logs = {name for entry in trainer.state.log_history for name in entry}
        assert ("train_complement" in logs) == isinstance(trainer, models.ComplementObjectiveTrainer)
        trained.append((type(trainer).__name__, type(trainer.model).__name__))

    monkeypatch.setattr(transformers.Trainer, "train", watched)
    torch.manual_seed(0)
    half = {"depths": [1], "sr_ratios": [1], "hidden_sizes": [8], "num_attention_heads": [1], "mlp_ratios": [1]}
    rest = {"patch_sizes": [3], "strides": [2], "num_encoder_blocks": 1, "decoder_hidden_size": 8, "num_labels": 5}
    segmenter = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**half, **rest)).double()
    image = {"pixel_values": torch.randn(3, 16, 16).double(), "labels": torch.randint(5, (16, 16))}
    image["labels"][:3] = -100
    given = {
        "model": models.bert(),
        "language_model": models.llama(),
        "segmenter": segmenter,
        "dataset": models.dataset(models.labelled_texts()),
        "texts": models.dataset(models.continued_texts()),
        "images": [image] * 6,
        "arguments": arguments(num_train_epochs=1),
    }
    for heading in ("One step", "Two steps", "Tokens, language models, images"):
        given |= run("docs/hugging_face.md", heading, **given)
    run("README.md", "In Hugging Face transformers", **given)
    one, two = "Trainer", "ComplementObjectiveTrainer"
    bert, llama, segformer = "BertForSequenceClassification", "LlamaForCausalLM", "SegformerForSemanticSegmentation"
    assert trained == [(one, bert), (two, bert), (one, llama), (two, llama), (two, segformer), (two, bert), (one, bert)]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_readme_writes_for_adam(pl: ModuleType, classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    """Both ways train, and neither draws the warning of a separate optimizer."""
    assert run("README.md", "In plain PyTorch")["loss"].requires_grad
    names = run("README.md", "In Lightning")
    (callback,) = (each for each in names["trainer"].callbacks if isinstance(each, ComplementObjectiveTraining))
    engine = names["Classifier"].configure_complement_objective(None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*divides by the size")
        for callbacks, own in (([callback], None), ([], engine)):
            fit = trainer(max_epochs=1, callbacks=callbacks)
            fit.fit(classifier(network(), adam, own), loader)
            assert fit.callback_metrics["train_complement"] < -0.5  # in nats
