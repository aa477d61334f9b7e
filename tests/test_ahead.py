"""Kernels that are compiled before a benchmark calls them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import ahead
from benchmarks.providers import PROVIDERS

ROOT = Path(__file__).parents[1]
SHAPES = [(64, 10), (300, 64), (16, 21, 8, 16)]

# Compiled in processes of their own, and then where they would be launched, on tensors that hold something.
SCRIPT = """
import json, math, torch
from triton import knobs
from benchmarks import ahead
from benchmarks.launches import TARGETS, Driver, compiled_for
from benchmarks.providers import PROVIDERS
from cot_kernels import autograd
from cot_kernels.backends.triton import backend

def main():
    machine = ahead.Machine(TARGETS["sm_90"], 132)
    said, found = [], []
    ahead.compile_all(ahead.jobs(machine, %(shapes)r, ["bf16"], PROVIDERS), math.inf, said.append)
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


# What kernels would be compiled, of which the hash is enough, by how many multiprocessors a GPU has.
HASHES = """
import json, torch
from benchmarks import ahead
from benchmarks.launches import TARGETS, Driver, compiled_for
from cot_kernels import autograd, complement_entropy
from cot_kernels.backends.triton import backend, layout

class Everything:
    def __contains__(self, hash):
        return True

autograd.backend_for = lambda logits: backend
shape, found = (64, 128256), []
memory = torch.zeros(64 * 128256 + 64, dtype=torch.bfloat16)
logits = memory[-memory.data_ptr() % 128 // 2 :][: 64 * 128256].view(shape).requires_grad_()  # as on a GPU
for number in (78, 114):
    machine = ahead.Machine(TARGETS["sm_90"], number)
    job = ahead.Job(machine, shape, "bf16", "complement_entropy")
    found.append([each.hash for each in ahead.kernels(job, Everything())])
    layout.multiprocessors = lambda device: number
    with compiled_for(Driver(machine.target), Everything()) as launched:
        complement_entropy(logits, torch.zeros(64, dtype=torch.int64)).backward()
    found.append([each.hash for each in launched])
print(json.dumps(found))
"""


@pytest.mark.compiler
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux only")
def test_kernels_are_those_that_a_gpu_of_this_size_launches() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", HASHES]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    ahead_of_small, small, ahead_of_large, large = json.loads(run.stdout)
    assert ahead_of_small == small and ahead_of_large == large and len(small) == len(large) == 4
    assert small != large


def test_what_does_not_compile_is_left_to_the_run() -> None:
    machine = ahead.Machine(None, 132)
    said: list[str] = []
    ahead.compile_all(ahead.jobs(machine, [(4, 10)], ["fp32"], PROVIDERS[-1:]), math.inf, said.append)
    assert said == ["compiling fp32"]
    ahead.compile_all([], math.inf, said.append)
    assert len(said) == 1


@pytest.mark.parametrize("left", [-1.0, 0.2])
def test_nothing_is_compiled_after_the_deadline(left: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST_PROCESSES", 1)
    work = ahead.jobs(ahead.Machine(None, 132), [(4, classes) for classes in range(2, 500)], ["fp32"], PROVIDERS)
    said: list[str] = []
    ahead.compile_all(work, time.monotonic() + left, said.append)
    assert len(said) < len(work)
