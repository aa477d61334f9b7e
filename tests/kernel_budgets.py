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
    under_way: int  # KiB that the threads of a multiprocessor load in one turn, at least


NVIDIA = {
    "statistics": {
        "tiny": Budget(43, 0, 102, 50),
        "short": Budget(14, 330, 72, 56),
        "tiny, odd": Budget(48, 0, 100, 56),
        "short, odd": Budget(16, 280, 70, 56),
        "tiny, sliced": Budget(42.5, 0, 80, 56),
        "short, sliced": Budget(13.5, 280, 65, 56),
        "long": Budget(9.5, 440, 64, 32),
        "long, odd": Budget(9.5, 400, 64, 32),
        "class-major": Budget(14.5, 1540, 127, 32),
        "class-major, odd": Budget(39.5, 430, 64, 8),
    },
    "split": {
        "long": Budget(9.5, 240, 64, 40),
        "long, odd": Budget(9.5, 240, 64, 40),
    },
    "gradient": {
        "tiny": Budget(21.5, 100, 128, 42),
        "short": Budget(15.5, 120, 66, 64),
        "tiny, odd": Budget(42.5, 90, 168, 17),
        "short, odd": Budget(28.5, 160, 128, 32),
        "tiny, sliced": Budget(33, 90, 168, 18),
        "short, sliced": Budget(21, 170, 153, 24),
        "long": Budget(10, 190, 64, 32),
        "long, odd": Budget(10, 190, 64, 32),
        "long, sliced": Budget(16.5, 190, 64, 32),
        "class-major": Budget(16, 440, 127, 32),
        "class-major, odd": Budget(26, 350, 72, 7),
    },
    "value_and_gradient": {
        "tiny": Budget(62, 0, 211, 32),
        "short": Budget(34, 0, 128, 32),
        "tiny, odd": Budget(61.5, 0, 213, 36),
        "short, odd": Budget(34.5, 0, 128, 32),
        "long": Budget(19.5, 470, 64, 32),
        "long, odd": Budget(19.5, 370, 64, 32),
    },
}

# A gfx942 has no instruction that rounds to bfloat16, and 128 registers a thread where half its warps run.
AMD = {
    "statistics": {
        "tiny": Budget(40, 250, 59, 64),
        "short": Budget(19, 310, 60, 64),
        "tiny, odd": Budget(47, 250, 63, 64),
        "short, odd": Budget(25.5, 250, 64, 64),
        "tiny, sliced": Budget(46, 250, 58, 64),
        "short, sliced": Budget(24.5, 250, 56, 64),
        "long": Budget(12, 470, 44, 32),
        "long, odd": Budget(12, 420, 44, 32),
        "class-major": Budget(54, 570, 81, 20),
        "class-major, odd": Budget(44, 370, 40, 8),
    },
    "split": {
        "long": Budget(12, 350, 34, 32),
        "long, odd": Budget(12, 350, 34, 32),
    },
    "gradient": {
        "tiny": Budget(25, 100, 70, 64),
        "short": Budget(20.5, 90, 58, 64),
        "tiny, odd": Budget(69, 120, 98, 16),
        "short, odd": Budget(40, 100, 82, 40),
        "tiny, sliced": Budget(43, 120, 63, 32),
        "short, sliced": Budget(38, 140, 48, 32),
        "long": Budget(21.5, 210, 57, 32),
        "long, odd": Budget(21.5, 210, 57, 32),
        "long, sliced": Budget(19.5, 200, 62, 32),
        "class-major": Budget(18, 330, 67, 28),
        "class-major, odd": Budget(28.5, 240, 34, 8),
    },
    "value_and_gradient": {
        "tiny": Budget(53, 0, 68, 64),
        "short": Budget(45, 0, 59, 64),
        "tiny, odd": Budget(57.5, 0, 74, 64),
        "short, odd": Budget(45, 0, 62, 64),
        "long": Budget(32, 410, 59, 32),
        "long, odd": Budget(32, 380, 59, 32),
    },
}
