"""Where logits and targets are found: in pairs `(x, y)`, and in the mappings that Hugging Face collators make."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Targets of this value belong to no class: padding, special tokens, the second half of a word."""

HOW_TO_SAY_WHERE = (
    "pass logits=function, called as function(module, batch) -> (logits, targets), or override complement_logits(batch)"
)


def logits_and_targets(
    module: Callable[..., Any], batch: Any, *, mend: str = HOW_TO_SAY_WHERE
) -> tuple[Tensor, Tensor]:
    """Runs `module` on a batch; the logits, with their graph, and the targets, shaped for a loss.

    Two kinds of batch are understood:

    - a pair `(x, y)`: `module(x)` gives logits (N, K) or (N, K, d1, ...), `y` the targets (N) or (N, d1, ...);
    - a mapping with "labels": `module(**rest)` gives logits, or an output that holds them as `logits`. They are
      (..., K), classes last, and are flattened to (M, K), the labels (...) to (M); labels of -100 are ignored.

    `mend` ends the messages of errors: what the caller can do where a batch is of another kind.

    Raises:
        TypeError: the batch is of neither kind, `module` asks for other arguments, its output holds no logits, or
            "labels" are not class indices.
        ValueError: logits and targets do not fit together.
    """
    if not (isinstance(batch, Mapping) and "labels" in batch) and not _is_pair(batch):
        raise TypeError(f'a batch must be a pair (x, y) or a mapping with "labels", got {described(batch)}: {mend}')
    if isinstance(batch, Mapping):
        return _of_mapping(module, batch, mend)
    x, y = batch
    logits = _logits_of(_called(module, mend, x), mend)
    asked = logits.shape[:1] + logits.shape[2:]
    if y.shape == logits.shape != asked:
        raise ValueError(
            f"targets of shape {tuple(y.shape)}, that of the logits, are class probabilities or one-hot (of Mixup, for "
            "example), and class indices are wanted: return these, for example y.argmax(1), from logits=lambda module, "
            "batch: (module(batch[0]), batch[1].argmax(1)) or from complement_logits"
        )
    if y.shape != asked:
        raise ValueError(
            f"targets of shape {tuple(y.shape)} do not fit logits of shape {tuple(logits.shape)}, "
            f"which ask for {tuple(asked)}: {mend}"
        )
    return logits, y


def _of_mapping(module: Callable[..., Any], batch: Mapping[str, Any], mend: str) -> tuple[Tensor, Tensor]:
    output = _called(module, mend, **{name: value for name, value in batch.items() if name != "labels"})
    logits, targets = _logits_of(output, mend), batch["labels"]
    if targets.is_floating_point() or targets.shape == logits.shape:
        raise TypeError(
            f'"labels" must be class indices, an integer Tensor of shape {tuple(logits.shape[:-1])} for logits of '
            f"shape {tuple(logits.shape)}, got {described(targets)}: multi-label problems, regression and soft labels "
            "are not supported; of one-hot labels take labels.argmax(-1)"
        )
    if logits.shape[:-1] != targets.shape:
        images = logits.dim() > 3 or targets.shape == logits.shape[:1] + logits.shape[2:]
        classes = ", classes last" if images else ""
        raise ValueError(
            f'"labels" of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}, '
            f"which ask for {tuple(logits.shape[:-1])}{classes}: {mend}"
        )
    return logits.flatten(0, -2), targets.flatten()


def causal_lm_logits_and_targets(
    module: Callable[..., Any], batch: Mapping[str, Any], *, mend: str = HOW_TO_SAY_WHERE
) -> tuple[Tensor, Tensor]:
    """For causal language models: each position's logits with the label of the next, (M, K) and (M).

    `mend` ends the messages of errors, as in `logits_and_targets`.

    Raises:
        TypeError: the batch is no mapping with "labels".
    """
    if not (isinstance(batch, Mapping) and "labels" in batch):
        raise TypeError(f'a batch must be a mapping with "labels", got {described(batch)}: {mend}')
    output = _called(module, mend, **{name: value for name, value in batch.items() if name != "labels"})
    return _logits_of(output, mend)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()


def count_valid(targets: Tensor, logits: Tensor) -> Tensor:
    """How many targets there are to learn from; class probabilities count as their rows."""
    if targets.is_floating_point():
        return torch.tensor(logits.numel() // logits.shape[min(1, logits.dim() - 1)], device=logits.device)
    return (targets != IGNORE_INDEX).sum()


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor)


def _called(module: Callable[..., Any], mend: str, /, *args: Any, **kwargs: Any) -> Any:
    try:
        return module(*args, **kwargs)
    except TypeError as error:
        forward = getattr(module, "forward", module)
        try:
            inspect.signature(forward).bind(*args, **kwargs)
        except TypeError as mismatch:
            given = "x of the pair (x, y)" if args else f"{sorted(kwargs)} of the batch"
            raise TypeError(
                f"forward of {type(module).__name__} cannot be called with {given} alone ({mismatch}): {mend}"
            ) from error
        raise


def _logits_of(output: Any, mend: str) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not torch.is_floating_point(logits):
        raise TypeError(
            f"calling the module must give logits of shape (N, K, ...), or an output that holds them as logits, "
            f"got {described(output)}: {mend}"
        )
    return logits


def described(value: Any) -> str:
    """For error messages: of what kind, shape or content a value is."""
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {sorted(map(str, value))}"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(each).__name__ for each in value)}"
    return f"a {type(value).__name__}"
