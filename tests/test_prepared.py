"""Launches of which Triton decided the variant before: the same arguments as those it was decided for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.driver import driver

import cot_kernels.autograd
from benchmarks import launches
from cot_kernels import complement_cross_entropy
from cot_kernels.backends.triton import backend, launch, prepared
from cot_kernels.backends.triton.prepared import Plans, Prepared

ROOT = Path(__file__).parents[1]
SHAPES = ((4, 6), (3, 5000), (4, 6, 32), (5000, 7), (600, 3000))


class Kernel:
    """Stands for a kernel: tells what it is launched with, by Triton (first) and then directly."""

    def __init__(self, kernel: Any, told: list[tuple[str, str, tuple[Any, ...]]]) -> None:
        self.kernel, self.told = kernel, told
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int]) -> Any:
        def start(*arguments: Any, **options: Any) -> Kernel:
            bound = dict(zip(self.arg_names, arguments, strict=False))
            bound |= {name: options.pop(name) for name in self.arg_names if name in options}
            assert set(options) <= {"num_warps", "maxnreg"}
            assert tuple(bound) == tuple(self.arg_names), "all, in their order: constants last"
            given = (each.data_ptr() if isinstance(each, Tensor) else each for each in bound.values())
            self.told.append(("first", self.kernel.__name__, (*grid, *given)))
            return self

        return start

    # What a compiled kernel has.
    function, packed_metadata = "function", "metadata"

    def run(self, x: int, y: int, z: int, stream: int, function: str, metadata: str, *rest: Any) -> None:
        assert (y, z, stream, function, metadata, rest[:3]) == (1, 1, 0, "function", "metadata", (None,) * 3)
        self.told.append(("again", self.kernel.__name__, (x, *rest[3:])))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, tuple[Any, ...]]]:
    """What the kernels were launched with; nothing is computed."""
    found: list[tuple[str, str, tuple[Any, ...]]] = []
    for name in launches.KERNELS:
        monkeypatch.setattr(backend, name, Kernel(getattr(backend, name), found))
    monkeypatch.setattr(cot_kernels.autograd, "backend_for", lambda logits: backend)
    monkeypatch.setattr(driver, "_active", launches.Driver(launches.TARGETS["sm_90"]))
    return found


def call(shape: tuple[int, ...], reduction: str, dtype: torch.dtype = torch.float32, offset: int = 0) -> None:
    """Of logits that begin so many places after a cache line, as on a GPU without an offset all do."""
    size, line = torch.Size(shape).numel(), launch.LINE // dtype.itemsize
    memory = torch.empty(size + 2 * line, dtype=dtype)
    begin = offset - memory.data_ptr() // dtype.itemsize % line
    logits = memory[begin % line :][:size].view(shape).requires_grad_()
    loss = complement_cross_entropy(
        logits, torch.zeros(shape[0], *shape[2:], dtype=torch.int64), gamma=0.5, reduction=reduction
    )
    torch.autograd.grad(loss, logits, torch.ones_like(loss))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_repeated_launches_have_the_arguments_of_the_first(
    shape: tuple[int, ...], reduction: str, told: list[tuple[str, str, tuple[Any, ...]]]
) -> None:
    """Pointers aside: those are of what the call was given."""
    call(shape, reduction)
    first = told.copy()
    assert {way for way, *_ in first} == {"first"} and len(first) >= 2
    call(shape, reduction)
    again = told[len(first) :]
    assert [(name, len(values)) for _, name, values in again] == [(name, len(values)) for _, name, values in first]
    for (_, name, one), (way, _, other) in zip(first, again, strict=True):
        assert way == "again", name
        pointers = sum(each.endswith("_pointer") for each in getattr(backend, name).arg_names)
        assert one[0] == other[0] and one[1 + pointers :] == other[1 + pointers :], name
        assert all(isinstance(each, int) for each in other[1 : 1 + pointers])


def test_whatever_decides_for_another_variant_has_a_launch_of_its_own(
    told: list[tuple[str, str, tuple[Any, ...]]],
) -> None:
    for options in ({}, {"dtype": torch.float64}, {"offset": 1}, {"reduction": "sum"}, {"shape": (5, 6)}):
        given: dict[str, Any] = {"shape": (4, 6), "reduction": "mean"} | options
        told.clear()
        call(**given)
        # The gradient of a sum is that of a mean with another factor.
        shared = "gradient_kernel" if options == {"reduction": "sum"} else None
        assert {way for way, name, _ in told if name != shared} == {"first"}, options
        told.clear()
        call(**given)
        assert {way for way, *_ in told} == {"again"}, options


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_hears_of_every_launch(
    hook: str, told: list[tuple[str, str, tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton itself tells hooks: with one, launches are left to it."""
    call((4, 6), "mean")
    monkeypatch.setattr(prepared.knobs.runtime, hook, lambda metadata: None)
    told.clear()
    for _ in range(2):
        call((4, 6), "mean")
    assert {way for way, *_ in told} == {"first"}


def test_what_a_profiler_launched_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be an instrumented variant, which needs what only the profiler gives it."""
    told: list[tuple[str, str, tuple[Any, ...]]] = []

    class Plain:
        __name__, arg_names = "plain", ("pointer", "number")

    launch_of_plain = Prepared(Kernel(Plain(), told), 3, (5,), {})
    with monkeypatch.context() as profiled:
        profiled.setattr(prepared.knobs.runtime, "launch_enter_hook", lambda metadata: None)
        launch_of_plain(-1, torch.zeros(2))
    monkeypatch.setattr(driver, "_active", launches.Driver(launches.TARGETS["sm_90"]))
    for _ in range(2):
        launch_of_plain(-1, torch.zeros(2))
    assert [way for way, *_ in told] == ["first", "first", "again"]


def test_on_amd_every_launch_is_left_to_triton(
    told: list[tuple[str, str, tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a variant also depends on whether tensors are larger than 2 GiB."""
    monkeypatch.setattr(torch.version, "hip", "7")
    for _ in range(2):
        call((4, 6), "mean")
    assert {way for way, *_ in told} == {"first"}


def test_plans_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MOST_PLANS", 3)
    plans: Plans[int] = Plans()
    for number in range(10):
        assert plans.keep((number,), number) == number
        assert plans[(number,)] == number and len(plans) <= 3


def test_what_an_interpreter_launches_is_left_to_it() -> None:
    """It returns no compiled kernel."""
    calls: list[tuple[Any, ...]] = []

    class Interpreted:
        arg_names = ("pointer", "number")

        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *arguments: calls.append((grid, *arguments))

    prepared_launch = Prepared(Interpreted(), 7, (3,), {})
    tensor = torch.zeros(2)
    prepared_launch(-1, tensor)
    prepared_launch(-1, tensor)
    assert [(grid, number) for grid, _, number in calls] == [((7,), 3)] * 2


KEYS = """
import sys
from cot_kernels.backends.triton import backend, objectives
named = {each.__name__: each for each in (*objectives.TWINS, backend.statistics_kernel, backend.gradient_kernel,
                                          backend.merge_kernel, backend.value_and_gradient_kernel)}
for name in sorted(named, reverse=sys.argv[1] == "backwards"):
    named[name].cache_key
print([named[name].cache_key for name in sorted(named)])
"""


@pytest.mark.compiler
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux only")
def test_kernels_are_found_in_the_cache_whatever_is_called_first() -> None:
    """Triton's key of a function depends on which others were asked for theirs before it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = {
        subprocess.run(
            [sys.executable, "-c", KEYS, order], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout
        for order in ("forwards", "backwards")
    }
    assert len(found) == 1 and len(next(iter(found))) > 7 * 64
