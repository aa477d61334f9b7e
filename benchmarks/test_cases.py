"""The suite's cases under pytest-benchmark: ``pytest benchmarks/test_cases.py``, on the GPU where there is one.

For its comparisons, statistics and saved runs (``--benchmark-autosave``, ``--benchmark-compare``). Forward and backward
together, in bf16 on a GPU and float32 on the CPU, with as many threads as the suite; compiled providers are left to
``python -m benchmarks``. Here providers do not take turns: what else the machine does falls on some of them, and only
on a quiet machine do the figures compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import correctness, runner, timing
from benchmarks.arguments import THREADS
from benchmarks.cases import GPU_PARTS, PARTS, Case
from benchmarks.outcome import message_of
from benchmarks.providers import PROVIDERS, Provider

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CASES = [case for part in (GPU_PARTS if DEVICE.type == "cuda" else ("cpu",)) for case in PARTS[part]]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", [each for each in PROVIDERS if "compiled" not in each.name], ids=lambda p: p.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", ""))
def test_forward_and_backward(benchmark: Callable[..., Any], case: Case, provider: Provider) -> None:
    if provider.gpu_only and DEVICE.type != "cuda":
        pytest.skip("runs on a GPU only")
    if provider.rows_only and case.trailing:
        pytest.skip("takes (N, K) logits alone")
    needed = (provider.tensors + 1) * case.logits_bytes(DTYPE)
    if needed > runner.free_bytes(DEVICE):
        pytest.skip(f"would need about {needed / 1e9:.0f} GB of memory")
    try:
        loss = provider.load()
    except Exception as error:  # another package may raise anything while it is imported
        pytest.skip(message_of(error))
    buffers = timing.make_buffers(case, DTYPE, DEVICE)
    true = correctness.truth(provider.formula, buffers.logits[0], buffers.target[0])
    errors = correctness.errors(loss, buffers.logits[0], buffers.target[0], true)
    assert errors.within(correctness.tolerance(DTYPE, provider.rounds_operations)), errors
    step = timing.make_step(loss, buffers, "both", 0.37)

    def run() -> None:
        step(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name  # type: ignore[attr-defined]
    benchmark(run)
