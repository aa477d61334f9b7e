"""The loss family on a CPU, in C++ that is compiled with the package: one pass over the logits forward, one backward.

It offers what :mod:`..aten` offers, which stands in for it where the package was built without a compiler. Rows are
shared out over PyTorch's threads; a row's logits are read from memory once in either pass, and nothing of their size is
held beside them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from cot_kernels.backends import accumulation_dtype
from cot_kernels.objectives import (
    ComplementEntropyObjective,
    CrossEntropyObjective,
    GuidedComplementEntropyObjective,
    Objective,
)

try:
    from cot_kernels.backends.native import _rows
except ImportError:  # built without a compiler, or not built at all
    _rows = None  # type: ignore[assignment]

# What a forward pass hands its backward pass: the target as 64-bit integers, which are no class where the row is
# ignored, and the state of the rows.
Saved: TypeAlias = tuple[Tensor, ...]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_MOST_CLASSES = 2**31 - 1  # within a vector, classes are counted in 32 bits


def serves(logits: Tensor) -> bool:
    return _rows is not None and logits.is_cpu and logits.shape[1] <= _MOST_CLASSES


def level() -> str:
    """The kind of processor that the compiled code is for: "avx512", "avx2", "baseline", or "" where there is none."""
    return _rows.levels()[-1] if _rows is not None else ""


def _describe(objective: Objective) -> tuple[int, float, float, float]:
    if isinstance(objective, ComplementEntropyObjective):
        return 0, objective.scale, objective.eps, 0.0
    if isinstance(objective, GuidedComplementEntropyObjective):
        return 1, objective.scale, objective.eps, objective.alpha
    assert isinstance(objective, CrossEntropyObjective)
    return 2, objective.scale, 0.0, objective.weight


def _rows_of(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Any, ...]:
    """The arguments that :mod:`._rows` calls ``logits``."""
    return (
        _DTYPES[logits.dtype],
        torch.get_num_threads(),
        logits.shape,
        logits.data_ptr(),
        logits.stride(),
        target.data_ptr(),
        target.stride(),
        ignore_index,
    )


def _readable(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What an address would not tell: signs that are still to change, and other integers than of 64 bits."""
    return logits.resolve_neg() if logits.is_neg() else logits, target if target.dtype is torch.int64 else target.long()


_NO_CLASS = -1


