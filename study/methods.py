"""What is compared: fourteen ways to train, each with the same number of configurations to choose from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import cot_kernels

from .data import IGNORED

Criterion = Callable[[Tensor, Tensor], Tensor]  # of logits (M, K) and classes (M), -100 ignored
Kind = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class Step:
    """One of the steps that a batch may take, each with a fresh forward pass."""

    criterion: Criterion
    own_optimizer: bool = False
    rate: float = 1.0  # times the learning rate; of an optimizer of its own
    every: int = 1  # so many batches
    otherwise: Criterion | None = None  # on the other batches; no step where None


@dataclass(frozen=True)
class Recipe:
    steps: tuple[Step, ...]
    epochs: int = 1  # times the task's
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Method:
    key: str
    label: str
    about: str
    recipe: Callable[[float, Kind], Recipe]  # of the strength and the kind of optimizer
    strengths: tuple[float, ...] = (0.0,)
    rates: tuple[float, ...] = field(default_factory=lambda: spaced(CONFIGURATIONS))
    strength_is: str = ""  # empty where there is none
    strengths_of: dict[Kind, tuple[float, ...]] = field(default_factory=dict)  # where they depend on it
    rates_of: dict[Kind, tuple[float, ...]] = field(default_factory=dict)

    def configurations(self, kind: Kind) -> list[tuple[float, float]]:
        """Pairs: a factor of the task's learning rate, and a strength."""
        strengths, rates = self.strengths_of.get(kind, self.strengths), self.rates_of.get(kind, self.rates)
        return [(rate, strength) for strength in strengths for rate in rates]


CONFIGURATIONS = 15
RATES = (0.3, 1.0, 3.0)
NATS = (0.25, 0.5, 1.0, 2.0, 4.0)


def spaced(count: int) -> tuple[float, ...]:
    """Factors from 1/10 to 10, for methods with nothing but a learning rate to choose."""
    return tuple(float(f"{10 ** (2 * index / (count - 1) - 1):.3g}") for index in range(count))


# ------------------------------------------------------------------------------------------ criteria

cross_entropy = functools.partial(F.cross_entropy, ignore_index=IGNORED)


def confidence_penalty(logits: Tensor, target: Tensor, weight: float) -> Tensor:
    """Cross-entropy - weight H(p), in nats (Pereyra et al., 2017, arXiv 1701.06548, section 3.1)."""
    valid = target != IGNORED
    log_p = logits.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    penalty = torch.where(valid, entropy, 0).sum() / valid.sum()
    return cross_entropy(logits, target) - weight * penalty


def focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Mean of -(1 - p_g)^gamma ln p_g (Lin et al., ICCV 2017, arXiv 1708.02002, equation 4)."""
    nll = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
    wrong = (-torch.expm1(-nll)).clamp_min(1e-9)  # the derivative of 0^0.5 is infinite
    return wrong.pow(gamma).mul(nll).sum() / (target != IGNORED).sum()


# An unweighted nat of complement entropy; the published losses divide it by K.
complement_nats = functools.partial(cot_kernels.complement_entropy, eps=0.0, normalization="none")


def weighted_complement_nats(logits: Tensor, target: Tensor, weight: float) -> Tensor:
    return weight * complement_nats(logits, target)


# ------------------------------------------------------------------------------------------- recipes


def one_step(criterion: Callable[..., Tensor], **options: float) -> Recipe:
    return Recipe((Step(functools.partial(criterion, **options)),))


def two_steps(complement: Step) -> Recipe:
    return Recipe((Step(cross_entropy), complement))


def weighted_complement_cross_entropy(logits: Tensor, target: Tensor, weight: float) -> Tensor:
    """Cross-entropy minus weighted nats of complement entropy."""
    return cot_kernels.complement_cross_entropy(logits, target, gamma=-weight, normalization="none")


def _label_smoothing(strength: float, kind: Kind) -> Recipe:
    return one_step(cross_entropy, label_smoothing=strength)


def _shared(strength: float, every: int) -> Recipe:
    return two_steps(Step(functools.partial(weighted_complement_nats, weight=strength), every=every))


METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        Method("ce", "cross-entropy", "one step a batch", lambda *_: one_step(cross_entropy)),
        Method(
            "ce_twice", "cross-entropy, twice the steps", "twice the epochs: as many steps as two-step COT takes",
            lambda *_: Recipe((Step(cross_entropy),), epochs=2),
        ),
        Method(
            "weight_decay", "weight decay", "cross-entropy with the optimizer's weight decay",
            lambda strength, _: Recipe((Step(cross_entropy),), weight_decay=strength),
            rates=RATES, strength_is="weight decay",
            strengths_of={"sgd": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "adamw": (0.01, 0.03, 0.1, 0.3, 1.0)},
        ),
        Method(
            "label_smoothing", "label smoothing", "cross-entropy to targets that are part uniform", _label_smoothing,
            (0.05, 0.1, 0.2, 0.4, 0.6), RATES, "smoothing",
        ),
        Method(
            "confidence_penalty", "confidence penalty", "cross-entropy minus a multiple of the entropy",
            lambda strength, _: one_step(confidence_penalty, weight=strength),
            (0.2, 0.5, 1.0, 2.0, 4.0), RATES, "weight",
        ),
        Method(
            "focal", "focal loss", "cross-entropy weighted by a power of 1 - p of the target",
            lambda strength, _: one_step(focal, gamma=strength),
            (0.5, 1.0, 2.0, 3.0, 5.0), RATES, "gamma",
        ),
        Method(
            "cot", "COT as published", "two steps, two optimizers, the complement's loss divided by K, eps = 1e-7",
            lambda *_: two_steps(Step(functools.partial(cot_kernels.complement_entropy), own_optimizer=True)),
        ),
        Method(
            "cot_exact", "COT, eps = 0", "as published but for eps",
            lambda *_: two_steps(Step(functools.partial(cot_kernels.complement_entropy, eps=0.0), own_optimizer=True)),
        ),
        Method(
            "cot_separate", "COT, own rate",
            "two steps, two optimizers; the complement's loss in nats, the second one's learning rate chosen",
            lambda strength, _: two_steps(Step(complement_nats, own_optimizer=True, rate=strength)),
            rates=RATES, strength_is="rate of the second optimizer",
            strengths_of={"sgd": NATS, "adamw": (0.01, 0.03, 0.1, 0.3, 1.0)},  # Adam's steps are of its rate's size
        ),
        Method(
            "cot_shared", "COT, weighted, shared optimizer", "two steps, one optimizer; a nat's weight chosen",
            lambda strength, _: _shared(strength, every=1), NATS, RATES, "weight of a nat",
        ),
        Method(
            "cot_fourth", "COT, weighted, every 4th batch", "the same, the second step after each fourth first one",
            lambda strength, _: _shared(strength, every=4), NATS, RATES, "weight of a nat",
        ),
        Method(
            "cce", "one-step complement cross-entropy", "cross-entropy minus weighted nats of complement entropy",
            lambda strength, _: one_step(weighted_complement_cross_entropy, weight=strength),
            NATS, RATES, "weight of a nat",
        ),
        Method(
            "cce_fourth", "one-step, every 4th batch", "the same on each fourth batch, cross-entropy on the others",
            lambda strength, _: Recipe((
                Step(
                    functools.partial(weighted_complement_cross_entropy, weight=strength),
                    every=4, otherwise=cross_entropy,
                ),
            )),
            NATS, RATES, "weight of a nat",
        ),
        Method(
            "gce", "guided complement entropy", "in place of cross-entropy, with learning rates of its own",
            lambda strength, _: one_step(cot_kernels.guided_complement_entropy, alpha=strength),
            (0.2, 0.333, 0.5), strength_is="alpha",
            rates_of={"sgd": (1.0, 3.0, 10.0, 30.0, 100.0), "adamw": (0.1, 0.3, 1.0, 3.0, 10.0)},
        ),
    )
}  # fmt: skip
