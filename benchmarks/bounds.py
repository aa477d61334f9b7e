"""How fast a streaming kernel will be on a GPU, from counts in its machine code. Predictions, not measurements.

The warps on a multiprocessor share its schedulers and its part of the memory's bandwidth, and each waits for its loads
between: a closed queueing network, whose throughput follows from what a warp asks of each station by mean value
analysis (Reiser and Lavenberg, J. ACM 27(2), 1980). With many warps it comes to the slowest station, with few to the
waits, and between, where most kernels are, to less than either alone would allow. Beside it stands the rate of the
special function units, which work while a warp goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Of the bandwidth in a datasheet, what a large copy reaches where none was measured: a rule of thumb.
COPY_SHARE = 0.9

# Seconds from a load to its data under load, from device memory and from the L2 cache: rules of thumb for recent NVIDIA
# GPUs. Nothing waits for a store.
LATENCY = 700e-9
L2_LATENCY = 300e-9

_WARP = 32
_SCHEDULERS = 4  # of a multiprocessor, each issuing one instruction of a warp a cycle
_SPECIAL_LANES = 16  # special functions a multiprocessor starts a cycle
_REGISTERS = 16384  # of a scheduler, given out 256 at a time a warp
_WARPS = 64
_PROGRAMS = 32
_SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
_SHARED_RESERVED = 1 << 10  # a program
_SHARED_UNIT = 128

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
    copy_share: float = COPY_SHARE

    @property
    def copy_bandwidth(self) -> float:
        return self.copy_share * self.bytes_per_second


GPUS = (
    Gpu("A100", "sm_80", 108, 1.41e9, 2.04e12),
    Gpu("H100", "sm_90", 132, 1.98e9, 3.35e12),
    Gpu("H200", "sm_90", 132, 1.98e9, 4.8e12, 0.877),  # 4.21e12 in gpu_bf16.json
    Gpu("B200", "sm_100", 148, 1.965e9, 8e12),
)


@dataclass(frozen=True)
class Work:
    """What one warp does from its first instruction to its last."""

    warps: int  # that a multiprocessor holds at a time
    logits: float  # of a thread
    instructions: float
    special: float  # of these, by the special function units
    waits: float  # for device memory
    near_waits: float  # for the L2 cache
    logit_bytes: float  # moved for a logit, from and to device memory
    row_bytes: float  # for its row, target, state and the like, over the classes


@dataclass(frozen=True)
class Prediction:
    gpu: str
    bound: str  # what would take longest by itself: "bytes", "latency", "issue slots" or "special functions"
    share: float  # of the bandwidth of a copy, that the logits alone take
    headroom: float  # time of the bytes over that of the longest of the others


def predict(gpu: Gpu, work: Work) -> Prediction:
    logits, warps = work.logits * _WARP, work.warps / _SCHEDULERS
    bandwidth = gpu.copy_bandwidth / (gpu.multiprocessors * _SCHEDULERS)
    moved = logits * (work.logit_bytes + work.row_bytes) / bandwidth
    issued = work.instructions / gpu.hertz
    special = work.special * _WARP * _SCHEDULERS / _SPECIAL_LANES / gpu.hertz
    waited = work.waits * LATENCY + work.near_waits * L2_LATENCY
    times = {
        "bytes": moved,
        "latency": (waited + issued + moved) / warps,
        "issue slots": issued,
        "special functions": special,
    }
    rate = min(throughput(warps, waited, (issued, moved)), 1 / special if special else math.inf)
    beside = max(seconds for name, seconds in times.items() if name != "bytes")
    share = rate * logits * work.logit_bytes / bandwidth
    return Prediction(gpu.name, max(times, key=times.__getitem__), share, moved / beside)


def throughput(customers: float, delay: float, services: tuple[float, ...]) -> float:
    """How often in a second a customer of a closed network comes around: by mean value analysis.

    Args:
        customers: who go around; between two whole numbers what lies between.
        delay: seconds that each spends by itself in a round.
        services: seconds at each station, where they wait for one another.
    """
    found, queues = 0.0, [0.0] * len(services)
    for number in range(1, math.ceil(customers) + 1):
        stays = [seconds * (1 + queue) for seconds, queue in zip(services, queues, strict=True)]
        before, found = found, number / (delay + sum(stays))
        queues = [found * stay for stay in stays]
    return found - (math.ceil(customers) - customers) * (found - before) if customers else 0.0


def deviations(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """By how much the shares measured exceed those predicted (benchmarks.model): the mean, and the root mean square.

    A pass that only reads may be faster than a copy: what is beyond one is left out.
    """
    beyond = [min(row["measured"], 1.0) - row["predicted"] for row in rows]
    return sum(beyond) / len(beyond), math.sqrt(sum(each**2 for each in beyond) / len(beyond))


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
    fitting = [_REGISTERS // a_warp * _SCHEDULERS // warps, _WARPS // warps, _PROGRAMS]
    if shared_bytes:
        shared = -(-shared_bytes // _SHARED_UNIT) * _SHARED_UNIT
        fitting.append(_SHARED_BYTES[target] // (shared + _SHARED_RESERVED))
    return min(fitting)
