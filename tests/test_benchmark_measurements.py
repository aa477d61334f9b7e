"""What the benchmarks measure by: times, memory, and the truth that providers are held against."""

from __future__ import annotations

import subprocess
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import correctness, gpu_state, resources, timing
from cot_kernels import complement_entropy, reference


def test_steps_take_turns_through_the_buffers_and_warm_up_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the steps alone move: 100 seconds in a call after another step's, and little in the next ones."""
    now = 0.0
    called: list[tuple[str, int]] = []

    def step(name: str, seconds: float) -> timing.Step:
        def run(index: int) -> None:
            nonlocal now
            now += seconds if called and called[-1][0] == name else 100.0
            called.append((name, index))

        return run

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    times = timing.host_times({"fast": step("fast", 1.0), "slow": step("slow", 2.0)}, buffers=3, rounds=2, seconds=8.0)
    assert times == {"fast": [1.0] * 8, "slow": [2.0] * 4}  # 4 seconds of each in a round
    a_round = [*(("fast", index) for index in (0, 1, 2, 0, 1)), *(("slow", index) for index in (0, 1, 2))]
    assert called == [("fast", 0), ("fast", 0), ("slow", 0), ("slow", 0), *a_round, *a_round]


def test_a_gpu_is_warmed_up_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a quarter of the time that is counted, whatever a call takes; here a millisecond, on a clock of its own."""
    calls = 0

    class Event:
        def record(self) -> None:
            self.at = calls

        def elapsed_time(self, later: Event) -> float:
            return float(later.at - self.at)

    def step(index: int) -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing.device_times(step, buffers=3, seconds=0.1) == [1e-3] * 100
    assert calls == 3 + 5 + 25 + 100


def test_the_state_of_a_gpu_is_what_the_machine_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what its driver does not know, or all of it."""
    assert gpu_state.state(torch.device("cpu")) == {}
    answers = {
        "clocks.sm": "1980\n",
        "power.draw": "412.50\n",
        "clocks_throttle_reasons.active": "0x0000000000000004\n",
    }
    asked: list[str] = []

    def run(command: tuple[str, ...], **_: Any) -> SimpleNamespace:
        asked.append(command[1])
        field = command[2].partition("=")[2]
        return SimpleNamespace(stdout=answers.get(field, f'Field "{field}" is not a valid field to query.'))

    def none(*_: Any, **__: Any) -> SimpleNamespace:
        raise FileNotFoundError("nvidia-smi")

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(gpu_state, "_CALLS", 1)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *_, **__: empty(1))
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_state.state(cuda) == {"sm_mhz": 1980.0, "watts": 412.5, "throttled": "0x0000000000000004"}
    assert set(asked) == {"--id=GPU-1-2"}
    monkeypatch.setattr(subprocess, "run", none)
    assert gpu_state.state(cuda) == {}


def test_quantiles() -> None:
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2
    assert timing.quantile([0.0, 10.0], 0.2) == pytest.approx(2)
    assert timing.quantile([7.0], 0.8) == 7


def test_memory_counts_what_is_alive() -> None:
    """Three tensors of the size of the logits: one is held, and beside it the gradient and a temporary at the peak."""

    class Holds(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
            ctx.save_for_backward(logits.detach().clone())
            return logits.new_zeros(())

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
            (held,) = ctx.saved_tensors
            return held * 2 + upstream, None

    logits = torch.randn(256, 1024, requires_grad=True)
    found = resources.memory(Holds.apply, logits, torch.zeros(256, dtype=torch.long))
    size = logits.numel() * 4
    assert size <= found.held < size + 1000
    assert 3 * size <= found.peak < 3 * size + 4000


def test_memory_is_not_what_the_process_allocates_beside_a_loss() -> None:
    """A module loaded late, a log that grows: counted once in some calls, and so no provider's memory."""
    log: list[bytes] = []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        log.append(bytes(10 if len(log) % 2 else 100_000))
        return F.cross_entropy(logits, target)

    found = resources.memory(loss, torch.randn(16, 10, requires_grad=True), torch.randint(10, (16,)))
    assert 0 < found.held < found.peak < 50_000


def test_truth_is_the_formula_in_float64() -> None:
    logits = torch.randn(100, 6).requires_grad_()
    target = torch.randint(6, (100,))
    true = correctness.truth(partial(F.cross_entropy, reduction="sum"), logits, target)
    exact = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(exact, target)
    (gradient,) = torch.autograd.grad(loss, exact)
    assert true.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(true.gradient, gradient[true.picked], rtol=1e-12, atol=0)
    assert len(true.picked) == correctness.ROWS


class _Spoiled(torch.autograd.Function):
    """A mean cross-entropy whose backward pass leaves some rows as they are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target, kept)
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, target, kept = ctx.saved_tensors
        ones = F.one_hot(target, logits.shape[1])
        gradient = (logits.softmax(1) - ones) * kept[:, None] * upstream / len(logits)
        return gradient, None, None


class _Zeroed(torch.autograd.Function):
    """A loss whose gradient is 0 in one row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, row: int) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.row = row
        return complement_entropy(logits.detach(), target)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, target = ctx.saved_tensors
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(complement_entropy(leaf, target), leaf, upstream)
        gradient[ctx.row] = 0
        return gradient, None, None


def test_any_row_of_zeros_shows_in_bfloat16() -> None:
    """Whatever its product with the signs is."""
    logits, target = torch.randn(300, 1000).bfloat16(), torch.randint(1000, (300,))
    true = correctness.truth(partial(reference.complement_entropy, reduction="sum"), logits, target)
    tolerance = correctness.tolerance(torch.bfloat16, False)
    assert correctness.errors(complement_entropy, logits, target, true).within(tolerance)
    least = int(true.products.abs().argmin())
    assert float(true.products[least].abs()) < 0.01 * true.length
    for row in (least, 0, 100):
        errors = correctness.errors(lambda *of: _Zeroed.apply(*of, row), logits, target, true)  # noqa: B023
        assert not errors.within(tolerance), (row, errors)


@pytest.mark.parametrize("spoiled", ["none", "all but those that are picked", "one program's", "one"])
def test_a_row_whose_gradient_is_wrong_shows(spoiled: str) -> None:
    logits, target = torch.randn(4096, 50), torch.randint(50, (4096,))
    true = correctness.truth(partial(F.cross_entropy, reduction="sum"), logits, target)
    kept = torch.ones(4096)
    if spoiled.startswith("all"):
        kept.zero_()[true.picked] = 1
    elif spoiled != "none":
        first = int(true.picked[20]) + 1
        kept[first : first + (1 if spoiled == "one" else 8)] = 0
    errors = correctness.errors(lambda logits, target: _Spoiled.apply(logits, target, kept), logits, target, true)
    for tolerance in correctness.TOLERANCES.values():
        assert errors.within(tolerance) == (spoiled == "none"), errors
    assert errors.loss is not None and errors.loss < 1e-6
    if spoiled == "none":
        assert errors.gradient is not None and errors.row is not None and errors.gradient < errors.row < 1e-6
