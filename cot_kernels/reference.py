"""The published losses, operation by operation: the oracle of the tests.

Nothing here is fused, stabilised or fast. Each function reads like its paper, in the dtype it is given, on any device;
evaluated in float64 it is the truth that the kernels are held against. In float32 ``1 - p_g`` cancels on confident
rows, which is why the kernels do not compute the losses this way.

Shapes as in :func:`torch.nn.functional.cross_entropy`: ``input`` (N, K) or (N, K, d1, ...), ``target`` (N) or
(N, d1, ...) of integers in [0, K).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean()
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _complement_terms(input: Tensor, target: Tensor, eps: float, log_eps: float) -> tuple[Tensor, Tensor]:
    """p_g, and sum_{j != g} q_j log q_j with q_j = p_j / (1 - p_g + eps)."""
    index = target.long().unsqueeze(1)
    probabilities = torch.softmax(input, dim=1)
    target_probability = probabilities.gather(1, index)
    complement = probabilities / ((1 - target_probability) + eps)
    log_complement = torch.log(complement + log_eps)
    mask = torch.ones_like(input).scatter(1, index, 0.0)
    return target_probability.squeeze(1), (complement * log_complement * mask).sum(dim=1)


def complement_entropy(
    input: Tensor, target: Tensor, *, reduction: str = "mean", eps: float = 1e-7, log_eps: float = 1e-10
) -> Tensor:
    """``1/K sum_{j != g} q_j log(q_j + log_eps)`` with ``q_j = p_j / (1 - p_g + eps)``.

    Chen et al., Complement Objective Training, ICLR 2019 (arXiv 1903.01182), divided by the number of classes K and
    with the two guards of the published code.
    """
    _, terms = _complement_terms(input, target, eps, log_eps)
    return _reduce(terms / input.shape[1], reduction)


def guided_complement_entropy(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 1 / 3,
    reduction: str = "mean",
    eps: float = 1e-7,
    log_eps: float = 1e-10,
) -> Tensor:
    """``(p_g + eps)^alpha / ln K * sum_{j != g} q_j log(q_j + log_eps)``.

    Chen et al., Improving Adversarial Robustness via Guided Complement Entropy, ICCV 2019 (arXiv 1903.09799).
    """
    target_probability, terms = _complement_terms(input, target, eps, log_eps)
    return _reduce((target_probability + eps) ** alpha * terms / math.log(input.shape[1]), reduction)


def complement_cross_entropy(
    input: Tensor, target: Tensor, *, gamma: float = -1.0, reduction: str = "mean", log_eps: float = 1e-10
) -> Tensor:
    """``-log p_g + gamma / (K - 1) * H``, ``H = -sum_{j != g} q_j log(q_j + log_eps)``, ``q_j = p_j / (1 - p_g)``.

    Kim et al., Imbalanced Image Classification with Complement Cross Entropy, 2021 (arXiv 2009.02189).
    """
    target_probability, terms = _complement_terms(input, target, 0.0, log_eps)
    return _reduce(-torch.log(target_probability) - gamma / (input.shape[1] - 1) * terms, reduction)
