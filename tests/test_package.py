"""The house: what importing costs, and that the linters are content."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import cot_kernels
from cot_kernels import functional, linear

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_importing_costs_torch_alone() -> None:
    """Neither Lightning nor transformers, nor what lies beside it, nor Triton until a GPU tensor asks for it."""
    code = (
        "import sys, torch; before = set(sys.modules); import cot_kernels;"
        "cot_kernels.complement_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long));"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = set(run(sys.executable, "-c", code).split())
    foreign = {"lightning", "pytorch_lightning", "transformers", "torchmetrics", "matplotlib"}
    beside = {"lightning_integration", "benchmarks", "examples", "study"}
    assert not loaded & (foreign | beside)
    assert "triton" not in loaded
    assert "cot_kernels" in loaded


def test_public_names_exist() -> None:
    assert all(hasattr(cot_kernels, name) for name in cot_kernels.__all__)
    assert (ROOT / "cot_kernels" / "py.typed").exists()


def test_version_is_the_packages() -> None:
    try:
        installed = importlib.metadata.version("cot-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a source tree that is not installed")
    assert cot_kernels.__version__ == installed


@pytest.mark.parametrize(
    "command", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)], ids=" ".join
)
def test_linters_are_content(command: tuple[str, ...]) -> None:
    pytest.importorskip(command[0])
    run(sys.executable, "-m", *command)


def test_docstring_examples() -> None:
    import doctest

    import torch

    for module in (functional, linear):
        failures, tests = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
        assert tests >= 4 and not failures
