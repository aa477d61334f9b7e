"""What a call costs by the way it takes: the autograd Function of eager mode, the registered operator, and compiled.

``python -m benchmarks.dispatch --output FILE`` measures complement_entropy forward and backward on this CPU, as
:mod:`.cpu` does: medians of rounds in one process.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cot_kernels
from benchmarks.cpu import Loss, run
from cot_kernels import operators
from cot_kernels.objectives import ComplementEntropyObjective

CASES = ((128, 10, 200), (256, 1000, 40), (1024, 1000, 15), (512, 32000, 3))


def by_operator(input: Tensor, target: Tensor) -> Tensor:
    return operators.loss(input, target, -100, ComplementEntropyObjective(1 / input.shape[1], 1e-7), "mean")


PROVIDERS: dict[str, Loss] = {
    "eager": cot_kernels.complement_entropy,
    "operator": by_operator,
    "compiled": torch.compile(cot_kernels.complement_entropy, fullgraph=True, dynamic=False),
}

if __name__ == "__main__":
    title = "forward + backward: times faster than eager mode (medians)"
    run(__doc__ or "", title, CASES, PROVIDERS)
