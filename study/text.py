"""Tasks of text: the last layer of all-MiniLM-L6-v2 and a linear head learn, over what the layers below give.

The layers below stay as they are, so what they give is computed once and kept.
"""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import IGNORED, Data, Part, in_three

LENGTH = 40  # pieces of words, the two special ones included
BATCH = 64


@functools.cache
def _encoder() -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    from lightning_integration import packaged_minilm

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return AutoModel.from_pretrained(packaged_minilm()).eval()


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    from lightning_integration import packaged_minilm

    return AutoTokenizer.from_pretrained(packaged_minilm())


@torch.no_grad()
def _below_the_last_layer(encoded: Any) -> tuple[Tensor, Tensor]:
    """Hidden states (N, T, 384) and the attention mask (N, T)."""
    tokens, mask = encoded["input_ids"], encoded["attention_mask"]
    hidden = [
        _encoder()(tokens[start : start + BATCH], mask[start : start + BATCH], output_hidden_states=True)
        .hidden_states[-2]
        .clone()
        for start in range(0, len(tokens), BATCH)
    ]
    return torch.cat(hidden), mask


class LastLayer(nn.Module):
    """The pretrained layer, then a linear head for each piece, or for the mean of all."""

    def __init__(self, classes: int, of_pieces: bool) -> None:
        super().__init__()
        encoder = _encoder()
        self.of_pieces = of_pieces
        self.layer = copy.deepcopy(encoder.encoder.layer[-1])
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(encoder.config.hidden_size, classes))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Logits (N, K), or (N, T, K) of pieces."""
        longest = int(mask.sum(dim=1).max())
        hidden, mask = hidden[:, :longest], mask[:, :longest]
        hidden = self.layer(hidden, attention_mask=mask[:, None, None, :].bool())
        if self.of_pieces:
            return F.pad(self.head(hidden), (0, 0, 0, LENGTH - longest))
        weights = mask[:, :, None].to(hidden.dtype)
        logits: Tensor = self.head((hidden * weights).sum(dim=1) / weights.sum(dim=1))
        return logits


def bbc_news(limit: int | None) -> Data:
    """2,060 distinct stories in five topics: 760 to draw few from, 300 for validation, 1,000 to test."""
    from lightning_integration.data import BBC_TOPICS, distinct_stories, read_bbc_news

    stories = distinct_stories(read_bbc_news())
    stories = random.Random(0).sample(stories, len(stories) if limit is None else 3 * limit)
    target = torch.tensor([BBC_TOPICS.index(story.topic) for story in stories])
    texts = [story.text for story in stories]
    encoded = _tokenizer()(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    sizes = (760, 300) if limit is None else (limit, limit)
    return in_three(Part(_below_the_last_layer(encoded), target), *sizes, None)


def entities(limit: int | None) -> Data:
    """Words of tweets: outside of an entity, or of one of ten types. The first piece of a word bears its class.

    Of the distinct tweets with an entity: 400 to learn from, 200 for validation, 268 to test.
    """
    from examples.ner import read_sentences

    sentences = [each for each in read_sentences() if any(each.classes)]
    sentences = random.Random(0).sample(sentences, len(sentences) if limit is None else 3 * limit)
    encoded = _tokenizer()(
        [list(each.words) for each in sentences],
        is_split_into_words=True, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt",
    )  # fmt: skip
    target = torch.full((len(sentences), LENGTH), IGNORED)
    for row, sentence in enumerate(sentences):
        words = encoded.word_ids(row)
        for column, (before, word) in enumerate(zip([None, *words], words, strict=False)):
            if word is not None and word != before:
                target[row, column] = sentence.classes[word]
    sizes = (400, 200) if limit is None else (limit, limit)
    return in_three(Part(_below_the_last_layer(encoded), target), *sizes, None)
