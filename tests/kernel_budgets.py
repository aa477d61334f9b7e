"""What the kernels may take, of every layout: the most over all numbers of classes, dtypes, calls and targets.

Tighten them when a kernel gets better. What they mean for a GPU is predicted in docs/kernels.md. Rows of up to 32
classes are tiny: on NVIDIA GPUs a program of the forward pass has as many of them as threads, and takes none in turn.
Registers matter as far as they cost threads, and those as far as they have less under way.
"""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    loop: float  # instructions a logit in a turn of the main loop, or where there is none of all, at most
    once: int  # instructions of a thread beside the turns, of a row and of a program, at most
    registers: int  # of a thread, at most
    under_way: int  # KiB that the threads of a multiprocessor load in a turn, over their waits in it, at least


NVIDIA = {
    "statistics": {
        "tiny": Budget(42.5, 0, 83, 16),
        "short": Budget(14, 310, 66, 32),
        "tiny, odd": Budget(47, 0, 96, 18),
        "short, odd": Budget(16.5, 270, 79, 23),
        "tiny, sliced": Budget(44.5, 0, 78, 21),
        "short, sliced": Budget(12, 240, 75, 32),
        "long": Budget(9.5, 390, 64, 32),
        "long, odd": Budget(9.5, 370, 64, 32),
        "class-major": Budget(12.5, 1130, 128, 64),
        "class-major, odd": Budget(15.5, 500, 54, 40),
    },
    "split": {
        "long": Budget(9.5, 220, 64, 40),
        "long, odd": Budget(9.5, 220, 64, 40),
    },
    "gradient": {
        "tiny": Budget(22.5, 0, 107, 21),
        "short": Budget(15, 0, 80, 32),
        "tiny, odd": Budget(42, 90, 138, 8),
        "short, odd": Budget(27.5, 0, 118, 4),
        "tiny, sliced": Budget(28, 90, 138, 32),
        "short, sliced": Budget(14, 0, 80, 32),
        "long": Budget(10, 190, 64, 32),
        "long, odd": Budget(10, 190, 64, 32),
        "class-major": Budget(15.5, 480, 128, 24),
        "class-major, odd": Budget(19, 450, 64, 16),
    },
    "value_and_gradient": {
        "tiny": Budget(59.5, 0, 212, 10),
        "short": Budget(32.5, 0, 214, 10),
        "tiny, odd": Budget(60, 0, 201, 10),
        "short, odd": Budget(32.5, 0, 206, 10),
        "long": Budget(19.5, 410, 62, 32),
        "long, odd": Budget(19.5, 350, 62, 32),
    },
}

# A gfx942 has no instruction that rounds to bfloat16, and 128 registers a thread where half its warps run.
AMD = {
    "statistics": {
        "tiny": Budget(37.5, 250, 56, 64),
        "short": Budget(19.5, 300, 67, 64),
        "tiny, odd": Budget(42.5, 240, 58, 64),
        "short, odd": Budget(25, 240, 65, 64),
        "tiny, sliced": Budget(41.5, 240, 52, 64),
        "short, sliced": Budget(17.5, 240, 63, 128),
        "long": Budget(13, 460, 44, 32),
        "long, odd": Budget(13, 420, 44, 32),
        "class-major": Budget(15.5, 1090, 98, 32),
        "class-major, odd": Budget(14.5, 460, 62, 64),
    },
    "split": {
        "long": Budget(12.5, 340, 34, 32),
        "long, odd": Budget(12.5, 340, 34, 32),
    },
    "gradient": {
        "tiny": Budget(28.5, 0, 53, 64),
        "short": Budget(23.5, 0, 52, 64),
        "tiny, odd": Budget(68.5, 120, 98, 16),
        "short, odd": Budget(38, 0, 66, 64),
        "tiny, sliced": Budget(42, 90, 66, 32),
        "short, sliced": Budget(25.5, 0, 54, 128),
        "long": Budget(18.5, 220, 61, 32),
        "long, odd": Budget(18.5, 220, 61, 32),
        "class-major": Budget(20, 450, 84, 40),
        "class-major, odd": Budget(25.5, 440, 64, 32),
    },
    "value_and_gradient": {
        "tiny": Budget(51, 0, 69, 64),
        "short": Budget(39.5, 0, 91, 64),
        "tiny, odd": Budget(56, 0, 78, 64),
        "short, odd": Budget(41.5, 0, 90, 64),
        "long": Budget(30, 410, 63, 32),
        "long, odd": Budget(30, 410, 63, 32),
    },
}
