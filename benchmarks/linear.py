"""Projection and loss: the fused linear losses beside three bare products, and beside what other packages have.

``python -m benchmarks.linear --output FILE`` measures, for hidden states [N, H] and a vocabulary of K words, forward
and backward of each provider: the median time of rounds in which they take turns, as a multiple of the time of the
three matrix products that no method can do without; and the peak of the memory above inputs and weights, on the CPU
each provider in a process of its own. On a GPU the shapes are those of language models, in bf16. A provider is timed
only after its loss and gradients of a few rows have been held against float64; one that is missing costs nothing.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

import cot_kernels
from benchmarks import reports, timing
from benchmarks.arguments import at_least_one, device_argument, duration, output_file, thread_count
from benchmarks.environment import environment
from benchmarks.outcome import GPU_MINUTES, LATE, message_of
from benchmarks.progress import progress
from cot_kernels import reference

Shape: TypeAlias = tuple[int, int, int]  # rows, features, classes
Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of input, weight and target
Step: TypeAlias = Callable[[Tensor, Tensor, Tensor], object]

CPU_SHAPES: tuple[Shape, ...] = ((4096, 512, 50257),)
GPU_SHAPES: tuple[Shape, ...] = (
    (4096, 4096, 128256),  # Llama 3 8B
    (8192, 2304, 256000),  # Gemma 2 2B
    (8192, 768, 50257),  # GPT-2
)
PRODUCTS = "three products"
ROUNDS = 5
CHECKED_ROWS = 64
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def _products(input: Tensor, weight: Tensor, target: Tensor) -> None:
    """The logits, and two products with a gradient of their size."""
    with torch.no_grad():
        logits = input @ weight.t()
        input.grad, weight.grad = logits @ weight, logits.t() @ input


def _torch_chunked() -> Loss:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError("came with torch 2.13")
    options: Any = torch.nn.LinearCrossEntropyOptions()
    return lambda input, weight, target: F.linear_cross_entropy(input, weight, target, options=options)


def _liger() -> Loss:
    loss: Loss = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return loss


def _cut() -> Loss:
    loss: Loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return loss


def _of_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Loss]:
    return lambda: lambda input, weight, target: loss(F.linear(input, weight), target)


# How to get each, the loss of logits that it claims to compute, and whether it runs on a GPU only.
PROVIDERS: dict[str, tuple[Callable[[], Loss], Callable[[Tensor, Tensor], Tensor], bool]] = {
    "linear_complement_cross_entropy": (
        lambda: cot_kernels.linear_complement_cross_entropy, reference.complement_cross_entropy, False,
    ),
    "linear_complement_entropy": (
        lambda: cot_kernels.linear_complement_entropy, reference.complement_entropy, False,
    ),
    "complement_cross_entropy of the logits": (
        _of_logits(cot_kernels.complement_cross_entropy), reference.complement_cross_entropy, False,
    ),
    "F.cross_entropy of the logits": (_of_logits(F.cross_entropy), F.cross_entropy, False),
    "F.linear_cross_entropy, chunked": (_torch_chunked, F.cross_entropy, False),
    "Liger fused_linear_cross_entropy": (_liger, F.cross_entropy, True),
    "cut_cross_entropy": (_cut, F.cross_entropy, True),
}  # fmt: skip


def load(name: str, device: torch.device) -> Loss:
    """The loss, or ImportError."""
    give, _, gpu_only = PROVIDERS[name]
    if gpu_only and device.type != "cuda":
        raise ImportError("runs on a GPU only")
    return give()


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rows, features, classes = shape
    generator = torch.Generator(device).manual_seed(0)
    input = torch.randn(rows, features, generator=generator, device=device).to(dtype).requires_grad_()
    weight = torch.randn(classes, features, generator=generator, device=device) * features**-0.5
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    return input, weight.to(dtype).requires_grad_(), target


def step_of(name: str, device: torch.device) -> Step:
    if name == PRODUCTS:
        return _products
    loss = load(name, device)

    def step(input: Tensor, weight: Tensor, target: Tensor) -> None:
        input.grad = weight.grad = None
        loss(input, weight, target).backward()  # type: ignore[no-untyped-call]

    return step


def error(name: str, input: Tensor, weight: Tensor, target: Tensor) -> float:
    """The largest relative error of the loss and the two gradients of a few rows, against float64."""

    def values(loss: Loss, input: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        leaves = [each.detach().requires_grad_() for each in (input, weight)]
        value = loss(leaves[0], leaves[1], few)
        gradients = torch.autograd.grad(value, leaves)
        return tuple(each.detach().double() for each in (value, *gradients))

    few = target[:CHECKED_ROWS]
    found = values(load(name, input.device), input[:CHECKED_ROWS], weight)
    true = values(_of_logits(PROVIDERS[name][1])(), input[:CHECKED_ROWS].double(), weight.double())
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))


def cpu_peak(name: str, shape: Shape, threads: int) -> int:
    """What a forward and a backward pass add to the peak of a fresh process, the gradients included."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    step = step_of(name, device)
    step(*problem((8, *shape[1:]), torch.float32, device))  # libraries are loaded, and buffers of threads made
    tensors = problem(shape, torch.float32, device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ballast = torch.ones(max(0, before * 1024 - _resident()), dtype=torch.uint8)  # so that the peak is reached again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(*tensors)
    assert ballast[-1:].sum() <= 1
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def gpu_peak(step: Step, tensors: tuple[Tensor, Tensor, Tensor]) -> int:
    tensors[0].grad = tensors[1].grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(*tensors)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    shape: Shape, device: torch.device, threads: int, rounds: int, seconds: float, deadline: float = math.inf
) -> list[dict[str, Any]]:
    """A row for each provider: its time and memory, or why it has none. After the deadline nothing is started."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    about = dict(zip(("rows", "features", "classes"), shape, strict=True)) | {"dtype": str(dtype).split(".")[1]}
    tensors = problem(shape, dtype, device)
    rows: dict[str, dict[str, Any]] = {PRODUCTS: {"status": "ok"}}
    steps: dict[str, Step] = {PRODUCTS: _products}
    if time.monotonic() > deadline:
        return [{"provider": name, **about, "status": "skipped", "message": LATE} for name in (*rows, *PROVIDERS)]
    for name in PROVIDERS:
        if time.monotonic() > deadline:
            rows[name] = {"status": "skipped", "message": LATE}
            continue
        try:
            found = error(name, *tensors)
            wrong = not found <= TOLERANCES[dtype]
            rows[name] = {"status": "wrong" if wrong else "ok", "error": found if math.isfinite(found) else None}
            if not wrong:
                steps[name] = step_of(name, device)
                steps[name](*tensors)
        except ImportError as reason:
            rows[name] = {"status": "missing", "message": message_of(reason)}
        except Exception as reason:  # whatever another package raises, out of memory included
            rows[name] = {"status": "failed", "message": message_of(reason)}
            steps.pop(name, None)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def failed(name: str, reason: Exception) -> None:
        """A provider that raises on its second or hundredth call costs its own row alone."""
        del steps[name]
        rows[name] = {"status": "failed", "message": message_of(reason)}

    for name, step in list(steps.items()):
        try:
            if device.type == "cuda":
                rows[name]["peak_bytes"] = gpu_peak(step, tensors)
            else:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows[name]["peak_bytes"] = pool.apply(cpu_peak, (name, shape, threads))
        except Exception as reason:
            failed(name, reason)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        if turn and time.monotonic() > deadline:
            break  # with fewer samples
        for name, step in list(steps.items()):
            try:
                times[name] += timed(step, tensors, device, seconds)
            except Exception as reason:
                failed(name, reason)
                del times[name]
    if PRODUCTS not in times:
        return [{"provider": name, **about, **row} for name, row in rows.items()]
    floor = timing.quantile(times[PRODUCTS], 0.5)
    for name, taken in times.items():
        median = timing.quantile(taken, 0.5)
        rows[name] |= {"seconds": median, "times": median / floor, "samples": len(taken)}
    return [{"provider": name, **about, **row} for name, row in rows.items()]


def timed(step: Step, tensors: tuple[Tensor, Tensor, Tensor], device: torch.device, seconds: float) -> list[float]:
    if device.type == "cuda":
        return timing.device_times(lambda _: step(*tensors), 1, seconds)
    start = time.perf_counter()
    step(*tensors)
    return [time.perf_counter() - start]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=thread_count, default=2, help="of PyTorch on the CPU")
    parser.add_argument(
        "--case",
        type=at_least_one,
        nargs=3,
        action="append",
        metavar=("ROWS", "FEATURES", "CLASSES"),
        help="may be repeated",
    )
    parser.add_argument("--rounds", type=at_least_one, default=ROUNDS)
    parser.add_argument("--seconds", type=duration, default=0.2, help="of a provider in a round, on a GPU")
    parser.add_argument("--minutes", type=duration, help=f"start nothing after this long; on a GPU {GPU_MINUTES:g}")
    options = parser.parse_args()
    if any(case[2] < 2 for case in options.case or ()):
        parser.error("--case needs at least 2 classes: the complement of one is empty")
    torch.set_num_threads(options.threads)
    device: torch.device = options.device
    minutes = options.minutes if options.minutes is not None else GPU_MINUTES if device.type == "cuda" else math.inf
    deadline = time.monotonic() + 60 * minutes
    shapes = [tuple(case) for case in options.case or ()] or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    results: list[dict[str, Any]] = []
    about = environment(options.threads, options.device)
    with progress(len(shapes)) as advance:
        for shape in shapes:
            advance("{} x {} -> {}".format(*shape))
            results += measure(shape, device, options.threads, options.rounds, options.seconds, deadline)
            if options.output:
                reports.write(options.output, {"environment": about}, results)
    for row in results:
        said = row.get("message", "")
        numbers = f"{row['times']:.2f} of three products, {row['peak_bytes'] / 2**20:.0f} MiB" if "times" in row else ""
        shape = (row["rows"], row["features"], row["classes"])
        print("{} x {} -> {}".format(*shape), f"{row['provider']}: {row['status']}", numbers or said, sep="  ")


if __name__ == "__main__":
    main()
