"""Forward pass: one read of the logits yields (m, s, t) of every row, from which all losses follow.

    m = max_{j != g} z_j     s = sum_{j != g} 2^{y_j}     t = sum_{j != g} 2^{y_j} y_j,     y_j = (z_j - m) log2 e

Traffic: N K logits read once; O(N) written. The kernels count in units of log2, where the exponential is a single
instruction and the scaling by log2 e merges with the subtraction of the maximum.

A tile of BLOCK = LANES * VEC classes is folded into one running (m, s, t) a lane: the maximum over VEC neighbours,
which one thread holds, costs no exchange between threads, and one rescaling serves VEC classes. Lanes (and splits of a
row) are merged at the end by the rule of the monoid:

    m = max(m_1, m_2)    s = sum_i s_i 2^{m_i - m}    t = sum_i 2^{m_i - m} (t_i + (m_i - m) s_i)
"""

from __future__ import annotations

import triton
import triton.language as tl

from cot_kernels.backends.triton.tiles import (
    FLOOR,
    LN2,
    LOG2E,
    first_classes,
    hint,
    is_interior,
    load_rows,
    load_target_logits,
    load_targets,
    misalignment,
    row_pointers,
    step_back,
)


@triton.jit
def merge(shift, total, moment, axis: tl.constexpr):
    """Merges the running statistics along an axis."""
    merged = tl.max(shift, axis)
    gap = shift - tl.expand_dims(merged, axis)
    weight = tl.exp2(gap)
    return merged, tl.sum(total * weight, axis), tl.sum(weight * (moment + gap * total), axis)


