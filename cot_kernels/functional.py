"""The losses as functions of ``(input, target)``, in the manner of :mod:`torch.nn.functional`.

Shapes, dtypes and errors, common to all of them:

- ``input``: logits of shape (K), (N, K) or (N, K, d1, ...), float64, float32, float16 or bfloat16, any strides. Never
  modified.
- ``target``: class indices in [0, K), any integer dtype, of shape (), (N) or (N, d1, ...). Rows whose target is
  ``ignore_index`` have loss 0 and gradient 0 and are not counted by the mean. A target out of range raises IndexError
  on the CPU; on a GPU, where looking would wait for the device, the loss and the gradient of its row are NaN.
- The loss is float32 (float64 for float64 input), whatever the precision of the input: half-precision logits are
  upcast as they are read. The gradient has the dtype of ``input``.
- Two classes draw a warning: the complement is then a single class, whose entropy is 0. Of the complement's losses
  nothing is left but what ``eps`` makes of very confident rows, of sums with cross-entropy that alone.
- A logit at or below -1e30 counts as -inf: its class is absent.
- ``eps`` is 0 or between 1e-30 and 1e30, ``alpha`` between 0 and 1e30, ``gamma`` at most 1e30 in magnitude.
- ``reduction``: ``"mean"`` over the rows that are not ignored, ``"sum"``, or ``"none"`` (shape of ``target``). The mean
  of no rows is NaN, its gradient zero.
- TypeError or ValueError for anything else, before any arithmetic.

Notation: ``p = softmax(input)``, ``g`` the target, ``q_j = p_j / (1 - p_g)`` for ``j != g``, and the complement entropy
``H = -sum_{j != g} q_j ln q_j`` in nats, between 0 and ``ln(K - 1)``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from cot_kernels import dispatch
from cot_kernels.checks import (
    OF_SUM,
    check_eps,
    check_finite,
    check_nonnegative,
    check_rows,
    scale_of,
    warn_of_two_classes,
)
from cot_kernels.objectives import (
    ComplementEntropyObjective,
    CrossEntropyObjective,
    GuidedComplementEntropyObjective,
)


class ComplementStatistics(NamedTuple):
    """Three numbers a row, from which every loss of the family follows."""

    target_logit: Tensor
    """``z_g``."""
    complement_lse: Tensor
    """``L = ln sum_{j != g} exp(z_j)``; the log-odds of the target are ``z_g - L``."""
    negentropy: Tensor
    """``S = sum_{j != g} q_j ln q_j``, minus the complement entropy in nats."""


def complement_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-7,
    normalization: str = "classes",
) -> Tensor:
    r"""Complement entropy, the second objective of complement objective training. It is **never positive**.

    .. math:: \ell = \frac{u (S + \ln u)}{K}, \qquad u = \frac{1 - p_g}{1 - p_g + \varepsilon}, \qquad S = -H

    Minimising it flattens the distribution over the wrong classes. Its minimum, ``-ln(K - 1) / K``, is reached when
    all of them are equally likely, and 0 when one wrong class holds all of their probability. For a positive number to
    log, take ``-complement_statistics(input, target).negentropy``, the complement entropy in nats.

    Args:
        input: logits, (K), (N, K) or (N, K, d1, ...).
        target: class indices, (), (N) or (N, d1, ...).
        ignore_index: target value of rows that are left out.
        reduction: "mean", "sum" or "none".
        eps: the guard in the published denominator ``1 - p_g + eps``. The default gives the published value; the guard
            also fades the loss out as ``p_g -> 1`` and lowers very confident targets. ``eps=0`` is the formula of the
            paper without the guard, ``S / K``, stable for every input.
        normalization: "classes" divides by K (the authors' code), "complement" by K - 1 (the paper), "entropy" by
            ln(K - 1), so that the range is [-1, 0], "none" by 1.

    Raises:
        TypeError, ValueError: see the head of this module. K must be at least 2, and 3 with normalization="entropy".

    Source: Chen et al., Complement Objective Training, ICLR 2019 (arXiv 1903.01182).

    Example:
        >>> logits = torch.tensor([[5.0, 1.0, 1.0, 1.0]], requires_grad=True)
        >>> complement_entropy(logits, torch.tensor([0]), eps=0.0)  # wrong classes equally likely: -ln(3) / 4
        tensor(-0.2747, grad_fn=<RowLossBackward>)
    """
    num_classes = check_rows(input, target, ignore_index, reduction)
    check_eps(eps)
    warn_of_two_classes("complement_entropy", num_classes)
    objective = ComplementEntropyObjective(scale_of(normalization, num_classes), float(eps))
    return dispatch.row_loss(input, target, ignore_index, objective, reduction)


def guided_complement_entropy(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 1 / 3,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-7,
) -> Tensor:
    r"""Guided complement entropy: complement entropy weighted by a power of the target probability. Never positive.

    .. math:: \ell = \frac{(p_g + \varepsilon)^\alpha \, u (S + \ln u)}{\ln K}

    A one-step loss that replaces cross-entropy: it raises ``p_g`` and flattens the wrong classes at once.

    Args:
        input: logits, (K), (N, K) or (N, K, d1, ...).
        target: class indices, (), (N) or (N, d1, ...).
        alpha: exponent of the guiding factor, >= 0; 0 leaves the complement entropy alone.
        ignore_index: target value of rows that are left out.
        reduction: "mean", "sum" or "none".
        eps: the published guard, as in :func:`complement_entropy`.

    Raises:
        TypeError, ValueError: see the head of this module.

    Source: Chen et al., Improving Adversarial Robustness via Guided Complement Entropy, ICCV 2019 (arXiv 1903.09799).
    """
    num_classes = check_rows(input, target, ignore_index, reduction)
    check_eps(eps)
    check_nonnegative("alpha", alpha)
    warn_of_two_classes("guided_complement_entropy", num_classes)
    objective = GuidedComplementEntropyObjective(1 / math.log(num_classes), float(eps), float(alpha))
    return dispatch.row_loss(input, target, ignore_index, objective, reduction)


def complement_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = -1.0,
    normalization: str = "complement",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy and complement entropy in one loss, one forward and one backward pass.

    .. math:: \ell = -\ln p_g + \frac{\gamma}{K - 1} H

    Args:
        input: logits, (K), (N, K) or (N, K, d1, ...).
        target: class indices, (), (N) or (N, d1, ...).
        gamma: weight of the complement entropy; negative values, as published, flatten the wrong classes.
        normalization: divisor of the complement entropy: "complement" K - 1 (the paper), "classes" K, "entropy"
            ln(K - 1), or "none": ``-gamma`` is then the weight of one nat and means the same at every K.
            docs/evidence.md recommends 0.5; the defaults are as published.
        ignore_index: target value of rows that are left out.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError, ValueError: see the head of this module.

    Source: Kim et al., Imbalanced Image Classification with Complement Cross Entropy, 2021 (arXiv 2009.02189).
    """
    num_classes = check_rows(input, target, ignore_index, reduction)
    check_finite("gamma", gamma)
    objective = CrossEntropyObjective(1.0, -float(gamma) * scale_of(normalization, num_classes))
    if gamma != 0:
        warn_of_two_classes("complement_cross_entropy", num_classes, OF_SUM)
    return dispatch.row_loss(input, target, ignore_index, objective, reduction)


def cross_entropy(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    r"""Cross-entropy with class indices, ``-ln p_g = softplus(L - z_g)``.

    For logits above -1e30 equal to :func:`torch.nn.functional.cross_entropy`, and accurate where that rounds to 0:
    nothing cancels as ``p_g -> 1``.

    Args:
        input: logits, (K), (N, K) or (N, K, d1, ...), K >= 2.
        target: class indices, (), (N) or (N, d1, ...).
        ignore_index: target value of rows that are left out.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError, ValueError: see the head of this module.
    """
    check_rows(input, target, ignore_index, reduction)
    return dispatch.row_loss(input, target, ignore_index, CrossEntropyObjective(1.0, 0.0), reduction)


def complement_statistics(input: Tensor, target: Tensor, *, ignore_index: int = -100) -> ComplementStatistics:
    r"""``(z_g, L, S)`` for each row: the statistics from which the losses are made, differentiable.

    Write your own loss on them in plain PyTorch; its gradient costs one pass over the logits:

    .. math:: \frac{\partial \ell}{\partial z_j} = q_j \left( f_L + f_S ((z_j - L) - S) \right), \quad j \ne g,
              \qquad \frac{\partial \ell}{\partial z_g} = f_g

    Args:
        input: logits, (K), (N, K) or (N, K, d1, ...).
        target: class indices, (), (N) or (N, d1, ...).
        ignore_index: target value of rows that are left out: their statistics are 0 and pass no gradient on.

    Returns:
        Three tensors of the shape of ``target``, float32 (float64 for float64 input). Where every other class is at
        -inf, the complement is empty: L is -inf and S is 0.

    Raises:
        TypeError, ValueError: see the head of this module.

    Example:
        >>> stats = complement_statistics(torch.tensor([[5.0, 1.0, 1.0, 1.0]]), torch.tensor([0]))
        >>> -stats.negentropy  # complement entropy in nats: ln 3
        tensor([1.0986])
    """
    check_rows(input, target, ignore_index, "none")
    return ComplementStatistics(*dispatch.statistics(input, target, ignore_index))
