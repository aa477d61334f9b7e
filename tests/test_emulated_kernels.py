"""The kernels as compiled, executed: tests of the losses' values, with PTX in place of Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Tests that run on a GPU, and how many they are at least: of losses and gradients, over layouts, dtypes and margins.
RUNS = [
    ("sm_90", "test_layouts", "rows_that_begin_anywhere", 40),
    ("sm_90", "test_layouts", "not rows_that_begin_anywhere", 80),
    ("sm_90", "test_extremes", "", 70),
    ("sm_90", "test_value_and_gradient", "", 140),
    ("sm_90", "test_statistics", "", 25),
    ("sm_90", "test_poisoned", "", 60),
    ("sm_90", "test_objectives", "", 28),
    ("sm_80", "test_value_and_gradient", "", 140),
    ("sm_100", "test_layouts", "in_turn", 24),
    ("sm_100", "test_extremes", "not nothing_but", 60),
]

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux only"),
]


@pytest.mark.parametrize(("target", "name", "selected", "least"), RUNS)
def test_compiled_kernels_compute_what_they_should(target: str, name: str, selected: str, least: int) -> None:
    """A process of its own, for this one holds the interpreter."""
    outer = ("TRITON_INTERPRET", "PYTEST_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", f"tests/{name}.py"]
    command += ["-k", selected] if selected else []
    run = subprocess.run(
        command, cwd=ROOT, env=environment | {"EMULATED_GPU": target}, capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= least, run.stdout[-2000:]
