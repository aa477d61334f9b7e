"""Arithmetic on addresses; nothing here checks what they point at.

``logits`` stands for: dtype (0 float32, 1 float64, 2 float16, 3 bfloat16), threads, shape (N, K) or (N, K, D), address
and strides; address and strides of the target (64-bit integers); and ignore_index. ``objective`` for its kind (0
complement entropy, 1 guided, 2 cross-entropy), scale, eps, and alpha or the weight of S. Numbers of rows have the dtype
that the logits are computed in; the upstream has an address and strides, none for a number alone.
"""

from typing import Any

def loss(*logits_objective_mean_state_losses_total: Any) -> None:
    """State [4, N D] (m, A, B, f_g); the row losses [N D] where an address is given for them, and so their sum or mean.

    Raises:
        IndexError: a target is out of range.
    """

def statistics(*logits_values_state: Any) -> None:
    """Values [3, N D] (z_g, L, S) and state [3, N D] (m, s, t / s).

    Raises:
        IndexError: a target is out of range.
    """

def gradient(*logits_state_upstream_grad: Any) -> None:
    """The gradient (address and strides) from a state of :func:`loss` and what reaches each row."""

def value_and_gradient(*logits_objective_upstream_wanted_values: Any) -> None:
    """Values [3, N] (loss, cross-entropy, S) of (N, K) logits and, where wanted, their gradient in their place.

    Raises:
        IndexError: a target is out of range.
    """

def levels() -> tuple[str, ...]:
    """The kinds of processor this one can pass for, the best one last: that is taken when the module is loaded."""

def use(level: int) -> None:
    """Take another level, by its place in :func:`levels`, to test or to measure it."""
