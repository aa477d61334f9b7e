"""What bounds a streaming kernel on a GPU, from what was counted in its machine code. Predictions, not measurements.

A logit costs four times, of which the longest bounds the kernel: its bytes, with its part of those of its row, at the
bandwidth of a copy, its share of the waits for memory of all threads at once (Little's law), its instructions at the
rate the schedulers issue them, and its exponentials and the like at the rate of the special function units.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of the bandwidth in a datasheet, what a large copy reaches: a rule of thumb. To be replaced by a measurement.
COPY_SHARE = 0.9

# Of the issue slots, what a kernel that streams can take, for its threads also wait: those that instructions bound took
# 0.58 to 0.78 on an H200 (docs/performance.md#measured-on-a-gpu).
ISSUE_SHARE = 0.75

# Seconds from a load to its data under load, from device memory and from the L2 cache: rules of thumb for recent NVIDIA
# GPUs. Nothing waits for a store.
LATENCY = 700e-9
L2_LATENCY = 300e-9

_WARP = 32
_SCHEDULERS = 4  # of a multiprocessor, each issuing one instruction of a warp a cycle
_SPECIAL_LANES = 16  # special functions a multiprocessor starts a cycle
_REGISTERS = 65536  # of a multiprocessor, given out 256 at a time a warp
_WARPS = 64
_PROGRAMS = 32
_SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
_SHARED_RESERVED = 1 << 10  # a program

_GFX942_SIMDS = 4  # of a compute unit
_GFX942_WARPS = 8  # of a SIMD, 64 lanes each
_GFX942_REGISTERS = 512  # of a lane of a SIMD, given out 8 at a time
_GFX942_SHARED_BYTES = 64 << 10


@dataclass(frozen=True)
class Gpu:
    """Datasheet figures of the SXM part; the clock is the highest."""

    name: str
    target: str
    multiprocessors: int
    hertz: float
    bytes_per_second: float

    @property
    def copy_bandwidth(self) -> float:
        return COPY_SHARE * self.bytes_per_second


GPUS = (
    Gpu("A100", "sm_80", 108, 1.41e9, 2.04e12),
    Gpu("H100", "sm_90", 132, 1.98e9, 3.35e12),
    Gpu("H200", "sm_90", 132, 1.98e9, 4.8e12),
    Gpu("B200", "sm_100", 148, 1.965e9, 8e12),
)


@dataclass(frozen=True)
class Prediction:
    gpu: str
    bound: str  # "bytes", "latency", "issue slots" or "special functions"
    share: float  # of the bandwidth of a copy, that the logits alone take
    headroom: float  # time of the bytes over that of the next longest


def predict(
    gpu: Gpu,
    logit_bytes: float,
    row_bytes: float,
    waits: float,
    near_waits: float,
    instructions: float,
    special: float,
) -> Prediction:
    """From what one logit takes of each.

    Args:
        row_bytes: what is moved for its row, target, state and the like, over the classes.
        waits: for device memory, of a program over the logits that all programs on a multiprocessor have.
        near_waits: for the L2 cache.
    """
    cycles = gpu.multiprocessors * gpu.hertz
    times = {
        "bytes": (logit_bytes + row_bytes) / gpu.copy_bandwidth,
        "latency": (waits * LATENCY + near_waits * L2_LATENCY) / gpu.multiprocessors,
        "issue slots": instructions / (cycles * _SCHEDULERS * _WARP * ISSUE_SHARE),
        "special functions": special / (cycles * _SPECIAL_LANES),
    }
    bound = max(times, key=times.__getitem__)
    beside = max(seconds for name, seconds in times.items() if name != "bytes")
    share = logit_bytes / gpu.copy_bandwidth / times[bound]
    return Prediction(gpu.name, bound, share, times["bytes"] / beside)


def both_passes(statistics: float, gradient: float) -> float:
    """The share of a copy's bandwidth of a read, and of a read and a write, that reach the shares given."""
    return 3 / (1 / statistics + 2 / gradient)


def warps_at_most(target: str) -> int:
    """Of one multiprocessor."""
    return _GFX942_SIMDS * _GFX942_WARPS if target == "gfx942" else _WARPS


def programs_at_once(target: str, registers: int, warps: int, shared_bytes: int) -> int:
    """Programs that share one multiprocessor; on AMD, one compute unit."""
    if target == "gfx942":
        a_simd = min(_GFX942_WARPS, _GFX942_REGISTERS // (-(-registers // 8) * 8))
        fitting = [_GFX942_SIMDS * a_simd // warps]
        if shared_bytes:
            fitting.append(_GFX942_SHARED_BYTES // shared_bytes)
        return min(fitting)
    a_warp = -(-registers * _WARP // 256) * 256
    fitting = [_REGISTERS // (a_warp * warps), _WARPS // warps, _PROGRAMS]
    if shared_bytes:
        fitting.append(_SHARED_BYTES[target] // (shared_bytes + _SHARED_RESERVED))
    return min(fitting)