@triton.jit
def finite(y):
    """Without -inf, for 0 * -inf would make the moment NaN. The NaN of a logit is let through."""
    return tl.maximum(y, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fold(z, shift, total, moment):
    """Folds a tile z [ROWS, LANES, VEC] into the running statistics [ROWS, LANES].

    What is carried is the shift m log2 e as it was rounded, and not m: the compiler would contract m log2 e - shift to
    one multiply-add, whose product is not rounded. The gap of equal maxima would be that rounding instead of 0, once
    a tile, and of lanes that are still at the floor 6e21, with 0 * inf behind it.
    """
    raised = tl.maximum(shift, tl.max(z, 2) * LOG2E)
    y = finite(z * LOG2E - raised[:, :, None])
    weight = tl.exp2(y)
    gap = shift - raised
    rescale = tl.exp2(gap)
    moment = rescale * (moment + gap * total) + tl.sum(weight * y, 2)
    return raised, rescale * total + tl.sum(weight, 2), moment


@triton.jit
def read_row(
    aligned,
    head,
    target,
    first,
    last,
    num_classes,
    dtype: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """(m, s, t), [1] each, of the tiles ``first`` to ``last`` of one row; see :func:`.tiles.step_back`."""
    BLOCK: tl.constexpr = LANES * VEC
    shift = tl.full([1, LANES], FLOOR, dtype)
    total = tl.zeros([1, LANES], dtype)
    moment = tl.zeros([1, LANES], dtype)
    columns = tl.arange(0, BLOCK)
    for tile in range(first, last):
        start = tile * BLOCK - head
        pointers = aligned + (tile * BLOCK + columns)
        if is_interior(start, target, num_classes, BLOCK):
            z = tl.load(pointers, eviction_policy=EVICTION).to(dtype)
        else:
            classes = start + columns
            kept = (classes >= 0) & (classes < num_classes) & (classes != target)
            z = tl.load(pointers, mask=kept, other=-float("inf"), eviction_policy=EVICTION).to(dtype)
        shift, total, moment = fold(tl.reshape(z, [1, LANES, VEC]), shift, total, moment)
    return merge(shift, total, moment, 1)


@triton.jit
def of_row(head, target, num_classes, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Which of BLOCK places from the boundary before a row are classes of it, without the target: [ROWS, BLOCK].

    By a bit a place, an access at a time: cheaper than comparisons a place.
    """
    access = tl.arange(0, BLOCK // VEC)[None, :] * VEC
    before = tl.minimum(tl.maximum(head[:, None] - access, 0), VEC)
    after = tl.minimum(tl.maximum(head[:, None] + num_classes - access, 0), VEC)
    bits = (1 << after) - (1 << before)
    at = head[:, None] + target[:, None] - access
    bits &= ~tl.where((at >= 0) & (at < VEC), 1 << (at & (VEC - 1)), 0)
    kept = (bits[:, :, None] >> tl.arange(0, VEC)[None, None, :]) & 1
    return tl.reshape(kept, [ROWS, BLOCK]) != 0


@triton.jit
def of_whole_rows(
    z,
    classes,
    head,
    target,
    num_classes,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    HEADS: tl.constexpr,
):
    """(m, s, t) of ROWS rows that fit a tile, of what :func:`.tiles.load_rows` found there: nothing is rescaled."""
    kept = of_row(head, target, num_classes, ROWS, BLOCK, VEC) if HEADS else classes != target[:, None]
    z = tl.where(kept, z.to(dtype), -float("inf"))
    shift = tl.maximum(tl.max(z, 1) * LOG2E, FLOOR)
    y = finite(z * LOG2E - shift[:, None])
    weight = tl.exp2(y)
    return shift, tl.sum(weight, 1), tl.sum(weight * y, 1)


@triton.jit
def read_whole_rows(
    base,
    target,
    wanted,
    num_classes,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
):
    head = first_classes(base, ROWS, VEC, HEADS)
    z, classes, _ = load_rows(base, head, 0, wanted, num_classes, 1, BLOCK, VEC, ALIGN, HEADS, -float("inf"))
    return of_whole_rows(z, classes, head, target, num_classes, dtype, ROWS, BLOCK, VEC, HEADS)


@triton.jit
def read_side_by_side(
    base,
    target,
    inside,
    wanted,
    num_classes,
    stride_k,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
):
    """(m, s, t) of ROWS rows, of which each thread reads its own, class after class.

    One access may read several rows, whichever of them are wanted.
    """
    shift = tl.full([ROWS, 1], FLOOR, dtype)
    total = tl.zeros([ROWS, 1], dtype)
    moment = tl.zeros([ROWS, 1], dtype)
    head = first_classes(base, ROWS, VEC, False)
    for start in range(0, num_classes, VEC):
        z, classes, _ = load_rows(base, head, start, inside, num_classes, stride_k, VEC, VEC, 1, False, -float("inf"))
        kept = classes != target[:, None]
        kept &= wanted[:, None]
        z = tl.where(kept, z.to(dtype), -float("inf"))
        shift, total, moment = fold(tl.reshape(z, [ROWS, 1, VEC]), shift, total, moment)
    return merge(shift, total, moment, 1)


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
    ALIGN: tl.constexpr,
):
    """(m, s, t) of one of the splits of a long row."""
    BLOCK: tl.constexpr = LANES * VEC
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    split = (program - row * splits).to(tl.int32)
    num_rows = tl.cast(num_rows, tl.int64)
    dtype: tl.constexpr = tl.float64 if logits_pointer.dtype.element_ty == tl.float64 else tl.float32

    target, wanted, _ = load_targets(target_pointer, row, num_rows, num_classes, ignore_index)
    base = row_pointers(logits_pointer, row, inner, stride_n, stride_d)
    head = misalignment(base, ALIGN)
    tiles = tl.where(wanted, tl.cdiv(num_classes + head, BLOCK), 0)
    share = tl.cdiv(tiles, splits)
    first = split * share
    shift, total, moment = read_row(
        step_back(base, head, ALIGN), head, target, first, tl.minimum(tiles, first + share), num_classes,
        dtype, LANES, VEC, "",
    )  # fmt: skip
    place = parts_pointer + program + tl.arange(0, 1)
    tl.store(place, shift)
    tl.store(place + num_rows * splits, total)
    tl.store(place + 2 * num_rows * splits, moment)


@triton.jit
def read_one(
    logits_pointer,
    target_pointer,
    row,
    num_classes,
    inner,
    stride_n,
    stride_d,
    ignore_index,
    dtype: tl.constexpr,
    LONG: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
):
    """(m, s, t), [1] each, of a row; of an ignored one, without reading it."""
    BLOCK: tl.constexpr = LANES * VEC
    shift = tl.full([1], FLOOR, dtype)
    total = tl.zeros([1], dtype)
    moment = tl.zeros([1], dtype)
    wide_target = tl.load(target_pointer + row).to(tl.int64)
    if wide_target != ignore_index:
        target = wide_target.to(tl.int32)  # whichever class that is where it is out of range: the row will be NaN
        base = row_pointers(logits_pointer, row, inner, hint(stride_n, ALIGN), stride_d)
        if LONG:
            head = misalignment(base, ALIGN)
            shift, total, moment = read_row(
                step_back(base, head, ALIGN), head, target, 0, tl.cdiv(num_classes + head, BLOCK), num_classes,
                dtype, LANES, VEC, "",
            )  # fmt: skip
        else:
            one = tl.arange(0, 1)
            shift, total, moment = read_whole_rows(
                base + one, target + one, one == 0, num_classes, dtype, 1, BLOCK, VEC, ALIGN, HEADS
            )
    return shift, total, moment


@triton.jit
def read_several(
    logits_pointer,
    rows,
    target,
    wanted,
    num_rows,
    num_classes,
    inner,
    stride_n,
    stride_k,
    stride_d,
    dtype: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
):
    """(m, s, t) of ROWS short rows."""
    base = row_pointers(logits_pointer, rows, inner, hint(stride_n, ALIGN), stride_d)
    if ACROSS:
        shift, total, moment = read_side_by_side(
            base, target, rows < num_rows, wanted, num_classes, stride_k, dtype, ROWS, VEC
        )
    else:
        shift, total, moment = read_whole_rows(
            base, target, wanted, num_classes, dtype, ROWS, LANES * VEC, VEC, ALIGN, HEADS
        )
    return shift, total, moment


@triton.jit(do_not_specialize=["turns"])
def statistics_kernel(
    logits_pointer,
    target_pointer,
    state_pointer,
    values_pointer,  # row losses; where it reduces, [2, blocks] their sums and the rows counted; or the statistics
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
    turns,
    OBJECTIVE: tl.constexpr,
    REDUCES: tl.constexpr,
    LONG: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The values of ``turns`` times ROWS rows, read ROWS at a time and finished all at once.

    Of TURNS times ROWS rows, the most there may be, every thread finishes one; of the ROWS of a single turn many
    threads would finish the same.
    """
    block = tl.program_id(0).to(tl.int64)
    num_rows = tl.cast(num_rows, tl.int64)  # 5 N entries of state pass 2^31
    dtype: tl.constexpr = tl.float64 if logits_pointer.dtype.element_ty == tl.float64 else tl.float32
    if TURNS == 1:
        rows = block * ROWS + tl.arange(0, ROWS)
        target, wanted, stray = load_targets(target_pointer, rows, num_rows, num_classes, ignore_index)
        if ROWS == 1:
            shift, total, moment = read_one(
                logits_pointer, target_pointer, block, num_classes, inner, stride_n, stride_d,
                ignore_index, dtype, LONG, LANES, VEC, ALIGN, HEADS,
            )  # fmt: skip
        else:
            shift, total, moment = read_several(
                logits_pointer, rows, target, wanted, num_rows, num_classes, inner, stride_n, stride_k, stride_d,
                dtype, ACROSS, ROWS, LANES, VEC, ALIGN, HEADS,
            )  # fmt: skip
    else:
        first = block * (turns * ROWS)
        shifts = tl.full([TURNS, ROWS], FLOOR, dtype)
        totals = tl.zeros([TURNS, ROWS], dtype)
        moments = tl.zeros([TURNS, ROWS], dtype)
        for turn in range(tl.minimum(turns, tl.cdiv(num_rows - first, ROWS).to(tl.int32))):
            if ROWS == 1:
                shift, total, moment = read_one(
                    logits_pointer, target_pointer, first + turn, num_classes, inner, stride_n, stride_d,
                    ignore_index, dtype, LONG, LANES, VEC, ALIGN, HEADS,
                )  # fmt: skip
            else:
                some = first + turn * ROWS + tl.arange(0, ROWS)
                some_targets, asked, _ = load_targets(target_pointer, some, num_rows, num_classes, ignore_index)
                shift, total, moment = read_several(
                    logits_pointer, some, some_targets, asked, num_rows, num_classes, inner, stride_n, stride_k,
                    stride_d, dtype, ACROSS, ROWS, LANES, VEC, ALIGN, HEADS,
                )  # fmt: skip
            here = (tl.arange(0, TURNS) == turn)[:, None]
            shifts = tl.where(here, shift[None, :], shifts)
            totals = tl.where(here, total[None, :], totals)
            moments = tl.where(here, moment[None, :], moments)
        shift = tl.reshape(shifts, [TURNS * ROWS])
        total = tl.reshape(totals, [TURNS * ROWS])
        moment = tl.reshape(moments, [TURNS * ROWS])
        order = tl.arange(0, TURNS * ROWS)
        rows = tl.where(order < turns * ROWS, first + order, num_rows)
        target, wanted, stray = load_targets(target_pointer, rows, num_rows, num_classes, ignore_index)

    target_logit = load_target_logits(logits_pointer, rows, target, wanted, inner, stride_n, stride_k, stride_d, dtype)
    finish(
        rows, num_rows, wanted, stray, target_logit, shift, total, moment,
        state_pointer, values_pointer, block, tl.num_programs(0),
        scale, parameter, exponent, OBJECTIVE, REDUCES,
    )  # fmt: skip


@triton.jit
def merge_kernel(
    logits_pointer,
    target_pointer,
    parts_pointer,
    state_pointer,
    values_pointer,  # row losses; where it reduces, [2, blocks] their sums and the rows counted; or the statistics
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
    splits,
    OBJECTIVE: tl.constexpr,
    REDUCES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,  # splits, rounded up to a power of two
):
    """Merges the splits of ROWS rows and finishes them."""
    block = tl.program_id(0).to(tl.int64)
    num_rows = tl.cast(num_rows, tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    target, wanted, stray = load_targets(target_pointer, rows, num_rows, num_classes, ignore_index)
    dtype: tl.constexpr = tl.float64 if logits_pointer.dtype.element_ty == tl.float64 else tl.float32

    order = tl.arange(0, SPLITS)
    mask = (rows < num_rows)[:, None] & (order < splits)[None, :]
    place = parts_pointer + rows[:, None] * splits + order[None, :]
    shift = tl.load(place, mask=mask, other=FLOOR)
    total = tl.load(place + num_rows * splits, mask=mask, other=0.0)
    moment = tl.load(place + 2 * num_rows * splits, mask=mask, other=0.0)
    shift, total, moment = merge(shift, total, moment, 1)

    target_logit = load_target_logits(logits_pointer, rows, target, wanted, inner, stride_n, stride_k, stride_d, dtype)
    finish(
        rows, num_rows, wanted, stray, target_logit, shift, total, moment,
        state_pointer, values_pointer, block, tl.num_programs(0),
        scale, parameter, exponent, OBJECTIVE, REDUCES,
    )  # fmt: skip


@triton.jit
def row_values(target_logit, shift, total, moment):
    """log2 s, S and b of rows, and whether their complement is empty: no class but the target's above the floor."""
    empty = (shift <= FLOOR) & (total == total)  # a NaN total is no empty sum
    log_total = tl.log2(tl.where(empty, 1.0, total))
    negentropy = tl.where(empty, 0.0, (moment / total - log_total) * LN2)
    log_odds = (log_total - (target_logit * LOG2E - shift)) * LN2
    return log_total, negentropy, log_odds, empty


@triton.jit
def finish(
    rows,
    num_rows,
    wanted,
    stray,
    target_logit,
    shift,
    total,
    moment,
    state_pointer,
    values_pointer,
    block,
    blocks,
    scale,
    parameter,
    exponent,
    OBJECTIVE: tl.constexpr,
    REDUCES: tl.constexpr,
):
    """From (m, s, t) to the row's loss, and to the five numbers the backward pass needs of it.

    state [5, N]: shift m log2 e; log2 s; slope f_S ln 2; offset f_S S - f_L; f_g. With them, for x = y_j - log2 s,
    dl/dz_j = 2^x (slope x - offset). An infinite log2 s, which no row has, marks the ignored ones. Without an
    objective the statistics (z_g, L, S) themselves are written.
    """
    inside = rows < num_rows
    log_total, negentropy, log_odds, empty = row_values(target_logit, shift, total, moment)

    state = state_pointer + rows
    tl.store(state, shift, mask=inside)
    tl.store(state + num_rows, tl.where(wanted, log_total, float("inf")), mask=inside)
    nan = float("nan")
    if OBJECTIVE is None:
        lse = tl.where(empty, -float("inf"), (shift + log_total) * LN2)
        tl.store(values_pointer + rows, tl.where(stray, nan, tl.where(wanted, target_logit, 0.0)), mask=inside)
        tl.store(values_pointer + num_rows + rows, tl.where(stray, nan, tl.where(wanted, lse, 0.0)), mask=inside)
        kept = tl.where(stray, nan, tl.where(wanted, negentropy, 0.0))
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
        )
        loss = tl.where(stray, nan, tl.where(wanted, loss, 0.0))
        offset = tl.where(stray, nan, d_negentropy * negentropy - d_log_odds)
        tl.store(state + 2 * num_rows, d_negentropy * LN2, mask=inside)
        tl.store(state + 3 * num_rows, offset, mask=inside)
        tl.store(state + 4 * num_rows, -d_log_odds, mask=inside)
        if REDUCES:
            tl.store(values_pointer + block, tl.sum(loss, 0))
            tl.store(values_pointer + blocks + block, tl.sum(tl.where(wanted, 1.0, 0.0), 0))
        else:
            tl.store(values_pointer + rows, loss, mask=inside)


@triton.jit
def fold_kernel(partials_pointer, folded_pointer, blocks, BLOCK: tl.constexpr):
    """[2, blocks] partial losses and counts to one of each a program, so that one program can sum up what is left."""
    program = tl.program_id(0).to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    loss = tl.load(partials_pointer + place, mask=place < blocks, other=0.0)
    count = tl.load(partials_pointer + blocks + place, mask=place < blocks, other=0.0)
    tl.store(folded_pointer + program, tl.sum(loss, 0))
    tl.store(folded_pointer + tl.num_programs(0) + program, tl.sum(count, 0))


@triton.jit
def reduce_kernel(partials_pointer, loss_pointer, factor_pointer, blocks, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the partial losses, or their mean and the factor 1 / count for the backward pass.

    One program: the order of summation is fixed, so results are reproducible bit for bit.
    """
    dtype: tl.constexpr = partials_pointer.dtype.element_ty
    loss = tl.zeros([BLOCK], dtype)
    count = tl.zeros([BLOCK], dtype)
    for start in range(0, blocks, BLOCK):
        place = start + tl.arange(0, BLOCK)
        loss += tl.load(partials_pointer + place, mask=place < blocks, other=0.0)
        count += tl.load(partials_pointer + blocks + place, mask=place < blocks, other=0.0)
    result = tl.sum(loss, 0)
    if MEAN:
        rows = tl.sum(count, 0)
        result /= rows  # every row ignored: the mean is 0 / 0, and the gradient zero
        tl.store(factor_pointer, 1 / tl.maximum(rows, 1.0))
    tl.store(loss_pointer, result)
