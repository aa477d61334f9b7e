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
        "tiny": Budget(43, 0, 95, 16),
        "short": Budget(13.5, 330, 96, 32),
        "tiny, odd": Budget(47, 0, 106, 16),
        "short, odd": Budget(15.5, 270, 99, 17),
        "tiny, sliced": Budget(43.5, 0, 86, 16),
        "short, sliced": Budget(11.5, 270, 99, 25),
        "long": Budget(9.5, 430, 64, 32),
        "long, odd": Budget(9.5, 390, 64, 32),
        "class-major": Budget(13, 1470, 122, 32),
        "class-major, odd": Budget(15, 550, 55, 40),
    },
    "split": {
        "long": Budget(9.5, 250, 48, 40),
        "long, odd": Budget(9.5, 250, 48, 40),
    },
    "gradient": {
        "tiny": Budget(22, 100, 128, 23),
        "short": Budget(15.5, 120, 72, 32),
        "tiny, odd": Budget(42, 90, 145, 9),
        "short, odd": Budget(29.5, 140, 127, 6),
        "tiny, sliced": Budget(28, 90, 140, 32),
        "short, sliced": Budget(14, 140, 117, 34),
        "long": Budget(10, 180, 64, 32),
        "long, odd": Budget(10, 180, 64, 32),
        "class-major": Budget(16, 470, 128, 24),
        "class-major, odd": Budget(19.5, 450, 64, 16),
    },
    "value_and_gradient": {
        "tiny": Budget(61.5, 0, 211, 10),
        "short": Budget(33.5, 0, 227, 9),
        "tiny, odd": Budget(61, 0, 204, 11),
        "short, odd": Budget(32.5, 0, 219, 10),
        "long": Budget(19.5, 450, 60, 32),
        "long, odd": Budget(19.5, 360, 60, 32),
    },
}

# A gfx942 has no instruction that rounds to bfloat16, and 128 registers a thread where half its warps run.
AMD = {
    "statistics": {
        "tiny": Budget(39, 250, 56, 64),
        "short": Budget(19, 300, 66, 64),
        "tiny, odd": Budget(43, 240, 58, 64),
        "short, odd": Budget(24.5, 240, 64, 64),
        "tiny, sliced": Budget(42.5, 240, 51, 64),
        "short, sliced": Budget(17, 240, 61, 128),
        "long": Budget(12.5, 460, 42, 32),
        "long, odd": Budget(12.5, 410, 42, 32),
        "class-major": Budget(16.5, 1080, 72, 56),
        "class-major, odd": Budget(15.5, 480, 62, 64),
    },
    "split": {
        "long": Budget(12.5, 340, 34, 32),
        "long, odd": Budget(12.5, 340, 34, 32),
    },
    "gradient": {
        "tiny": Budget(25, 100, 70, 64),
        "short": Budget(20, 80, 66, 64),
        "tiny, odd": Budget(69, 110, 98, 16),
        "short, odd": Budget(35.5, 90, 85, 48),
        "tiny, sliced": Budget(43.5, 90, 66, 32),
        "short, sliced": Budget(24, 90, 69, 112),
        "long": Budget(19, 210, 64, 32),
        "long, odd": Budget(19, 210, 64, 32),
        "class-major": Budget(20.5, 450, 84, 40),
        "class-major, odd": Budget(25.5, 440, 64, 32),
    },
    "value_and_gradient": {
        "tiny": Budget(52, 0, 70, 64),
        "short": Budget(40.5, 0, 93, 64),
        "tiny, odd": Budget(56, 0, 75, 64),
        "short, odd": Budget(42, 0, 96, 64),
        "long": Budget(29.5, 400, 67, 24),
        "long, odd": Budget(29.5, 400, 67, 24),
    },
}
