"""The sum of a loss over its rows, or its mean, from the partial sums of the forward pass."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold_kernel(state_pointer, partials, folded, blocks, BLOCK: tl.constexpr):
    """[2, blocks] partial losses and counts to one of each a program, so that one program can sum up what is left.

    ``partials`` and ``folded`` are where they begin.
    """
    program = tl.program_id(0).to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    partials_pointer = state_pointer + partials
    loss = tl.load(partials_pointer + place, mask=place < blocks, other=0.0)
    count = tl.load(partials_pointer + blocks + place, mask=place < blocks, other=0.0)
    tl.store(state_pointer + folded + program, tl.sum(loss, 0))
    tl.store(state_pointer + folded + tl.num_programs(0) + program, tl.sum(count, 0))


@triton.jit
def reduce_kernel(state_pointer, loss_pointer, partials, blocks, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the partial losses, or their mean; and behind the partial sums, for the backward pass, what a row's
    loss is multiplied by in it.

    One program: the order of summation is fixed, so results are reproducible bit for bit.
    """
    dtype: tl.constexpr = state_pointer.dtype.element_ty
    loss = tl.zeros([BLOCK], dtype)
    count = tl.zeros([BLOCK], dtype)
    partials_pointer = state_pointer + partials
    for start in range(0, blocks, BLOCK):
        place = start + tl.arange(0, BLOCK)
        loss += tl.load(partials_pointer + place, mask=place < blocks, other=0.0)
        count += tl.load(partials_pointer + blocks + place, mask=place < blocks, other=0.0)
    result = tl.sum(loss, 0)
    if MEAN:
        rows = tl.sum(count, 0)
        result /= rows  # every row ignored: the mean is 0 / 0, and the gradient zero
        tl.store(partials_pointer + 2 * blocks, 1 / tl.maximum(rows, 1.0))
    else:
        tl.store(partials_pointer + 2 * blocks, 1.0)
    tl.store(loss_pointer, result)
