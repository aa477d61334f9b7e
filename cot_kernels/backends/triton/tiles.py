"""What the kernels share: where a row starts, which rows count, and how a tile of classes is read."""

from __future__ import annotations

import triton
import triton.language as tl

from cot_kernels.backends.triton import launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# A logit at or below the floor has probability zero, as has a masked one at -inf, for which 0 * -inf would be NaN.
# The float32 above -1e30: Triton takes a constant for a float32, and the nearest one lies below a float64 of -1e30.
FLOOR = tl.constexpr(-9.999999394896025e29)

# Of the accesses of a thread, and of what an L2 cache moves and keeps.
ACCESS = tl.constexpr(16)
LINE = tl.constexpr(launch.LINE)

# To this power 2 is zero, in float64 as well.
NOTHING = tl.constexpr(-4096.0)


@triton.jit
def row_pointers(pointer, rows, inner, stride_n, stride_d):
    """First class of each row n * inner + d. int64 throughout: N * K exceeds 2^31 in practice."""
    n = rows // inner
    return pointer + n * stride_n + (rows - n * inner) * stride_d


@triton.jit
def to_class(target, num_classes):
    """A target as int32, -1 where it is out of range."""
    in_range = target.to(tl.uint64) < num_classes.to(tl.uint64)  # below 0 is huge
    return tl.where(in_range, target, -1).to(tl.int32)


@triton.jit
def load_targets(target_pointer, rows, inside, num_classes, ignore_index):
    """Targets as int32, -1 where out of range, and the rows to compute."""
    target = tl.load(target_pointer + rows, mask=inside, other=0).to(tl.int64)
    wanted = inside & (target != ignore_index)
    return to_class(target, num_classes), wanted


@triton.jit
def load_target_logits(base, target, wanted, stride_k, dtype: tl.constexpr):
    """Of rows that begin at ``base``; NaN where a row is not wanted, and where its target is out of range: so will be
    all that follows of it."""
    place = base + target.to(tl.int64) * stride_k
    return tl.load(place, mask=wanted & (target >= 0), other=float("nan")).to(dtype)


