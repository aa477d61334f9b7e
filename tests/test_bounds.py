"""Predictions from counts, against figures worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.bounds import Gpu, predict, programs_at_once

# 100 multiprocessors at 1 GHz: 9.6e12 instructions of a lane, three quarters of the slots, and 1.6e12 special functions
# a second; copies at 1e12.
GPU = Gpu("made up", "sm_90", 100, 1e9, 1e12 / 0.9)


@pytest.mark.parametrize(
    ("counted", "bound", "share", "headroom"),
    [
        ((2.0, 0.0, 1e-6, 0.0, 9.6, 1.0), "bytes", 1.0, 2.0),  # 2 ps against 0.007, 1 and 0.625
        ((2.0, 0.5, 1e-6, 0.0, 12.0, 1.0), "bytes", 0.8, 2.0),  # 2.5 ps, of which 2 for logits, against 1.25
        ((2.0, 0.0, 1e-6, 0.0, 38.4, 1.0), "issue slots", 0.5, 0.5),  # 2 ps against 4
        ((2.0, 0.5, 1e-6, 0.0, 38.4, 1.0), "issue slots", 0.5, 0.625),  # the same, for logits
        ((1.0, 0.0, 1e-6, 0.0, 4.8, 3.2), "special functions", 0.5, 0.5),  # 1 ps against 0.5 and 2
        ((2.0, 0.0, 1 / 1750, 0.0, 4.8, 1.0), "latency", 0.5, 0.5),  # 1750 logits for a wait of 700 ns, on 100: 4 ps
        ((2.0, 0.0, 1 / 2500, 1 / 2500, 4.8, 1.0), "latency", 0.5, 0.5),  # and 300 ns for the L2 cache
    ],
)
def test_the_longest_time_bounds(
    counted: tuple[float, float, float, float, float, float], bound: str, share: float, headroom: float
) -> None:
    prediction = predict(GPU, *counted)
    assert prediction.bound == bound
    assert prediction.share == pytest.approx(share)
    assert prediction.headroom == pytest.approx(headroom)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [
        (64, 8, 0, 4),  # 64 * 32 * 8 = 16384 registers
        (65, 8, 0, 3),  # given out in steps of 8 a thread
        (32, 4, 0, 16),  # 64 warps
        (16, 1, 0, 32),  # 32 programs
        (16, 8, 100 << 10, 2),  # shared memory
    ],
)
def test_programs_at_once(registers: int, warps: int, shared: int, programs: int) -> None:
    assert programs_at_once("sm_90", registers, warps, shared) == programs
