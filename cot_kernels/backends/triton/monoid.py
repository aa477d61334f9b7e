"""Three numbers a row, from which all losses follow, and how they are read and merged.

    m = max_{j != g} z_j     s = sum_{j != g} 2^{y_j}     t = sum_{j != g} 2^{y_j} y_j,     y_j = (z_j - m) log2 e

The kernels count in units of log2, where the exponential is a single instruction. The maximum is subtracted before the
scaling by log2 e, as an operation of its own: of z log2 e - round(m log2 e), one multiply-add, the rounding would be
left, which from m = 1e9 on is more than an exponential can hold.

NARROW logits, of 16 bits, are so many to a byte that instructions count, and can be spared that one: their y_j is then
z_j log2 e - h, rounded once, of a level h = round(m log2 e), and s and t are relative to h in place of m. What that
leaves is the same for all logits of a row, and is taken out once a row (:func:`settle`). From |m| = 2^16 on the scale
is 1 in place of log2 e, and h is m itself: two bfloat16 numbers are there 2^8 apart or more, so that what is not the
maximum is nothing in either scale, and the rounding of a larger h would get out of hand. They stay in pairs, as they
were read, until they are needed: so registers hold twice as many, and two are compared at a time (:mod:`.packed`).

A tile of BLOCK = LANES * VEC classes of a long row is folded into one running (m, s, t) for each DEPTH lanes, as many
as a thread has: their maximum costs no exchange between threads, and one rescaling serves all of them. What the threads
(and the splits of a row) have is merged at the end by the rule of the monoid:

    m = max(m_1, m_2)    d_i = (m_i - m) log2 e    s = sum_i s_i 2^{d_i}    t = sum_i 2^{d_i} (t_i + d_i s_i)

Of rows that fit a tile the maximum is known before the first exponential, and nothing is rescaled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cot_kernels.backends.triton.arithmetic import multiply_add
from cot_kernels.backends.triton.packed import finite, in_pairs, larger, largest, only, without_target
from cot_kernels.backends.triton.tiles import (
    ACCESS,
    FLOOR,
    LOG2E,
    NOTHING,
    by_row,
    first_classes,
    hint,
    is_interior,
    is_target,
    load_across,
    load_pieces,
    misalignment,
    row_pointers,
    step_back,
    widen,
)

# From here on the scale of NARROW logits is 1.
_LARGE = tl.constexpr(2.0**16)


@triton.jit
def level_of(shift, NARROW: tl.constexpr):
    """What is subtracted for a maximum, and what logits are multiplied by before, if NARROW."""
    if NARROW:
        scale = tl.where(tl.abs(shift) < _LARGE, LOG2E, 1.0)
        # No plain product: the compiler would contract it with what it is subtracted from, unrounded.
        level = tl.fma(shift, scale, tl.zeros_like(shift))
    else:
        level, scale = shift, shift
    return level, scale


@triton.jit
def exponents(z, level, scale, NARROW: tl.constexpr):
    """y of logits, those of NARROW ones finite or NaN. Without -inf, for 0 * -inf would make the moment NaN. The NaN of
    a logit is let through."""
    all_nan: tl.constexpr = tl.PropagateNan.ALL
    return multiply_add(z, scale, -level) if NARROW else tl.maximum((z - level) * LOG2E, FLOOR, propagate_nan=all_nan)


@triton.jit
def gap_between(old_shift, old_level, new_shift, new_level, NARROW: tl.constexpr):
    """By how many powers of two, at most none, statistics are lowered. It stops where nothing is left of them: no
    product with it overflows."""
    gap = old_shift - new_shift
    # Less than between the levels where their scales differ, for they need then not be in the order of the shifts.
    gap = tl.minimum(old_level - new_level, gap) if NARROW else gap * LOG2E
    return tl.maximum(gap, NOTHING)


@triton.jit
def settle(shift, total, moment):
    """s and t of NARROW logits relative to their maximum, from those relative to its level.

    With r = m log2 e - h, s = 1 + 2^-r (s' - 2^r) and t = 2^-r (t' - r s'). What the maximum itself adds to s' is 2^r
    to the bit, so that s is 1 and log2 s is 0 where the others are nothing beside it; of t a rounding of r is left.
    """
    level, scale = level_of(shift, True)
    rest = multiply_add(shift, scale, -level)
    back = tl.exp2(-rest)
    return (total - tl.exp2(rest)) * back + 1, multiply_add(-rest, total, moment) * back


@triton.jit
def merge(shift, total, moment, axis: tl.constexpr, NARROW: tl.constexpr):
    """Merges the running statistics along an axis."""
    merged = tl.max(shift, axis)
    level, _ = level_of(shift, NARROW)
    raised = tl.expand_dims(merged, axis)
    new, _ = level_of(raised, NARROW)
    gap = gap_between(shift, level, raised, new, NARROW)
    weight = tl.exp2(gap)
    return merged, tl.sum(total * weight, axis), tl.sum(weight * (moment + gap * total), axis)


@triton.jit
def masked(z, kept, ROWS: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr, NARROW: tl.constexpr):
    """Logits with -inf where they are not ``kept``, widened, or if NARROW in pairs."""
    return in_pairs(only(z, kept), ROWS, WIDTH) if NARROW else tl.where(kept, widen(z, dtype), -float("inf"))


@triton.jit
def fold(z, shift, level, total, moment, axis: tl.constexpr, of: tl.constexpr, NARROW: tl.constexpr):
    """Folds a tile z into the running statistics, along an axis that they do not have; if NARROW, of pairs of logits
    of the dtype ``of``."""
    raised = tl.maximum(shift, largest(z, axis, of) if NARROW else tl.max(z, axis))
    new, scale = level_of(raised, NARROW)
    gap = gap_between(shift, level, raised, new, NARROW)
    rescale = tl.exp2(gap)
    total, moment = rescale * total, rescale * (moment + gap * total)
    parts = finite(z, of) if NARROW else (z,)
    for part in tl.static_range(1 + NARROW):
        y = exponents(parts[part], tl.expand_dims(new, axis), tl.expand_dims(scale, axis), NARROW)
        weight = tl.exp2(y)
        total += tl.sum(weight, axis)
        moment += tl.sum(weight * y, axis)
    return raised, new, total, moment


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
    DEPTH: tl.constexpr,
    NARROW: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """(m, s, t), [1] each, of the tiles ``first`` to ``last`` of one row; see :func:`.tiles.misalignment`."""
    BLOCK: tl.constexpr = LANES * VEC
    EACH: tl.constexpr = LANES // DEPTH
    HELD: tl.constexpr = VEC // 2 if NARROW else VEC
    of: tl.constexpr = aligned.dtype.element_ty
    shift = tl.full([1, EACH], FLOOR, dtype)
    level, _ = level_of(shift, NARROW)
    total = tl.zeros([1, EACH], dtype)
    moment = tl.zeros([1, EACH], dtype)
    columns = tl.arange(0, BLOCK)
    for tile in range(first, last):
        start = tile * BLOCK - head
        pointers = aligned + (tile * BLOCK + columns)
        if is_interior(start, target, num_classes, BLOCK):
            z = tl.load(pointers, eviction_policy=EVICTION)
            z = in_pairs(z, 1, BLOCK) if NARROW else widen(z, dtype)
        else:
            # Whole accesses as far as they hold classes of the row, and of these what is one.
            access = columns // VEC * VEC
            touched = (start + access + VEC > 0) & (start + access < num_classes)
            z = tl.load(pointers, mask=touched, other=0.0, eviction_policy=EVICTION)
            kept = of_row(tl.full([1], -start, tl.int32), tl.full([1], target, tl.int32), num_classes, 1, BLOCK, VEC)
            z = masked(z, tl.reshape(kept, [BLOCK]), 1, BLOCK, dtype, NARROW)
        if DEPTH > 1:  # the lanes of a thread are as far apart as there are threads
            z = tl.permute(tl.reshape(z, [DEPTH, EACH, HELD]), (1, 0, 2))
        z = tl.reshape(z, [1, EACH, DEPTH * HELD])
        shift, level, total, moment = fold(z, shift, level, total, moment, 2, of, NARROW)
    return merge(shift, total, moment, 1, NARROW)


@triton.jit
def of_row(head, target, num_classes, ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr):
    """Which places of a tile are classes of the row that begins at its place ``head``, without the target:
    [ROWS, WIDTH].

    By a bit a place, an access at a time: cheaper than comparisons a place.
    """
    access = (tl.arange(0, WIDTH // VEC) * VEC)[None, :]
    before = tl.minimum(tl.maximum(by_row(head) - access, 0), VEC)
    after = tl.minimum(tl.maximum(by_row(head + num_classes) - access, 0), VEC)
    bits = (1 << after) - (1 << before)
    at = by_row(head + target) - access
    bits &= ~tl.where((at >= 0) & (at < VEC), 1 << (at & (VEC - 1)), 0)
    kept = (bits[:, :, None] >> tl.arange(0, VEC)[None, None, :]) & 1
    return tl.reshape(kept, [ROWS, WIDTH]) != 0


@triton.jit
def begin(z, level, scale, NARROW: tl.constexpr):
    """s and t of a place that has had one logit."""
    y = exponents(z, level, scale, NARROW)
    total = tl.exp2(y)
    return total, total * y


@triton.jit
def go_on(total, moment, z, level, scale, NARROW: tl.constexpr):
    y = exponents(z, level, scale, NARROW)
    weight = tl.exp2(y)
    return total + weight, moment + weight * y


@triton.jit
def of_pieces(
    pieces,
    head,
    target,
    num_classes,
    dtype: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    HEADS: tl.constexpr,
    TAIL: tl.constexpr,
    NARROW: tl.constexpr,
):
    """(m, s, t) of ROWS rows, of what :func:`.tiles.load_pieces` found: nothing is rescaled.

    TAIL: accesses that were made hold what is no class.
    """
    of: tl.constexpr = pieces[0].dtype
    logits = ()
    for piece in tl.static_range(PIECES):
        first = head - piece * WIDTH
        z = pieces[piece]
        if (piece >= HEADS) & (piece + 1 + HEADS < PIECES) or not TAIL:
            if NARROW:
                z = without_target(in_pairs(z, ROWS, WIDTH), first + target, ROWS, WIDTH, VEC, of)
            else:
                z = tl.where(is_target(first + target, ROWS, WIDTH, VEC), -float("inf"), widen(z, dtype))
        else:
            kept = of_row(first, target, num_classes, ROWS, WIDTH, VEC)
            z = masked(z, kept, ROWS, WIDTH, dtype, NARROW)
        logits += (z,)  # type: ignore[assignment]
    top = logits[0]  # type: ignore[misc]
    for piece in tl.static_range(1, PIECES):
        top = larger(top, logits[piece], of) if NARROW else tl.maximum(top, logits[piece])
    shift = tl.maximum(largest(top, 1, of) if NARROW else tl.max(top, 1), FLOOR)
    level, scale = level_of(shift, NARROW)
    level, scale = by_row(level), by_row(scale)
    parts = ()
    for piece in tl.static_range(PIECES):
        parts += finite(logits[piece], of) if NARROW else (logits[piece],)  # type: ignore[assignment, misc]
    total, moment = begin(parts[0], level, scale, NARROW)  # type: ignore[misc]
    for part in tl.static_range(1, PIECES * (1 + NARROW)):
        total, moment = go_on(total, moment, parts[part], level, scale, NARROW)
    return shift, tl.sum(total, 1), tl.sum(moment, 1)


@triton.jit
def read_whole_rows(
    base,
    target,
    wanted,
    num_classes,
    dtype: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
    NARROW: tl.constexpr,
):
    head = first_classes(base, ROWS, VEC, HEADS)
    pieces = load_pieces(base, head, wanted, num_classes, PIECES, WIDTH, VEC, ALIGN, HEADS, -float("inf"), 0.0)
    return of_pieces(pieces, head, target, num_classes, dtype, PIECES, ROWS, WIDTH, VEC, HEADS, HEADS, NARROW)


@triton.jit
def read_side_by_side(
    base,
    target,
    inside,
    whole,
    wanted,
    num_classes,
    stride_k,
    stride_d,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    PLANE: tl.constexpr,
):
    """(m, s, t) of ROWS rows, of which each thread reads its own, class after class.

    One access may read several rows, whichever of them are wanted: of the others nothing may show, be it NaN.
    """
    shift = tl.full([ROWS], FLOOR, dtype)
    total = tl.zeros([ROWS], dtype)
    moment = tl.zeros([ROWS], dtype)
    floor: tl.constexpr = -float("inf")
    for start in range(0, num_classes, VEC):
        z = load_across(base, inside, whole, start, num_classes, stride_k, stride_d, VEC, ROWS, PLANE, floor)
        base += tl.cast(stride_k, tl.int64) * VEC
        other = tl.arange(0, VEC)[:, None] != (target - start)[None, :]
        z = tl.where(other, widen(z, dtype), -float("inf"))
        shift, _, total, moment = fold(z, shift, shift, total, moment, 0, dtype, False)
    return tl.where(wanted, shift, FLOOR), total, moment


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
    PIECES: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """(m, s, t), [1] each, of a row; of an ignored one, without reading it."""
    BLOCK: tl.constexpr = LANES * VEC
    shift = tl.full([1], FLOOR, dtype)
    total = tl.zeros([1], dtype)
    moment = tl.zeros([1], dtype)
    wide_target = tl.load(target_pointer + row).to(tl.int64)
    if wide_target != ignore_index:
        target = wide_target.to(tl.int32)  # whichever class that is where it is out of range: the row will be NaN
        # Long rows find their boundary by themselves: their stride need not be a multiple of anything.
        base = row_pointers(logits_pointer, row, inner, stride_n if LONG else hint(stride_n, ALIGN), stride_d)
        if LONG:
            head = misalignment(base, ALIGN, ACCESS)
            shift, total, moment = read_row(
                step_back(base - head, ALIGN), head, target, 0, tl.cdiv(num_classes + head, BLOCK), num_classes,
                dtype, LANES, VEC, DEPTH, NARROW, "",
            )  # fmt: skip
        else:
            one = tl.arange(0, 1)
            shift, total, moment = read_whole_rows(
                base + one, target + one, one == 0, num_classes, dtype, PIECES, 1, BLOCK, VEC, ALIGN, HEADS, NARROW
            )
    return shift, total, moment
