"""Forward pass: one read of the logits yields (m, s, t) of every row, and from them its loss and its state.

Traffic: N K logits read once; O(N) written. Rows are read as :mod:`.monoid` tells, many of them, in turn, by a program.
What follows of a row, its loss and what the backward pass needs of it, is the same for all threads that have read it:
so it is left until each thread can do it for a row of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cot_kernels.backends.triton.arithmetic import log2, quotient
from cot_kernels.backends.triton.monoid import merge, read_one, read_row, read_side_by_side, read_whole_rows, settle
from cot_kernels.backends.triton.tiles import (
    ACCESS,
    FLOOR,
    LN2,
    base_across,
    each_across,
    hint,
    load_target_logits,
    load_targets,
    misalignment,
    row_pointers,
    rows_across,
    step_back,
)


@triton.jit
def row_values(target_logit, shift, total, moment, NARROW: tl.constexpr, HALF: tl.constexpr):
    """log2 s, S and b of rows, and whether their complement is empty: no class but the target's above the floor.

    NARROW: total and moment are relative to the level of the shift; see :mod:`.monoid`.
    """
    if NARROW:
        total, moment = settle(shift, total, moment)
    empty = shift <= FLOOR
    total = tl.where(empty, total * 0 + 1, total)  # a NaN total is no empty sum; the moment of one is 0
    log_total = log2(total, HALF)
    # Of what is left of two equal numbers; and not to be contracted with what follows, here so and there otherwise.
    negentropy = tl.minimum((quotient(moment, total, HALF) - log_total) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    log_odds = log_total * LN2 - (target_logit - shift)
    return log_total, negentropy, log_odds, empty


@triton.jit
def finish(
    rows,
    inside,
    num_rows,
    target,
    wanted,
    target_logit,
    shift,
    total,
    moment,
    state_pointer,
    values_pointer,
    partials,
    block,
    blocks,
    scale,
    parameter,
    exponent,
    OBJECTIVE: tl.constexpr,
    REDUCES: tl.constexpr,
    NARROW: tl.constexpr,
    HALF: tl.constexpr,
):
    """From (m, s, t) to the row's loss, and to the five numbers the backward pass needs of it.

    state [5, N]: shift m; log2 s; slope f_S ln 2; offset f_S S - f_L; f_g. With them, for x = y_j - log2 s,
    dl/dz_j = 2^x (slope x - offset). An infinite log2 s, which no row has, marks the ignored ones. Without an
    objective the statistics (z_g, L, S) themselves are written. Where it reduces, the partial sums of the
    block are written too.
    """
    log_total, negentropy, log_odds, empty = row_values(target_logit, shift, total, moment, NARROW, HALF)

    state = state_pointer + rows
    tl.store(state, shift, mask=inside)
    tl.store(state + num_rows, tl.where(wanted, log_total, float("inf")), mask=inside)
    if OBJECTIVE is None:
        nan = float("nan")
        stray = target < 0
        lse = tl.where(empty, log_total - float("inf"), shift + log_total * LN2)  # NaN where all logits are
        tl.store(values_pointer + rows, tl.where(wanted, target_logit, 0.0), mask=inside)
        tl.store(values_pointer + num_rows + rows, tl.where(wanted, tl.where(stray, nan, lse), 0.0), mask=inside)
        kept = tl.where(wanted, tl.where(stray, nan, negentropy), 0.0)
        tl.store(values_pointer + 2 * num_rows + rows, kept, mask=inside)
    else:
        # The state is handed on whole: what an ignored row holds must not show in it.
        log_odds = tl.where(wanted, log_odds, 0.0)
        negentropy = tl.where(wanted, negentropy, 0.0)
        # tl.full, for it takes a float64 argument as well as the Python float of the interpreter without rounding.
        loss, d_log_odds, d_negentropy = OBJECTIVE(
            log_odds,
            negentropy,
            tl.full(rows.shape, scale, log_odds.dtype),
            tl.full(rows.shape, parameter, log_odds.dtype),
            tl.full(rows.shape, exponent, log_odds.dtype),
            HALF,
        )
        loss = tl.where(wanted, loss, 0.0)
        tl.store(state + 2 * num_rows, d_negentropy * LN2, mask=inside)
        tl.store(state + 3 * num_rows, d_negentropy * negentropy - d_log_odds, mask=inside)
        tl.store(state + 4 * num_rows, -d_log_odds, mask=inside)
        if REDUCES:
            place = state_pointer + partials + block
            tl.store(place, tl.sum(loss, 0))
            tl.store(place + blocks, tl.sum(tl.where(wanted, 1.0, 0.0), 0))
        else:
            tl.store(values_pointer + rows, loss, mask=inside)


@triton.jit(do_not_specialize=["turns"])
def statistics_kernel(
    logits_pointer,
    target_pointer,
    state_pointer,
    values_pointer,  # row losses, unless it reduces; or the statistics
    num_rows,
    num_classes,
    inner,
    stride_n,
    stride_k,
    stride_d,
    ignore_index,
    scale: tl.float64,
    parameter: tl.float64,
    exponent: tl.float64,
    partials,  # where behind the state the partial sums begin, [2, blocks]: of the losses, and of the rows counted
    turns,
    OBJECTIVE: tl.constexpr,
    REDUCES: tl.constexpr,
    LONG: tl.constexpr,
    ACROSS: tl.constexpr,
    PLANE: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
    PIECES: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """The values of ``turns`` times ROWS rows, read ROWS at a time and finished all at once.

    Of TURNS times ROWS rows, the most there may be, every thread finishes one; of the ROWS of a single turn many
    threads would finish the same.
    """
    block = tl.program_id(0).to(tl.int64)
    num_rows = tl.cast(num_rows, tl.int64)  # 5 N entries of state pass 2^31
    half: tl.constexpr = logits_pointer.dtype.element_ty.primitive_bitwidth == 16
    dtype: tl.constexpr = tl.float64 if logits_pointer.dtype.element_ty == tl.float64 else tl.float32
    if TURNS == 1:
        rows, inside, plane, before = rows_across(block, num_rows, inner, ROWS, PLANE)
        target, wanted = load_targets(target_pointer, rows, inside, num_classes, ignore_index)
        if ACROSS:
            base = base_across(logits_pointer, rows, plane, before, inner, stride_n, stride_d, PLANE)
            shift, total, moment = read_side_by_side(
                base, target, inside, before + ROWS <= inner, wanted, num_classes, stride_k, stride_d,
                dtype, ROWS, VEC, PLANE,
            )  # fmt: skip
            base = each_across(base, stride_d, ROWS, PLANE)
        elif ROWS == 1:
            shift, total, moment = read_one(
                logits_pointer, target_pointer, block, num_classes, inner, stride_n, stride_d,
                ignore_index, dtype, LONG, PIECES, LANES, VEC, DEPTH, ALIGN, HEADS, NARROW,
            )  # fmt: skip
            base = row_pointers(logits_pointer, rows, inner, stride_n, stride_d)
        else:
            base = row_pointers(logits_pointer, rows, inner, hint(stride_n, ALIGN), stride_d)
            shift, total, moment = read_whole_rows(
                base, target, wanted, num_classes, dtype, PIECES, ROWS, LANES * VEC, VEC, ALIGN, HEADS, NARROW
            )
        target_logit = load_target_logits(base, target, wanted, stride_k, dtype)
    else:
        first = block * (turns * ROWS)
        order = tl.arange(0, TURNS * ROWS)
        rows = first + order
        inside = (order < turns * ROWS) & (rows < num_rows)
        target, wanted = load_targets(target_pointer, rows, inside, num_classes, ignore_index)
        # Asked for before the rows are read: where rows are few, its latency would show.
        base = row_pointers(logits_pointer, rows, inner, stride_n, stride_d)
        target_logit = load_target_logits(base, target, wanted, stride_k, dtype)
        shifts = tl.full([TURNS, ROWS], FLOOR, dtype)
        totals = tl.zeros([TURNS, ROWS], dtype)
        moments = tl.zeros([TURNS, ROWS], dtype)
        for turn in range(tl.minimum(turns, tl.cdiv(num_rows - first, ROWS).to(tl.int32))):
            if ROWS == 1:
                shift, total, moment = read_one(
                    logits_pointer, target_pointer, first + turn, num_classes, inner, stride_n, stride_d,
                    ignore_index, dtype, LONG, PIECES, LANES, VEC, DEPTH, ALIGN, HEADS, NARROW,
                )  # fmt: skip
            else:
                some = first + turn * ROWS + tl.arange(0, ROWS)
                some_targets, asked = load_targets(target_pointer, some, some < num_rows, num_classes, ignore_index)
                some_base = row_pointers(logits_pointer, some, inner, hint(stride_n, ALIGN), stride_d)
                shift, total, moment = read_whole_rows(
                    some_base, some_targets, asked, num_classes,
                    dtype, PIECES, ROWS, LANES * VEC, VEC, ALIGN, HEADS, NARROW,
                )  # fmt: skip
            here = (tl.arange(0, TURNS) == turn)[:, None]
            shifts = tl.where(here, shift[None, :], shifts)
            totals = tl.where(here, total[None, :], totals)
            moments = tl.where(here, moment[None, :], moments)
        shift = tl.reshape(shifts, [TURNS * ROWS])
        total = tl.reshape(totals, [TURNS * ROWS])
        moment = tl.reshape(moments, [TURNS * ROWS])
    finish(
        rows, inside, num_rows, target, wanted, target_logit, shift, total, moment,
        state_pointer, values_pointer, partials, block, tl.num_programs(0),
        scale, parameter, exponent, OBJECTIVE, REDUCES, NARROW, half,
    )  # fmt: skip


@triton.jit
def split_kernel(
    logits_pointer,
    target_pointer,
    parts_pointer,  # [3, N, splits] running statistics
    num_rows,
    num_classes,
    inner,
    stride_n,
    stride_d,
    ignore_index,
    splits,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
    NARROW: tl.constexpr,
):
    """(m, s, t) of one of the splits of a long row."""
    BLOCK: tl.constexpr = LANES * VEC
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    split = (program - row * splits).to(tl.int32)
    num_rows = tl.cast(num_rows, tl.int64)
    dtype: tl.constexpr = tl.float64 if logits_pointer.dtype.element_ty == tl.float64 else tl.float32

    target, wanted = load_targets(target_pointer, row, row < num_rows, num_classes, ignore_index)
    base = row_pointers(logits_pointer, row, inner, stride_n, stride_d)
    head = misalignment(base, ALIGN, ACCESS)
    tiles = tl.where(wanted, tl.cdiv(num_classes + head, BLOCK), 0)
    share = tl.cdiv(tiles, splits)
    first = split * share
    shift, total, moment = read_row(
        step_back(base - head, ALIGN), head, target, first, tl.minimum(tiles, first + share), num_classes,
        dtype, LANES, VEC, DEPTH, NARROW, "",
    )  # fmt: skip
    place = parts_pointer + program + tl.arange(0, 1)
    tl.store(place, shift)
    tl.store(place + num_rows * splits, total)
    tl.store(place + 2 * num_rows * splits, moment)


@triton.jit
def merge_kernel(
    logits_pointer,
    target_pointer,
    parts_pointer,
    state_pointer,
    values_pointer,  # row losses, unless it reduces; or the statistics
    num_rows,
    num_classes,
    inner,
    stride_n,
    stride_k,
    stride_d,
    ignore_index,
    scale: tl.float64,
    parameter: tl.float64,
    exponent: tl.float64,
    partials,
    splits,
    OBJECTIVE: tl.constexpr,
    REDUCES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,  # splits, rounded up to a power of two
    NARROW: tl.constexpr,
):
    """Merges the splits of ROWS rows and finishes them."""
    block = tl.program_id(0).to(tl.int64)
    num_rows = tl.cast(num_rows, tl.int64)
    half: tl.constexpr = logits_pointer.dtype.element_ty.primitive_bitwidth == 16
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    target, wanted = load_targets(target_pointer, rows, inside, num_classes, ignore_index)
    dtype: tl.constexpr = tl.float64 if logits_pointer.dtype.element_ty == tl.float64 else tl.float32

    order = tl.arange(0, SPLITS)
    mask = inside[:, None] & (order < splits)[None, :]
    place = parts_pointer + rows[:, None] * splits + order[None, :]
    shift = tl.load(place, mask=mask, other=FLOOR)
    total = tl.load(place + num_rows * splits, mask=mask, other=0.0)
    moment = tl.load(place + 2 * num_rows * splits, mask=mask, other=0.0)
    shift, total, moment = merge(shift, total, moment, 1, NARROW)

    base = row_pointers(logits_pointer, rows, inner, stride_n, stride_d)
    target_logit = load_target_logits(base, target, wanted, stride_k, dtype)
    finish(
        rows, inside, num_rows, target, wanted, target_logit, shift, total, moment,
        state_pointer, values_pointer, partials, block, tl.num_programs(0),
        scale, parameter, exponent, OBJECTIVE, REDUCES, NARROW, half,
    )  # fmt: skip
