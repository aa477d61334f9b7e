"""What is measured of a trained network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from cot_kernels import complement_statistics

from .data import IGNORED, Part
from .tasks import Task

BATCH = 500
BINS = 15

MEASURES = ("score", "nll", "calibration_error", "complement_entropy", "diverged")
UNDER_ATTACK = ("score_attack_1", "score_attack_2")

Figures = dict[str, float]


def evaluate(network: nn.Module, part: Part, task: Task, attacked: bool) -> Figures:
    """Score, negative log-likelihood, calibration error and complement entropy; scores under attack if asked for.

    A network whose logits are not finite says nothing: its logits count as equal.
    """
    logits, target = predict(network, part)
    finite = bool(logits.isfinite().all())
    logits = logits if finite else torch.zeros_like(logits)
    figures = {
        "score": score(logits, target, task),
        "nll": F.cross_entropy(logits, target).item(),
        "calibration_error": multiclass_calibration_error(logits.softmax(dim=1), target, task.classes, BINS).item(),
        "complement_entropy": -complement_statistics(logits, target).negentropy.mean().item(),
        "diverged": float(not finite),
    }
    if attacked:
        for name, strength in zip(UNDER_ATTACK, task.attacks, strict=True):
            logits, target = predict(network, part, attack=strength)
            figures[name] = score(logits.nan_to_num(), target, task)
    return figures


def score(logits: Tensor, target: Tensor, task: Task) -> float:
    """The share of right answers; or the F1 over all classes but the first, which is none of them, pooled."""
    if task.score == "accuracy":
        return multiclass_accuracy(logits, target, task.classes, average="micro").item()
    found = logits.argmax(dim=1)
    right = ((found == target) & (target > 0)).sum().item()
    named = (found > 0).sum().item() + (target > 0).sum().item()
    return 2 * right / named if named else 0.0


def predict(network: nn.Module, part: Part, attack: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits (M, K) in float64 and classes (M) of the examples that are not ignored.

    With a strength of attack e, of inputs x + e sign(d cross-entropy / dx) (the fast gradient sign method; Goodfellow
    et al., ICLR 2015, arXiv 1412.6572, section 4).
    """
    found = []
    for start in range(0, part.size, BATCH):
        batch = part.at(slice(start, start + BATCH))
        if attack:
            batch = _attacked(network, batch, attack)
        with torch.no_grad():
            found.append(network(*batch.inputs).flatten(0, -2).double())
    logits, target = torch.cat(found), part.target.flatten()
    valid = target != IGNORED
    return logits[valid], target[valid]


def _attacked(network: nn.Module, batch: Part, strength: float) -> Part:
    clean = batch.inputs[0].detach().requires_grad_()
    logits = network(clean, *batch.inputs[1:])
    loss = F.cross_entropy(logits.flatten(0, -2), batch.target.flatten(), ignore_index=IGNORED)
    (gradient,) = torch.autograd.grad(loss, clean)
    return Part(((clean + strength * gradient.sign()).detach(), *batch.inputs[1:]), batch.target)
