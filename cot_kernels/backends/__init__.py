"""Where the arithmetic happens: ATen for any device, Triton for GPUs. Both offer the same functions."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and exponentials of logits of a dtype are computed in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32
