"""Three backends, one suite: C++ and ATen on the CPU, Triton on a GPU or in its interpreter.

With EMULATED_GPU=sm_90 in the environment, say, what Triton compiles for that GPU is executed on the CPU instead: see
:mod:`emulated`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Generator
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
EMULATED_GPU = os.environ.get("EMULATED_GPU")
INTERPRETED = not (HAS_GPU or EMULATED_GPU)
if INTERPRETED:
    # The interpreter is chosen when a kernel is decorated. Set for that moment only: the rest of the suite must see
    # the CPU path that users get.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # imported by the interpreter on its first run, with the same choice
        import triton.experimental.gluon  # noqa: F401
import twin_kernel  # noqa: E402

import cot_kernels.autograd  # noqa: E402
from cot_kernels.backends import aten  # noqa: E402
from cot_kernels.backends.native import backend as native  # noqa: E402
from cot_kernels.backends.triton import backend as triton_backend  # noqa: E402

if INTERPRETED:
    del os.environ["TRITON_INTERPRET"]
if EMULATED_GPU:
    import emulated

    emulated.install(EMULATED_GPU)
    setattr(twin_kernel, "twin_kernel", emulated.Emulated(twin_kernel.twin_kernel))  # noqa: B010


@pytest.fixture(params=["native", "aten", "aten-blocks", pytest.param("triton", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device to put tensors on; the losses run on the backend that the test is parametrised with.

    "aten-blocks" is ATen with many small blocks, "native" what the package has on a CPU where it could be compiled.
    """
    if request.param == "triton":
        monkeypatch.setattr(cot_kernels.autograd, "backend_for", lambda logits: triton_backend)
        return torch.device("cuda" if HAS_GPU else "cpu")
    backend = native if request.param == "native" else aten
    monkeypatch.setattr(cot_kernels.autograd, "backend_for", lambda logits: backend)
    if request.param == "aten-blocks":
        monkeypatch.setattr(aten, "BLOCK_BYTES", 256)
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """Of the calls of one test none is kept for the next, which may have changed what they are planned by."""
    triton_backend.forward_plans.clear()
    triton_backend.gradient_plans.clear()


# Where hypothesis is installed, its tests run few cases, always the same; with --hypothesis-profile=fuzz many new ones.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    common: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("suite", max_examples=20, derandomize=True, database=None, **common)
    settings.register_profile("fuzz", max_examples=800, print_blob=True, **common)
    settings.load_profile("suite")

COUNTED = "random cases"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: two processes share what remains evenly when it is short."""
    items.sort(key=lambda item: item.path.name != "test_emulated_kernels.py")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Counts the cases of a test of hypothesis, which runs its inner test once a case."""
    handle = getattr(pyfuncitem.obj, "hypothesis", None)
    if handle is None:
        return (yield)
    inner, count = handle.inner_test, 0

    @functools.wraps(inner)
    def counting(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        inner(*args, **kwargs)
        count += 1

    handle.inner_test = counting
    try:
        return (yield)
    finally:
        handle.inner_test = inner
        pyfuncitem.user_properties.append((COUNTED, count))  # travels from a worker to the process that reports


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for state in ("passed", "failed") for report in terminalreporter.stats.get(state, [])]
    counts = [value for report in reports for name, value in report.user_properties if name == COUNTED]
    if counts:
        terminalreporter.write_line(f"{sum(counts):,} random cases in {len(counts)} tests")
