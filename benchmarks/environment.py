"""What a benchmark ran on: every results file carries it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path

import torch

from cot_kernels.backends.native import backend as native

ROOT = Path(__file__).parents[1]
_CPU = torch.device("cpu")
# Other packages whose losses are measured where they are installed, the last one's by benchmarks.linear alone.
PEERS = ("liger-kernel", "quack-kernels", "cut-cross-entropy")


def environment(threads: int, device: torch.device = _CPU) -> dict[str, str | int]:
    """Device, driver, versions, commit (dirty if files differ) and date. Empty where the machine does not tell."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        "cpu": _processor(),
        "cpu_backend": f"C++, {native.level()}" if native.level() else "ATen",
        "threads": threads,
        "torch": torch.__version__,
        "triton": _version("triton"),
        **{peer: version for peer in PEERS if (version := _version(peer))},
        "python": platform.python_version(),
        "commit": _first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    model = [line for line in lines if line.startswith("model name")]
    return model[0].split(":")[1].strip() if model else platform.processor()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _first_line(*command: str) -> str:
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return finished.stdout.partition("\n")[0].strip()
