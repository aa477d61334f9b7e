"""Few-shot BBC News in the Trainer of Hugging Face transformers, with and without complement objective training (COT).

    python -m examples.hugging_face                    # two steps a batch
    python -m examples.hugging_face --cross-entropy    # one

Each fine-tunes the packaged MiniLM on 16 articles a topic, in about a minute on two CPU cores. They differ by the class
of the Trainer.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import transformers
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from lightning_integration import BBCNewsDataModule, ComplementObjectiveTrainer, packaged_minilm

ARTICLES_PER_TOPIC, EPOCHS = 16, 6


def train(trainer_class: type[Trainer]) -> dict[str, float]:
    """What the Trainer measures on the test articles: `eval_accuracy`, and `eval_loss`, the cross-entropy."""
    transformers.set_seed(0)
    data = BBCNewsDataModule(packaged_minilm, articles_per_topic=ARTICLES_PER_TOPIC, max_length=40, test_size=500)
    data.setup()
    train_loader, test_loader = data.train_dataloader(), data.test_dataloader()
    model = AutoModelForSequenceClassification.from_pretrained(data.model_path, num_labels=data.num_labels)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=16,
            num_train_epochs=EPOCHS,
            learning_rate=1e-4,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            seed=0,
        )
        trainer = trainer_class(
            model,
            arguments,
            train_dataset=train_loader.dataset,
            eval_dataset=test_loader.dataset,
            data_collator=train_loader.collate_fn,
            compute_metrics=accuracy,
        )
        trainer.train()
        return trainer.evaluate()


def accuracy(evaluation: Any) -> dict[str, float]:
    """Of logits (N, K) and labels (N)."""
    return {"accuracy": float((evaluation.predictions.argmax(axis=1) == evaluation.label_ids).mean())}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.hugging_face", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cross-entropy", action="store_true", help="plain training, one step a batch")
    trainer_class = Trainer if parser.parse_args(argv).cross_entropy else ComplementObjectiveTrainer
    measured = train(trainer_class)
    print(
        f"{trainer_class.__name__}: test accuracy {100 * measured['eval_accuracy']:.1f} %, "
        f"cross-entropy {measured['eval_loss']:.4f}"
    )


if __name__ == "__main__":
    main()