def _marked(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """A target in range or ignored, with no class where it is ignored."""
    return target.masked_fill(target == ignore_index, _NO_CLASS) if 0 <= ignore_index < num_classes else target


def loss(
    logits: Tensor, target: Tensor, ignore_index: int, objective: Objective, reduction: str
) -> tuple[Tensor, Saved]:
    """Row losses (``reduction="none"``, the shape of the target) or their sum or mean, and what :func:`gradient` needs.

    Args:
        logits: (N, K) or (N, K, D), any strides.
        target: (N) or (N, D), integers.
    """
    logits, target = _readable(logits, target)
    dtype = accumulation_dtype(logits.dtype)
    whole = reduction == "none"
    result = logits.new_empty(target.shape if whole else (), dtype=dtype)
    state = logits.new_empty((4, *target.shape), dtype=dtype)
    _rows.loss(
        *_rows_of(logits, target, ignore_index),
        *_describe(objective),
        reduction == "mean",
        state.data_ptr(),
        result.data_ptr() if whole else 0,
        0 if whole else result.data_ptr(),
    )
    return result, (_marked(target, logits.shape[1], ignore_index), state)


def gradient(logits: Tensor, saved: Saved, upstream: Tensor) -> Tensor:
    """``upstream * dl/dz`` in the dtype and layout of the logits; ``upstream`` is one number, or one a row."""
    target, state = saved
    dtype = accumulation_dtype(logits.dtype)
    if not (target.dtype is torch.int64 and state.dtype is upstream.dtype is dtype):
        raise RuntimeError(
            f"a backward pass needs target, state and upstream gradient in {torch.int64}, {dtype}, {dtype}, got "
            f"{target.dtype}, {state.dtype}, {upstream.dtype}: hooks on saved tensors must give back what they got"
        )
    logits, upstream, state = logits.resolve_neg(), upstream.resolve_neg(), state.contiguous()
    grad = torch.empty_like(logits)
    _rows.gradient(
        *_rows_of(logits, target, _NO_CLASS),
        state.data_ptr(),
        upstream.data_ptr(),
        upstream.stride(),
        grad.data_ptr(),
        grad.stride(),
    )
    return grad


def statistics(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """target_logit, complement_lse and negentropy in the shape of the target, 0 where ignored, and the saved rows."""
    logits, target = _readable(logits, target)
    dtype = accumulation_dtype(logits.dtype)
    values = logits.new_empty((3, *target.shape), dtype=dtype)
    state = logits.new_empty((3, *target.shape), dtype=dtype)
    _rows.statistics(*_rows_of(logits, target, ignore_index), values.data_ptr(), state.data_ptr())
    target_logit, complement_lse, negentropy = (value.clone() for value in values.unbind())  # the caller's to change
    return target_logit, complement_lse, negentropy, (_marked(target, logits.shape[1], ignore_index), state)


def statistics_gradient(
    logits: Tensor, saved: Saved, d_target_logit: Tensor, d_complement_lse: Tensor, d_negentropy: Tensor
) -> Tensor:
    """The gradient of anything built on :func:`statistics`, from what reaches its three outputs."""
    target, (shift, total, mean) = saved[0], saved[1].unbind()
    slope = d_negentropy / total
    offset = d_complement_lse / total - slope * mean
    state = torch.stack((shift, slope, offset, d_target_logit))
    return gradient(logits, (target, state), state.new_ones(()))


def value_and_gradient(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    objective: Objective,
    upstream: Tensor | None,
    wanted: bool,
) -> Tensor:
    """Loss, cross-entropy and negentropy of rows, (3, N). **Overwrites the logits**, where wanted with the gradient.

    Args:
        logits: (N, K).
        target: (N), integers.
        upstream: (N), the derivative of a scalar by each row's loss; None where it is 1.
    """
    target = target.long()
    values = logits.new_empty((3, *target.shape), dtype=accumulation_dtype(logits.dtype))
    upstream = None if upstream is None else upstream.resolve_neg()
    _rows.value_and_gradient(
        *_rows_of(logits, target, ignore_index),
        *_describe(objective),
        *((0, 0) if upstream is None else (upstream.data_ptr(), upstream.stride(0))),
        wanted,
        values.data_ptr(),
    )
    return values


# The same by rows, for the registered operators: what is handed on is one tensor, whose shape follows from that of the
# target alone.

LOSS_STATE = 4  # m, A, B, f_g
STATISTICS_STATE = 3  # m, s, t / s


def row_loss(logits: Tensor, target: Tensor, ignore_index: int, objective: Objective) -> tuple[Tensor, Tensor]:
    """Row losses in the shape of the target, and the state, [LOSS_STATE, *target.shape]."""
    losses, (_, state) = loss(logits, target, ignore_index, objective, "none")
    return losses, state


def row_loss_gradient(logits: Tensor, target: Tensor, ignore_index: int, state: Tensor, upstream: Tensor) -> Tensor:
    saved = _marked(target.long(), logits.shape[1], ignore_index), state.contiguous()
    return gradient(logits, saved, upstream)


def row_statistics(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """target_logit, complement_lse and negentropy in the shape of the target, and [STATISTICS_STATE, *target.shape]."""
    *values, (_, state) = statistics(logits, target, ignore_index)
    return *values, state  # type: ignore[return-value]


def row_statistics_gradient(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    state: Tensor,
    d_target_logit: Tensor,
    d_complement_lse: Tensor,
    d_negentropy: Tensor,
) -> Tensor:
    upstreams = (d_target_logit, d_complement_lse, d_negentropy)
    return statistics_gradient(logits, (_marked(target.long(), logits.shape[1], ignore_index), state), *upstreams)
