"""Kernels that are compiled before a benchmark calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ahead
from benchmarks.providers import PROVIDERS

ROOT = Path(__file__).parents[1]
SHAPES = [(64, 10), (300, 64), (16, 21, 8, 16)]

# Compiled in processes of their own, and then where they would be launched, on tensors that hold something.
SCRIPT = """
import json, torch
from triton import knobs
from benchmarks import ahead
from benchmarks.launches import TARGETS, Driver, compiled_for
from benchmarks.providers import PROVIDERS
from cot_kernels import autograd
from cot_kernels.backends.triton import backend

def main():
    machine = ahead.Machine(TARGETS["sm_90"], 132)
    said, found = [], []
    ahead.compile_all(ahead.jobs(machine, %(shapes)r, ["bf16"], PROVIDERS), said.append)
    knobs.compilation.listener = lambda **about: found.append(about["cache_hit"])
    autograd.backend_for = lambda logits: backend
    for shape in %(shapes)r:
        logits = torch.randn(shape).bfloat16().requires_grad_()
        target = torch.randint(shape[1], shape[:1] + shape[2:])
        for provider in PROVIDERS:
            if provider.ours:
                with compiled_for(Driver(machine.target)) as launched:
                    provider.load()(logits, target).backward()
                assert len(launched) == 3
    print(json.dumps([len(said), found]))

if __name__ == "__main__":
    main()
"""


@pytest.mark.compiler
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux only")
def test_what_was_compiled_ahead_is_found(tmp_path: Path) -> None:
    script = tmp_path / "ahead_of_a_run.py"
    script.write_text(SCRIPT % {"shapes": SHAPES})
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    said, found = json.loads(run.stdout)
    assert said == len(SHAPES) * sum(provider.ours for provider in PROVIDERS)
    assert len(found) > 10 and all(found)


def test_what_does_not_compile_is_left_to_the_run() -> None:
    machine = ahead.Machine(None, 132)
    said: list[str] = []
    ahead.compile_all(ahead.jobs(machine, [(4, 10)], ["fp32"], PROVIDERS[-1:]), said.append)
    assert said == ["compiling fp32"]
    ahead.compile_all([], said.append)
    assert len(said) == 1
