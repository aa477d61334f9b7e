"""Arithmetic on addresses; nothing here checks what they point at.

``logits`` stands for: dtype (0 float32, 1 float64, 2 float16, 3 bfloat16), threads, N, K, D, address and strides along
N, K and D, then the target's address and strides along N and D (64-bit integers), and ignore_index. ``objective`` for
its kind (0 complement entropy, 1 guided, 2 cross-entropy), scale, eps, and alpha or the weight of S. Numbers of rows
have the dtype that the logits are computed in.
"""

def loss(*logits_objective_mean_state_losses_total: float) -> None:
    """State [4, N D] (m, A, B, f_g); the row losses [N D] where an address is given for them, and so their sum or mean.

    Raises:
        IndexError: a target is out of range.
    """

def statistics(*logits_values_state: float) -> None:
    """Values [3, N D] (z_g, L, S) and state [3, N D] (m, s, t / s).

    Raises:
        IndexError: a target is out of range.
    """

def gradient(*logits_state_upstream_grad: float) -> None:
    """The gradient (address and three strides) from a state of :func:`loss` and what reaches each row (two strides)."""

def value_and_gradient(*logits_objective_upstream_wanted_values: float) -> None:
    """Values [3, N] (loss, cross-entropy, S) of (N, K) logits and, where wanted, their gradient in their place.

    Raises:
        IndexError: a target is out of range.
    """

def levels() -> tuple[str, ...]:
    """The kinds of processor this one can pass for, the best one last: that is taken when the module is loaded."""

def use(level: int) -> None:
    """Take another level, by its place in :func:`levels`, to test or to measure it."""
