"""Complement objective training in Lightning: callback, mixin, transformer text classifier, BBC News.

`ComplementObjectiveEngine` and `ComplementObjectiveMixin` import no Lightning. The other names import what they need
when they are first used: `packaged_minilm` nothing, `ComplementObjectiveTrainer` and the `..._compute_loss` functions
transformers, the rest Lightning and transformers.

Lightning comes as two packages, `lightning.pytorch` and `pytorch_lightning`, and the Trainer of one takes no module of
the other. `CotBert` and `BBCNewsDataModule` belong to the one that is imported before they are, else to
`lightning.pytorch` where it is installed: with `pytorch_lightning`, import that first. The callback, the mixin and the
engine serve both, in any order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .batches import causal_lm_logits_and_targets, logits_and_targets
from .mixin import ComplementObjectiveMixin
from .training import ComplementObjectiveEngine

if TYPE_CHECKING:
    from .callback import ComplementObjectiveTraining
    from .cot_bert import CotBert
    from .data import BBCNewsDataModule
    from .encoders import packaged_minilm
    from .hugging_face import ComplementObjectiveTrainer, causal_lm_complement_compute_loss, complement_compute_loss

__all__ = [
    "BBCNewsDataModule",
    "ComplementObjectiveEngine",
    "ComplementObjectiveMixin",
    "ComplementObjectiveTrainer",
    "ComplementObjectiveTraining",
    "CotBert",
    "causal_lm_complement_compute_loss",
    "causal_lm_logits_and_targets",
    "complement_compute_loss",
    "logits_and_targets",
    "packaged_minilm",
]

_MODULE_OF = {
    "BBCNewsDataModule": "data",
    "ComplementObjectiveTrainer": "hugging_face",
    "ComplementObjectiveTraining": "callback",
    "CotBert": "cot_bert",
    "causal_lm_complement_compute_loss": "hugging_face",
    "complement_compute_loss": "hugging_face",
    "packaged_minilm": "encoders",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
