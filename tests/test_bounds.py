"""Predictions from counts, against figures worked out by hand, and against what a GPU measured."""

from __future__ import annotations

import pytest

from benchmarks import reports
from benchmarks.bounds import GPUS, Gpu, Work, deviations, predict, programs_at_once, throughput

# 100 multiprocessors at 1 GHz, each of whose four schedulers has 2.5 GB/s of a copy's 1 TB/s: a logit of two bytes
# takes 0.8 ns of it, and 32 of a warp 25.6 ns.
GPU = Gpu("made up", "sm_90", 100, 1e9, 1e12 / 0.9)
MODEL = reports.read(reports.RESULTS / "gpu_model.json")


@pytest.mark.parametrize(
    ("customers", "delay", "services", "expected"),
    [
        (1, 1.0, (1.0, 2.0), 0.25),  # alone: 4 seconds around
        (2, 1.0, (1.0,), 0.8),  # one of two waits for the other: 1 + 1.5 seconds
        (2, 0.0, (1.0, 1.0), 2 / 3),  # of two stations one stands still a third of the time
        (1.5, 1.0, (1.0,), 0.65),  # between 0.5 and 0.8
        (0.5, 1.0, (1.0,), 0.25),
        (60, 3.0, (0.5, 0.25), 2.0),  # so many that the slower station never stands still
        (0, 1.0, (1.0,), 0.0),
    ],
)
def test_throughput_by_mean_value_analysis(
    customers: float, delay: float, services: tuple[float, ...], expected: float
) -> None:
    assert throughput(customers, delay, services) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("work", "bound", "share", "headroom"),
    [
        # 64 logits of a thread are 1.6384 us of memory; 0.1 us of instructions and 0.7 of waiting beside, 16 warps each
        (Work(64, 64.0, 100, 10, 1.0, 0.0, 2.0, 0.0), "bytes", 1.0, 10.7),
        (Work(64, 64.0, 100, 10, 1.0, 0.0, 2.0, 0.5), "bytes", 0.8, 11.5),  # a fifth for the rows
        (Work(64, 64.0, 6554, 10, 1.0, 0.0, 2.0, 0.0), "issue slots", 0.25, 0.25),  # 6.554 us, four times as long
        (Work(64, 64.0, 100, 410, 1.0, 0.0, 2.0, 0.0), "special functions", 0.5, 0.5),  # 3.28 us, eight lanes a cycle
        # A warp a scheduler: 1.6384 us in 1.6384 + 0.1 + 0.7
        (Work(4, 64.0, 100, 10, 1.0, 0.0, 2.0, 0.0), "latency", 0.672, 0.672),
        (Work(4, 64.0, 100, 10, 0.0, 1.0, 2.0, 0.0), "latency", 0.804, 0.804),  # 0.3 us for the L2 cache
    ],
)
def test_shares_worked_out_by_hand(work: Work, bound: str, share: float, headroom: float) -> None:
    prediction = predict(GPU, work)
    assert prediction.bound == bound
    assert prediction.share == pytest.approx(share, rel=0.01)
    assert prediction.headroom == pytest.approx(headroom, rel=0.01)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [
        (64, 8, 0, 4),  # 64 * 32 * 8 = 16384 registers
        (65, 8, 0, 3),  # given out in steps of 8 a thread
        (32, 4, 0, 16),  # 64 warps
        (16, 1, 0, 32),  # 32 programs
        (136, 1, 0, 12),  # of 16384 a scheduler's, three warps have 4352 each: 65536 would hold 15
        (109, 1, 0, 16),  # four of 3584, where 65536 would hold 18
        (200, 1, 0, 8),
        (16, 8, 100 << 10, 2),  # shared memory
        (16, 8, (228 << 10) // 4 - 1024, 4),
        (16, 8, (228 << 10) // 4 - 1023, 3),  # given out in steps of 128 bytes
    ],
)
def test_programs_at_once(registers: int, warps: int, shared: int, programs: int) -> None:
    assert programs_at_once("sm_90", registers, warps, shared) == programs


def test_predictions_of_what_a_gpu_measured() -> None:
    """From counts of the kernels that were timed. Nothing was fitted to these measurements."""
    rows = MODEL["results"]
    (gpu,) = (gpu for gpu in GPUS if gpu.name in MODEL["environment"]["device"].split())
    assert len(rows) == 120
    for row in rows:
        assert predict(gpu, Work(**row["work"])).share == pytest.approx(row["predicted"], abs=1e-4)
    for kernel in ("statistics", "gradient"):
        for dtype in ("bf16", "fp32"):
            some = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
            mean, spread = deviations(some)
            assert abs(mean) < 0.06 and spread < 0.095, (kernel, dtype, mean, spread)
    # Far from 1 as well: what keeps a kernel from the bandwidth is in it.
    low = [row for row in rows if row["measured"] < 0.7]
    assert len(low) >= 30 and deviations(low)[1] < 0.09
