"""What the kernels may take, of every layout: the most over all numbers of classes, dtypes, calls and targets.

Tighten them when a kernel gets better. What they mean for a GPU is predicted in docs/kernels.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    loop: float  # instructions a logit of a tile in a turn of the main loop, at most; of short rows, gradient: of all
    once: int  # instructions of a thread beside the turns, at most
    registers: int  # of a thread, at most
    under_way: int  # KiB that the threads of a multiprocessor load in one turn, at least


NVIDIA = {
    "statistics": {
        "short": Budget(14, 1110, 91, 32),
        "short, odd": Budget(20.5, 1150, 110, 28),
        "short, sliced": Budget(18.5, 680, 90, 28),
        "long": Budget(10.5, 460, 64, 32),
        "long, odd": Budget(10.5, 430, 64, 32),
        "class-major": Budget(16, 1590, 140, 12),
        "class-major, odd": Budget(39, 450, 64, 8),
    },
    "gradient": {
        "short": Budget(27.5, 0, 64, 32),
        "short, odd": Budget(60.5, 0, 168, 12),
        "short, sliced": Budget(41.5, 0, 134, 24),
        "long": Budget(11, 190, 64, 32),
        "long, odd": Budget(11, 190, 64, 32),
        "long, sliced": Budget(16.5, 170, 64, 32),
        "class-major": Budget(18, 470, 94, 20),
        "class-major, odd": Budget(26.5, 360, 72, 7),
    },
    "value_and_gradient": {
        "short": Budget(29.5, 970, 126, 32),
        "short, odd": Budget(32.5, 2070, 168, 12),
        "long": Budget(22, 510, 74, 32),
        "long, odd": Budget(22, 400, 74, 32),
    },
}

# A gfx942 has no instruction that rounds to bfloat16, and 128 registers a thread where half its warps run.
AMD = {
    "statistics": {
        "short": Budget(15, 640, 58, 32),
        "short, odd": Budget(22, 690, 73, 32),
        "short, sliced": Budget(22, 650, 63, 32),
        "long": Budget(12, 510, 36, 32),
        "long, odd": Budget(12, 460, 34, 32),
        "class-major": Budget(54, 590, 81, 20),
        "class-major, odd": Budget(44, 500, 40, 8),
    },
    "gradient": {
        "short": Budget(36, 0, 54, 32),
        "short, odd": Budget(71.5, 0, 68, 28),
        "short, sliced": Budget(66, 0, 68, 32),
        "long": Budget(22, 80, 66, 24),
        "long, odd": Budget(22, 80, 66, 24),
        "long, sliced": Budget(20.5, 80, 64, 32),
        "class-major": Budget(18, 370, 76, 24),
        "class-major, odd": Budget(28.5, 240, 34, 8),
    },
    "value_and_gradient": {
        "short": Budget(32.5, 540, 70, 32),
        "short, odd": Budget(46, 960, 80, 28),
        "long": Budget(31.5, 520, 58, 32),
        "long, odd": Budget(31.5, 420, 58, 32),
    },
}