@triton.jit
def widen(z, dtype: tl.constexpr):
    """Logits in the precision they are computed in. A bfloat16 is the upper half of a float32: of a pair in one
    register, each then takes one instruction, where the compiler's own conversion takes three for both."""
    if z.dtype == tl.bfloat16:
        z = (z.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return z.to(dtype)


@triton.jit
def misalignment(base, ALIGN: tl.constexpr, BOUNDARY: tl.constexpr):
    """Classes between the last boundary, of 16 bytes or a multiple, and the first class of a row; 0 where ALIGN is 1.

    Tiles start on the boundary, and the few places before the row are masked: so every interior tile is read in
    128-bit accesses whatever the number of classes (50257 is odd). Of a gradient they start on a cache line: otherwise
    every warp would write its first and last one in part.
    """
    if ALIGN == 1:
        head = 0
    else:
        itemsize: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
        head = (base.to(tl.int64) & (BOUNDARY - 1)).to(tl.int32) // itemsize
    return head


@triton.jit
def step_back(pointer, ALIGN: tl.constexpr):
    """The last 16-byte boundary, and the compiler's knowledge that it is one; the pointer itself where ALIGN is 1.

    By its bits: of a pointer that comes of additions AMD's compiler goes back to the first, and forgets the boundary.
    """
    return tl.multiple_of((pointer.to(tl.int64) & -ACCESS).to(pointer.dtype), ACCESS) if ALIGN > 1 else pointer


@triton.jit
def hint(number, ALIGN: tl.constexpr):
    """Shows the compiler that a number is a multiple of ALIGN. Triton itself looks for 16 only, and its multiple_of
    has no effect on a kernel argument."""
    if ALIGN > 1:
        number = number // ALIGN * ALIGN
    return number


@triton.jit
def is_interior(start, target, num_classes, BLOCK: tl.constexpr):
    """Whether a tile lies within the row and does not hold the target: it then needs no mask at all."""
    within = (start >= 0) & (start + BLOCK <= num_classes)
    return within & ((target < start) | (target >= start + BLOCK))


@triton.jit
def first_classes(base, ROWS: tl.constexpr, VEC: tl.constexpr, HEADS: tl.constexpr):
    """Of rows that begin anywhere, how many classes after a 16-byte boundary, [ROWS]; else 0."""
    return misalignment(base, VEC, ACCESS) if HEADS else tl.zeros([ROWS], tl.int32)


@triton.jit
def by_row(values):
    """One value a row, [ROWS], beside a tile [ROWS, WIDTH] of the rows."""
    return values[:, None]


@triton.jit
def is_target(target, ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr):
    """Whether a place of a tile is the one numbered ``target``, [ROWS]: [ROWS, WIDTH].

    From how far that is from the first place of an access, so that a place costs a comparison with a constant.
    """
    at = by_row(target) - (tl.arange(0, WIDTH // VEC) * VEC)[None, :]
    return tl.reshape(at[:, :, None] == tl.arange(0, VEC)[None, None, :], [ROWS, WIDTH])


# Rows that lie side by side: classes are the first dimension of a tile, [VEC, ROWS], for along the last one Triton lays
# out the threads of a warp where it knows of no order. The rows of a program are any, or with PLANE of one n: they then
# begin at equal distances, and a thread finds several of them from one address.


@triton.jit
def rows_across(block, num_rows, inner, ROWS: tl.constexpr, PLANE: tl.constexpr):
    """The rows of a program, [ROWS], and which of them there are; with PLANE its plane, and how many rows of that come
    before."""
    if PLANE:
        shares = tl.cdiv(inner, ROWS)
        plane = block // shares
        before = (block - plane * shares) * ROWS
        place = before + tl.arange(0, ROWS)
        # Not those of the next plane: of rows that adjoin for certain the compiler asks in pairs, which takes a third
        # more registers.
        rows = tl.where(place < inner, plane * inner + place, num_rows)
    else:
        rows, plane, before = block * ROWS + tl.arange(0, ROWS), 0, 0
    return rows, rows < num_rows, plane, before


@triton.jit
def base_across(pointer, rows, plane, before, inner, stride_n, stride_d, PLANE: tl.constexpr):
    """The first class of the rows, [ROWS]; with PLANE that of the first one."""
    if PLANE:
        base = pointer + plane * stride_n + before * stride_d
    else:
        base = row_pointers(pointer, rows, inner, stride_n, stride_d)
    return base


@triton.jit
def each_across(base, stride_d, ROWS: tl.constexpr, PLANE: tl.constexpr):
    """The first class of each row, [ROWS]."""
    return base + tl.arange(0, ROWS).to(tl.int64) * stride_d if PLANE else base


@triton.jit
def pointers_across(base, stride_k, stride_d, VEC: tl.constexpr, ROWS: tl.constexpr, PLANE: tl.constexpr):
    """Of VEC classes of the rows, from those at ``base`` on, [VEC, ROWS]."""
    classes = tl.arange(0, VEC)[:, None].to(tl.int64) * stride_k
    rows = (tl.arange(0, ROWS).to(tl.int64) * stride_d)[None, :]
    return (base + classes) + rows if PLANE else base[None, :] + classes


@triton.jit
def load_across(
    base,
    inside,
    whole,
    start,
    num_classes,
    stride_k,
    stride_d,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    PLANE: tl.constexpr,
    OTHER: tl.constexpr,
):
    """VEC classes of the rows, from ``start`` on, at ``base``. With PLANE, most tiles are whole and need no mask."""
    pointers = pointers_across(base, stride_k, stride_d, VEC, ROWS, PLANE)
    if PLANE and whole & (start + VEC <= num_classes):
        z = tl.load(pointers)
    else:
        mask = inside[None, :] & (start + tl.arange(0, VEC) < num_classes)[:, None]
        z = tl.load(pointers, mask=mask, other=OTHER)
    return z


@triton.jit
def load_rows(
    base,
    head,
    start,
    wanted,
    num_classes,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
    FULL: tl.constexpr,
    OTHER: tl.constexpr,
    UNREAD: tl.constexpr,
):
    """A tile of several rows, from their place ``start`` on: [ROWS, WIDTH].

    Rows that begin anywhere are read from the boundary before them, in whole accesses: an access that holds one class
    of the row is within its allocation, whatever else it holds. Of what lies outside of the row, accesses that are not
    made give OTHER, the others anything. Rows that are not wanted give UNREAD in a tile of which every access is made,
    a FULL one: zero is what registers hold without an instruction more.
    """
    places = start + tl.arange(0, WIDTH)[None, :]
    if HEADS:
        access = places // VEC * VEC
        touched = (access + VEC > by_row(head)) & (access < by_row(head + num_classes))
        pointers = by_row(step_back(base, VEC)) + places
    else:
        touched = places < hint(num_classes, ALIGN)
        pointers = by_row(base) + places.to(tl.int64)
    if FULL:
        z = tl.load(pointers, mask=by_row(wanted), other=UNREAD)
    else:
        z = tl.load(pointers, mask=by_row(wanted) & touched, other=OTHER)
    return z


# A row that is whole in its program's tile is read in PIECES, [ROWS, WIDTH] each, of which its threads have an access:
# the fewest that hold it. So every access but those of the last piece holds a class of the row; and only the last
# piece, or where rows begin anywhere the first and the last two, what is no class. Which those are must stand in every
# loop over the pieces, as no function returns a constant.


@triton.jit
def load_pieces(
    base,
    head,
    wanted,
    num_classes,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
    OTHER: tl.constexpr,
    UNREAD: tl.constexpr,
):
    """The logits of several whole rows."""
    pieces = ()
    for piece in tl.static_range(PIECES):
        z = load_rows(
            base, head, piece * WIDTH, wanted, num_classes, WIDTH, VEC, ALIGN, HEADS,
            piece + 1 < PIECES, OTHER, UNREAD,
        )  # fmt: skip
        pieces += (z,)  # type: ignore[assignment]
    return pieces
