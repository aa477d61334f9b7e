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
        "short": Budget(27.5, 360, 96, 32),
        "tiny, odd": Budget(55.5, 0, 64, 48),
        "short, odd": Budget(34, 340, 66, 32),
        "tiny, sliced": Budget(48, 320, 56, 48),
        "short, sliced": Budget(15.5, 290, 64, 64),
        "long": Budget(10.5, 450, 64, 32),
        "long, odd": Budget(10.5, 420, 64, 32),
        "class-major": Budget(16.5, 1550, 139, 12),
        "class-major, odd": Budget(39.5, 440, 64, 8),
    },
    "split": {
        "long": Budget(10.5, 240, 64, 48),
        "long, odd": Budget(10.5, 240, 64, 48),
    },
    "gradient": {
        "tiny": Budget(27.5, 0, 64, 48),
        "short": Budget(25, 0, 62, 32),
        "tiny, odd": Budget(51.5, 0, 134, 12),
        "short, odd": Budget(60.5, 0, 168, 12),
        "tiny, sliced": Budget(41.5, 0, 134, 24),
        "short, sliced": Budget(23.5, 0, 80, 50),
        "long": Budget(10.5, 170, 64, 32),
        "long, odd": Budget(10.5, 170, 64, 32),
        "long, sliced": Budget(16.5, 170, 64, 32),
        "class-major": Budget(18, 450, 94, 20),
        "class-major, odd": Budget(26.5, 350, 72, 7),
    },
    "value_and_gradient": {
        "tiny": Budget(64, 0, 96, 24),
        "short": Budget(73.5, 0, 128, 28),
        "tiny, odd": Budget(122, 0, 136, 20),
        "short, odd": Budget(105, 0, 115, 20),
        "long": Budget(22, 490, 74, 32),
        "long, odd": Budget(22, 380, 74, 32),
    },
}

# A gfx942 has no instruction that rounds to bfloat16, and 128 registers a thread where half its warps run.
AMD = {
    "statistics": {
        "tiny": Budget(83, 0, 40, 32),
        "short": Budget(31.5, 380, 62, 32),
        "tiny, odd": Budget(89, 0, 40, 32),
        "short, odd": Budget(41, 370, 52, 32),
        "tiny, sliced": Budget(89, 360, 40, 32),
        "short, sliced": Budget(23, 300, 50, 64),
        "long": Budget(12, 520, 48, 32),
        "long, odd": Budget(12, 480, 48, 32),
        "class-major": Budget(54, 570, 81, 20),
        "class-major, odd": Budget(44, 480, 40, 8),
    },
    "split": {
        "long": Budget(12, 350, 34, 32),
        "long, odd": Budget(12, 350, 34, 32),
    },
    "gradient": {
        "tiny": Budget(36, 0, 45, 32),
        "short": Budget(35, 0, 54, 32),
        "tiny, odd": Budget(71.5, 0, 68, 28),
        "short, odd": Budget(67.5, 0, 66, 28),
        "tiny, sliced": Budget(66, 0, 68, 32),
        "short, sliced": Budget(39.5, 0, 60, 64),
        "long": Budget(22, 210, 66, 24),
        "long, odd": Budget(22, 210, 66, 24),
        "long, sliced": Budget(20.5, 200, 64, 32),
        "class-major": Budget(18, 370, 76, 24),
        "class-major, odd": Budget(28.5, 240, 34, 8),
    },
    "value_and_gradient": {
        "tiny": Budget(71.5, 0, 47, 32),
        "short": Budget(77, 0, 60, 32),
        "tiny, odd": Budget(148, 0, 64, 32),
        "short, odd": Budget(126, 0, 79, 32),
        "long": Budget(32, 480, 58, 32),
        "long, odd": Budget(32, 400, 58, 32),
    },
}
