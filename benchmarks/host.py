"""What a call costs the host: the floor under small problems on a GPU, where the device waits for its launches.

``python -m benchmarks.host --output FILE`` measures, by the host's clock and without waiting for the device, the
forward pass and both passes of the losses, of F.cross_entropy, of the published operations and of an autograd Function
in Python that computes nothing. Medians of rounds in which they take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import cot_kernels
from benchmarks import reports, timing
from benchmarks.arguments import device_argument, duration, output_file
from benchmarks.cases import DTYPES, Case
from benchmarks.environment import environment
from benchmarks.progress import progress
from benchmarks.providers import Loss
from cot_kernels import reference

PROBLEMS = ((Case(128, 10), "fp32"), (Case(256, 1000), "bf16"))
NOTHING = "a Function that computes nothing"
ROUNDS = 9


class _Nothing(torch.autograd.Function):
    """Allocates what a loss returns, and hands on what one saves."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, _ = ctx.saved_tensors
        return torch.empty_like(logits), None


LOSSES: dict[str, Loss] = {
    "complement_entropy": cot_kernels.complement_entropy,
    "cross_entropy": cot_kernels.cross_entropy,
    "F.cross_entropy": F.cross_entropy,
    NOTHING: _Nothing.apply,
    "published": reference.complement_entropy,
}


def measure(case: Case, dtype: str, device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds of each loss: forward, and both passes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case.shape, generator=generator).to(device, DTYPES[dtype]).requires_grad_()
    target = torch.randint(case.classes, case.target_shape, generator=generator).to(device)

    def both(loss: Loss) -> timing.Step:
        return lambda _: torch.autograd.grad(loss(logits, target), logits)

    def forward(loss: Loss) -> timing.Step:
        return lambda _: loss(logits, target)

    found: dict[str, dict[str, float]] = {name: {} for name in LOSSES}
    for mode, make in (("forward", forward), ("both", both)):
        times = timing.host_times({name: make(loss) for name, loss in LOSSES.items()}, 1, ROUNDS, seconds)
        for name, taken in times.items():
            found[name][mode] = round(timing.quantile(taken, 0.5) * 1e6, 2)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=duration, default=0.5, help="of a loss and a mode")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    with progress(len(PROBLEMS)) as advance:
        for case, dtype in PROBLEMS:
            advance(f"{case.name} {dtype}")
            for name, taken in measure(case, dtype, options.device, options.seconds).items():
                results.append({"rows": case.rows, "classes": case.classes, "dtype": dtype, "loss": name, **taken})
    if options.output:
        reports.write(options.output, {"environment": environment(1, options.device)}, results)
    for row in results:
        print(f"{row['rows']} x {row['classes']} {row['dtype']}  {row['loss']}: {row['forward']} and {row['both']} us")


if __name__ == "__main__":
    main()
