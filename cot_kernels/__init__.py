"""Fused complement-entropy losses for PyTorch: complement objective training and its family.

The complement entropy is a loss that is never positive: it lies in [-ln(K - 1) / K, 0] for K classes, and training
drives it down. See :mod:`cot_kernels.functional` for the formulas.
"""

from cot_kernels import reference
from cot_kernels.functional import (
    ComplementStatistics,
    complement_cross_entropy,
    complement_entropy,
    complement_statistics,
    cross_entropy,
    guided_complement_entropy,
)
from cot_kernels.linear import LinearLoss, linear_complement_cross_entropy, linear_complement_entropy
from cot_kernels.modules import (
    ComplementCrossEntropy,
    ComplementEntropy,
    GuidedComplementEntropy,
    LinearComplementCrossEntropy,
    LinearComplementEntropy,
)

__version__ = "0.1.0"

__all__ = [
    "ComplementCrossEntropy",
    "ComplementEntropy",
    "ComplementStatistics",
    "GuidedComplementEntropy",
    "LinearComplementCrossEntropy",
    "LinearComplementEntropy",
    "LinearLoss",
    "complement_cross_entropy",
    "complement_entropy",
    "complement_statistics",
    "cross_entropy",
    "guided_complement_entropy",
    "linear_complement_cross_entropy",
    "linear_complement_entropy",
    "reference",
]
