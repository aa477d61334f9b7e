"""Where the arithmetic happens: Triton on GPUs, C++ on CPUs, ATen on any device. All offer the same functions."""

import torch

# A logit at or below it has probability zero, as has a masked one, for which 0 * -inf would be NaN.
FLOOR = -1e30


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and exponentials of logits of a dtype are computed in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32
