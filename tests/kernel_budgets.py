"""What the kernels may take, of every layout: the most over all numbers of classes, dtypes, calls and targets.

Tighten them when a kernel gets better. What they mean for a GPU is predicted in docs/kernels.md. Rows of up to 16
classes are tiny: a program has as many of them as threads, or more, and takes none in turn.
"""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    loop: float  # instructions a logit in a turn of the main loop, or where there is none of all, at most
    once: int  # instructions of a thread beside the turns, of a row and of a program, at most
    registers: int  # of a thread, at most
    under_way: int  # KiB that the threads of a multiprocessor load in one turn, at least


NVIDIA = {
    "statistics": {
        "tiny": Budget(51.5, 0, 64, 36),
        "short": Budget(27, 370, 96, 32),
        "tiny, odd": Budget(58.5, 0, 64, 48),
        "short, odd": Budget(37, 330, 71, 32),
        "tiny, sliced": Budget(51, 310, 56, 48),
        "short, sliced": Budget(16, 290, 64, 64),
        "long": Budget(10.5, 460, 64, 32),
        "long, odd": Budget(10.5, 430, 64, 32),
        "long, sliced": Budget(10.5, 410, 64, 32),
        "class-major": Budget(16.5, 1550, 139, 12),
        "class-major, odd": Budget(39.5, 440, 64, 8),
    },
    "split": {
        "long": Budget(10.5, 270, 64, 48),
        "long, odd": Budget(10.5, 270, 64, 48),
    },
    "gradient": {
        "tiny": Budget(27.5, 0, 64, 48),
        "short": Budget(25, 0, 62, 32),
        "tiny, odd": Budget(51.5, 0, 134, 12),
        "short, odd": Budget(60.5, 0, 168, 12),
        "tiny, sliced": Budget(41.5, 0, 134, 24),
        "short, sliced": Budget(23.5, 0, 80, 50),
        "long": Budget(11, 180, 64, 32),
        "long, odd": Budget(11, 180, 64, 32),
        "long, sliced": Budget(16.5, 170, 64, 32),
        "class-major": Budget(18, 450, 94, 20),
        "class-major, odd": Budget(26.5, 350, 72, 7),
    },
    "value_and_gradient": {
        "tiny": Budget(64, 0, 96, 24),
        "short": Budget(73.5, 0, 128, 28),
        "tiny, odd": Budget(160, 0, 167, 16),
        "short, odd": Budget(111, 0, 149, 20),
        "long": Budget(22, 500, 74, 32),
        "long, odd": Budget(22, 390, 74, 32),
    },
}

# A gfx942 has no instruction that rounds to bfloat16, and 128 registers a thread where half its warps run.
AMD = {
    "statistics": {
        "tiny": Budget(83, 0, 40, 32),
        "short": Budget(31.5, 380, 61, 32),
        "tiny, odd": Budget(91.5, 0, 40, 32),
        "short, odd": Budget(44, 370, 51, 32),
        "tiny, sliced": Budget(91.5, 370, 40, 32),
        "short, sliced": Budget(24, 310, 49, 64),
        "long": Budget(12.5, 530, 48, 32),
        "long, odd": Budget(12.5, 490, 48, 32),
        "long, sliced": Budget(12, 490, 34, 32),
        "class-major": Budget(54, 570, 81, 20),
        "class-major, odd": Budget(44, 480, 40, 8),
    },
    "split": {
        "long": Budget(12, 360, 34, 32),
        "long, odd": Budget(12, 360, 34, 32),
    },
    "gradient": {
        "tiny": Budget(36, 0, 45, 32),
        "short": Budget(35, 0, 54, 32),
        "tiny, odd": Budget(71.5, 0, 68, 28),
        "short, odd": Budget(67.5, 0, 66, 28),
        "tiny, sliced": Budget(66, 0, 68, 32),
        "short, sliced": Budget(39.5, 0, 60, 64),
        "long": Budget(22, 220, 66, 24),
        "long, odd": Budget(22, 220, 66, 24),
        "long, sliced": Budget(20.5, 200, 64, 32),
        "class-major": Budget(18, 370, 76, 24),
        "class-major, odd": Budget(28.5, 240, 34, 8),
    },
    "value_and_gradient": {
        "tiny": Budget(71.5, 0, 47, 32),
        "short": Budget(77, 0, 60, 32),
        "tiny, odd": Budget(162, 0, 106, 24),
        "short, odd": Budget(131.5, 0, 64, 32),
        "long": Budget(32, 500, 58, 32),
        "long, odd": Budget(32, 420, 58, 32),
    },
}
