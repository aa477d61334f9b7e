"""Where logits and targets are found: in pairs `(x, y)`, and in the mappings that Hugging Face collators make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Targets of this value belong to no class: padding, special tokens, the second half of a word."""

HOW_TO_SAY_WHERE = (
    "pass logits=function, called as function(module, batch) -> (logits, targets), or override complement_logits(batch)"
)


def logits_and_targets(module: Callable[..., Any], batch: Any) -> tuple[Tensor, Tensor]:
    """Runs `module` on a batch; the logits, with their graph, and the targets, shaped for a loss.

    Two kinds of batch are understood:

    - a pair `(x, y)`: `module(x)` gives logits (N, K) or (N, K, d1, ...), `y` the targets (N) or (N, d1, ...);
    - a mapping with "labels": `module(**rest)` gives logits, or an output that holds them as `logits`. They are
      (..., K), classes last, and are flattened to (M, K), the labels (...) to (M); labels of -100 are ignored.

    Raises:
        TypeError: the batch is of neither kind, or the output holds no logits.
        ValueError: logits and targets do not fit together.
    """
    check_batch(batch)
    if isinstance(batch, Mapping):
        output = module(**{name: value for name, value in batch.items() if name != "labels"})
        logits, targets = _logits_of(output), batch["labels"]
        if logits.shape[:-1] != targets.shape:
            raise ValueError(
                f'"labels" of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}, '
                f"which ask for {tuple(logits.shape[:-1])}: {HOW_TO_SAY_WHERE}"
            )
        return logits.flatten(0, -2), targets.flatten()
    x, y = batch
    logits = _logits_of(module(x))
    if y.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"targets of shape {tuple(y.shape)} do not fit logits of shape {tuple(logits.shape)}, "
            f"which ask for {tuple(logits.shape[:1] + logits.shape[2:])}: {HOW_TO_SAY_WHERE}"
        )
    return logits, y


def causal_lm_logits_and_targets(module: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """For causal language models: each position's logits with the label of the next, (M, K) and (M).

    Raises:
        KeyError: the batch has no "labels".
    """
    output = module(**{name: value for name, value in batch.items() if name != "labels"})
    return _logits_of(output)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()


def check_batch(batch: Any) -> None:
    """Whether `logits_and_targets` understands a batch.

    Raises:
        TypeError: it does not.
    """
    if not (isinstance(batch, Mapping) and "labels" in batch) and not _is_pair(batch):
        raise TypeError(
            f'a batch must be a pair (x, y) or a mapping with "labels", got {_described(batch)}: {HOW_TO_SAY_WHERE}'
        )


def target_shares(batches: Sequence[Any]) -> Sequence[Tensor | float]:
    """The share of each batch in the valid targets of all; the same for all where targets are not found."""
    if len(batches) == 1:
        return [1.0]
    counts = [count_targets(batch) for batch in batches]
    found = [count for count in counts if count is not None]
    if len(found) < len(counts):
        return [1 / len(batches)] * len(batches)
    return (torch.stack(found) / torch.stack(found).sum()).unbind()


def count_targets(batch: Any) -> Tensor | None:
    targets = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if _is_pair(batch) else None
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    return (targets != IGNORE_INDEX).sum()


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor)


def _logits_of(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not torch.is_floating_point(logits):
        raise TypeError(
            f"calling the module must give logits of shape (N, K, ...), or an output that holds them as logits, "
            f"got {_described(output)}: {HOW_TO_SAY_WHERE}"
        )
    return logits


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {sorted(map(str, value))}"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(each).__name__ for each in value)}"
    return f"a {type(value).__name__}"
