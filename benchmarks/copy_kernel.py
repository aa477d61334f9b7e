"""The kernel of :mod:`.roof`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(destination_pointer, source_pointer, count, BLOCK: tl.constexpr):
    """BLOCK elements from one contiguous tensor to another."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    tl.store(destination_pointer + place, tl.load(source_pointer + place, mask=inside), mask=inside)
