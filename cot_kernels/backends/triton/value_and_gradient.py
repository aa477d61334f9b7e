"""Values and gradient of rows in one kernel that overwrites the logits: for the private logits of a linear loss.

Traffic: N K logits read and N K gradients written. A program reads its row for the statistics and reads it again, from
the end that is still in the L2 cache, for the gradient: at K = 131072 in bf16 a row is 256 KiB, and the rows that the
132 multiprocessors of an H200 hold at once, 33 MiB, fit its 50 MiB. Rows of one tile stay in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cot_kernels.backends.triton.gradient import write_pieces, write_tile
from cot_kernels.backends.triton.monoid import of_pieces, read_row
from cot_kernels.backends.triton.objectives import cross_entropy
from cot_kernels.backends.triton.statistics import row_values
from cot_kernels.backends.triton.tiles import (
    ACCESS,
    LN2,
    first_classes,
    hint,
    load_pieces,
    load_target_logits,
    load_targets,
    misalignment,
    step_back,
)


@triton.jit
def value_and_gradient_kernel(
    logits_pointer,  # [N, K]; overwritten where there is a gradient to form
    target_pointer,
    upstream_pointer,  # [N], read where given: the derivative of a scalar by each row's loss
    values_pointer,  # [3, N]: loss, cross-entropy, negentropy
    num_rows,
    num_classes,
    stride_n,
    upstream_stride,
    ignore_index,
    scale: tl.float64,
    parameter: tl.float64,
    exponent: tl.float64,
    OBJECTIVE: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    GRADIENT: tl.constexpr,
    LONG: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,  # the last access of a short row holds what are no classes
    NARROW: tl.constexpr,
):
    """ROWS rows: their values, and their gradient in place of their logits, and of what pads them to 16 bytes."""
    WIDTH: tl.constexpr = LANES * VEC
    block = tl.program_id(0).to(tl.int64)
    num_rows = tl.cast(num_rows, tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    target, wanted = load_targets(target_pointer, rows, inside, num_classes, ignore_index)
    dtype: tl.constexpr = tl.float64 if logits_pointer.dtype.element_ty == tl.float64 else tl.float32
    target_logit = load_target_logits(logits_pointer + rows * stride_n, target, wanted, 1, dtype)
    # Asked for before the row is read: after it, its latency would show.
    upstream = tl.full([ROWS], 1.0, dtype)
    if HAS_UPSTREAM:
        upstream = tl.load(upstream_pointer + rows * upstream_stride, mask=wanted, other=0.0).to(dtype)

    if LONG:
        one_target, one_wanted = load_targets(target_pointer, block, block < num_rows, num_classes, ignore_index)
        base = logits_pointer + block * stride_n
        head = misalignment(base, ALIGN, ACCESS)  # none: but it is this from which the compiler knows
        aligned = step_back(base, ALIGN)
        tiles = tl.cdiv(num_classes + head, WIDTH)
        read = tl.where(one_wanted, tiles, 0)
        eviction: tl.constexpr = "evict_last" if GRADIENT else ""
        shift, total, moment = read_row(
            aligned, head, one_target, 0, read, num_classes, dtype, LANES, VEC, DEPTH, NARROW, eviction
        )
    else:
        base = logits_pointer + rows * hint(stride_n, ALIGN)
        head = first_classes(base, ROWS, VEC, False)
        padded = tl.cdiv(num_classes, VEC) * VEC
        nothing: tl.constexpr = -float("inf")
        pieces = load_pieces(base, head, wanted, padded, PIECES, WIDTH, VEC, ALIGN, False, nothing, nothing)
        shift, total, moment = of_pieces(
            pieces, head, target, num_classes, dtype, PIECES, ROWS, WIDTH, VEC, False, TAIL, NARROW
        )

    # Of an ignored row nothing was read: its negentropy is 0.
    half: tl.constexpr = logits_pointer.dtype.element_ty.primitive_bitwidth == 16
    log_total, negentropy, log_odds, _ = row_values(target_logit, shift, total, moment, NARROW, half)
    one, none = tl.full([ROWS], 1.0, dtype), tl.full([ROWS], 0.0, dtype)
    likelihood, _, _ = cross_entropy(log_odds, negentropy, one, none, none, half)
    loss, d_log_odds, d_negentropy = OBJECTIVE(
        log_odds,
        negentropy,
        tl.full([ROWS], scale, dtype),
        tl.full([ROWS], parameter, dtype),
        tl.full([ROWS], exponent, dtype),
        half,
    )
    place = values_pointer + rows
    tl.store(place, tl.where(wanted, loss, 0.0), mask=inside)
    tl.store(place + num_rows, tl.where(wanted, likelihood, 0.0), mask=inside)
    tl.store(place + 2 * num_rows, tl.where(wanted & (target < 0), float("nan"), negentropy), mask=inside)

    if GRADIENT:
        # From here on logits are lost: every thread must have read its own, and that of the target.
        tl.debug_barrier()
        slope = d_negentropy * LN2 * upstream
        offset = (d_negentropy * negentropy - d_log_odds) * upstream
        at_target = -d_log_odds * upstream
        if LONG:
            one_shift = tl.sum(shift, 0)
            one_log_total = tl.where(one_wanted, tl.sum(log_total, 0), float("inf"))
            one_slope = tl.sum(slope, 0)
            one_offset = tl.sum(offset, 0)
            one_at_target = tl.sum(at_target, 0)
            for turn in range(tiles):
                tile = tiles - 1 - turn
                pointers = aligned + tile * WIDTH
                write_tile(
                    pointers, pointers, tile * WIDTH - head, one_target, num_classes,
                    one_shift, one_log_total, one_slope, one_offset, one_at_target, WIDTH, VEC, ALIGN, "evict_first",
                )  # fmt: skip
        else:
            log_total = tl.where(wanted, log_total, float("inf"))
            write_pieces(
                pieces, base, head, target, inside, wanted, padded,
                shift, log_total, slope, offset, at_target, PIECES, ROWS, WIDTH, VEC, ALIGN, False,
            )  # fmt: skip
