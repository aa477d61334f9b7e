"""Backward pass: one kernel for the whole family, one read of the logits and one write of their gradient.

    dl/dz_j = q_j (f_L + f_S ((z_j - L) - S)),  j != g        dl/dz_g = f_g

In the units of the forward pass, with x = (z_j - m) log2 e - log2 s = (z_j - L) log2 e, that is
``2^x (slope x - offset)``: an exponential, a subtraction and three multiply-adds a logit. Programs take several tiles
in turn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cot_kernels.backends.triton.tiles import (
    LINE,
    LOG2E,
    NOTHING,
    base_across,
    by_row,
    first_classes,
    hint,
    is_interior,
    is_target,
    load_across,
    load_pieces,
    misalignment,
    pointers_across,
    row_pointers,
    rows_across,
    step_back,
    to_class,
    widen,
)


@triton.jit
def complement_gradient(z, shift, log_total, slope, offset):
    # Subtracting the shift first keeps the rounding of a large L out of q. The clamp is for logits at -inf: there 2^x
    # is 0 in any precision, and slope x finite with any slope.
    x = tl.maximum((z - shift) * LOG2E - log_total, NOTHING, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(x) * (slope * x - offset)


@triton.jit
def store_end(grad_pointers, start, num_classes, grad, BLOCK: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr):
    """A tile in which the row begins or ends: whole accesses, and class by class the one at either end that is not.

    Class by class throughout, an end would take a warp eight requests to memory in place of one.
    """
    columns = tl.arange(0, BLOCK)
    classes = start + columns
    inside = (classes >= 0) & (classes < num_classes)
    if ALIGN > 1:
        access = start + columns // VEC * VEC
        whole = (access >= 0) & (access + VEC <= num_classes)
        tl.store(grad_pointers + columns, grad, mask=whole)
        tl.store(grad_pointers + columns, grad, mask=inside & (whole == 0))
    else:
        tl.store(grad_pointers + columns, grad, mask=inside)


@triton.jit
def write_tile(
    pointers,
    grad_pointers,
    start,
    target,
    num_classes,
    shift,
    log_total,
    slope,
    offset,
    at_target,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """The gradient of the BLOCK classes from ``start`` of one row; of an ignored one, without reading it.

    Masks, and all that is for the edges, are formed within the branches that need them: most tiles do without.
    """
    dtype: tl.constexpr = shift.dtype
    out_dtype: tl.constexpr = grad_pointers.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    if log_total == float("inf"):  # ignored
        store_end(grad_pointers, start, num_classes, tl.zeros([BLOCK], out_dtype), BLOCK, VEC, ALIGN)
    elif is_interior(start, target, num_classes, BLOCK):
        z = widen(tl.load(pointers + columns, eviction_policy=EVICTION), dtype)
        tl.store(grad_pointers + columns, complement_gradient(z, shift, log_total, slope, offset).to(out_dtype))
    elif (start >= 0) & (start + BLOCK <= num_classes) & (ALIGN > 1):
        z = widen(tl.load(pointers + columns, eviction_policy=EVICTION), dtype)
        grad = complement_gradient(z, shift, log_total, slope, offset)
        at = tl.reshape(is_target(tl.full([1], target - start, tl.int32), 1, BLOCK, VEC), [BLOCK])
        tl.store(grad_pointers + columns, tl.where(at, at_target, grad).to(out_dtype))
    else:
        if ALIGN > 1:
            access = start + columns // VEC * VEC
            read = (access + VEC > 0) & (access < num_classes)
        else:
            read = (start + columns >= 0) & (start + columns < num_classes)
        z = widen(tl.load(pointers + columns, mask=read, other=0.0, eviction_policy=EVICTION), dtype)
        grad = complement_gradient(z, shift, log_total, slope, offset)
        grad = tl.where(start + columns == target, at_target, grad)
        store_end(grad_pointers, start, num_classes, grad.to(out_dtype), BLOCK, VEC, ALIGN)


@triton.jit
def load_log_total(state_pointer, rows, inside, num_rows):
    """log2 s: infinite for ignored rows, and for those that there are not."""
    return tl.load(state_pointer + num_rows + rows, mask=inside, other=float("inf"))


@triton.jit
def load_state(
    target_pointer,
    state_pointer,
    upstream_pointer,
    rows,
    inside,
    num_rows,
    num_classes,
    upstream_stride,
    factor,
    HAS_FACTOR: tl.constexpr,
):
    """What the gradient of rows takes beside log2 s: target, shift, and with the upstream gradient slope, offset and
    what the target gets."""
    target = to_class(tl.load(target_pointer + rows, mask=inside, other=-1).to(tl.int64), num_classes)
    state = state_pointer + rows
    shift = tl.load(state, mask=inside, other=0.0)
    upstream = tl.load(upstream_pointer + rows * upstream_stride, mask=inside, other=0.0).to(shift.dtype)
    if HAS_FACTOR:
        upstream *= factor
    slope = tl.load(state + 2 * num_rows, mask=inside, other=0.0) * upstream
    offset = tl.load(state + 3 * num_rows, mask=inside, other=0.0) * upstream
    at_target = tl.load(state + 4 * num_rows, mask=inside, other=0.0) * upstream
    return target, shift, slope, offset, at_target


@triton.jit
def silence(wanted, slope, offset, at_target):
    """With these, and its infinite log2 s, an ignored row gets 2^NOTHING (0 x + 1), zero, if no logit is NaN."""
    return tl.where(wanted, slope, 0.0), tl.where(wanted, offset, -1.0), tl.where(wanted, at_target, 0.0)


@triton.jit
def gradient_of_rows(z, at, shift, log_total, slope, offset, at_target):
    """Of a tile [ROWS, WIDTH] of several rows, whose targets are ``at``."""
    grad = complement_gradient(z, by_row(shift), by_row(log_total), by_row(slope), by_row(offset))
    return tl.where(at, by_row(at_target), grad)


@triton.jit
def gradient_across(z, start, target, wanted, shift, log_total, slope, offset, at_target, VEC: tl.constexpr):
    """Of VEC classes from ``start`` on of rows side by side, [VEC, ROWS], whichever of them are wanted."""
    z = widen(z, shift.dtype)
    grad = complement_gradient(z, shift[None, :], log_total[None, :], slope[None, :], offset[None, :])
    at = tl.arange(0, VEC)[:, None] == (target - start)[None, :]
    return tl.where(wanted[None, :], tl.where(at, at_target[None, :], grad), 0.0)


@triton.jit
def write_pieces(
    pieces,
    grad_base,
    head,
    target,
    inside,
    wanted,
    num_classes,
    shift,
    log_total,
    slope,
    offset,
    at_target,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of what :func:`.tiles.load_pieces` found; of rows that begin anywhere, what fills whole accesses."""
    slope, offset, at_target = silence(wanted, slope, offset, at_target)
    for piece in tl.static_range(PIECES):
        at = is_target(head + target - piece * WIDTH, ROWS, WIDTH, VEC)
        grad = gradient_of_rows(widen(pieces[piece], shift.dtype), at, shift, log_total, slope, offset, at_target)
        places = piece * WIDTH + tl.arange(0, WIDTH)[None, :]
        written = by_row(inside)
        if not ((piece >= HEADS) & (piece + 1 + HEADS < PIECES)):
            if HEADS:
                access = places // VEC * VEC
                written &= (access >= by_row(head)) & (access + VEC <= by_row(head + num_classes))
            else:
                written &= places < hint(num_classes, ALIGN)
        pointers = by_row(step_back(grad_base, VEC) if HEADS else grad_base) + places.to(tl.int64)
        tl.store(pointers, grad.to(grad_base.dtype.element_ty), mask=written)


# What write_pieces leaves of a row that begins anywhere: the accesses that it shares with its neighbours, one at either
# end. They are asked for with the pieces: behind the stores of those, a thread would wait for memory again.


@triton.jit
def end_places(head, num_classes, VEC: tl.constexpr, AT_START: tl.constexpr):
    """The places of one end, [ROWS, VEC], and which of them are classes of a row of several accesses."""
    end = by_row(head + num_classes)
    if AT_START:
        places = tl.zeros_like(end) + tl.arange(0, VEC)[None, :]
        mask = by_row(head > 0) & (places >= by_row(head))
    else:
        places = end // VEC * VEC + tl.arange(0, VEC)[None, :]
        mask = places < end
    return places, mask


@triton.jit
def load_end(base, head, wanted, num_classes, VEC: tl.constexpr, AT_START: tl.constexpr):
    places, mask = end_places(head, num_classes, VEC, AT_START)
    return tl.load(by_row(base) + (places - by_row(head)), mask=mask & by_row(wanted), other=0.0)


@triton.jit
def write_end(
    z,
    grad_base,
    head,
    target,
    inside,
    wanted,
    num_classes,
    shift,
    log_total,
    slope,
    offset,
    at_target,
    VEC: tl.constexpr,
    AT_START: tl.constexpr,
):
    places, mask = end_places(head, num_classes, VEC, AT_START)
    classes = places - by_row(head)
    slope, offset, at_target = silence(wanted, slope, offset, at_target)
    at = classes == by_row(target)
    grad = gradient_of_rows(widen(z, shift.dtype), at, shift, log_total, slope, offset, at_target)
    tl.store(by_row(grad_base) + classes, grad.to(grad_base.dtype.element_ty), mask=mask & by_row(inside))


@triton.jit(do_not_specialize=["factor_at"], do_not_specialize_on_alignment=["tiles", "turns"])
def gradient_kernel(
    logits_pointer,
    target_pointer,
    state_pointer,
    upstream_pointer,
    grad_pointer,
    num_rows,
    num_classes,
    inner,
    stride_n,
    stride_k,
    stride_d,
    grad_stride_n,
    grad_stride_k,
    grad_stride_d,
    upstream_stride,
    factor_at,  # where behind the state, of a loss that was reduced, a factor of its rows' gradients lies
    tiles,
    turns,
    HAS_FACTOR: tl.constexpr,
    LONG: tl.constexpr,
    ACROSS: tl.constexpr,
    PLANE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of ``turns`` tiles: of those of one long row, or of ROWS that lie side by side, or of ROWS whole
    rows each."""
    program = tl.program_id(0).to(tl.int64)
    shares = tl.cdiv(tiles, turns)  # programs to a row
    block = program // shares
    num_rows = tl.cast(num_rows, tl.int64)  # 5 N entries of state pass 2^31
    first = (program - block * shares).to(tl.int32) * turns
    dtype: tl.constexpr = state_pointer.dtype.element_ty
    factor = tl.load(state_pointer + factor_at) if HAS_FACTOR else 1.0

    if LONG:
        row = block
        target = to_class(tl.load(target_pointer + row).to(tl.int64), num_classes)
        state = state_pointer + row
        shift = tl.load(state)
        log_total = tl.load(state + num_rows)
        upstream = tl.load(upstream_pointer + row * upstream_stride).to(dtype)
        if HAS_FACTOR:
            upstream *= factor
        slope = tl.load(state + 2 * num_rows) * upstream
        offset = tl.load(state + 3 * num_rows) * upstream
        at_target = tl.load(state + 4 * num_rows) * upstream

        base = row_pointers(logits_pointer, row, inner, stride_n, stride_d)
        grad_base = row_pointers(grad_pointer, row, inner, grad_stride_n, grad_stride_d)
        head = misalignment(base, ALIGN, LINE)
        aligned = step_back(base - head, ALIGN)
        grad_aligned = step_back(grad_base - head, ALIGN)
        for tile in range(first, tl.minimum(first + turns, tiles)):
            place = tile * WIDTH
            write_tile(
                aligned + place, grad_aligned + place, place - head, target, num_classes,
                shift, log_total, slope, offset, at_target, WIDTH, VEC, ALIGN, "",
            )  # fmt: skip
    elif ACROSS:
        rows, inside, plane, before = rows_across(block, num_rows, inner, ROWS, PLANE)
        whole = before + ROWS <= inner
        log_total = load_log_total(state_pointer, rows, inside, num_rows)
        wanted = log_total != float("inf")
        target, shift, slope, offset, at_target = load_state(
            target_pointer, state_pointer, upstream_pointer,
            rows, inside, num_rows, num_classes, upstream_stride, factor, HAS_FACTOR,
        )  # fmt: skip
        base = base_across(logits_pointer, rows, plane, before, inner, stride_n, stride_d, PLANE)
        grad_base = base_across(grad_pointer, rows, plane, before, inner, grad_stride_n, grad_stride_d, PLANE)
        base += first.to(tl.int64) * VEC * stride_k
        grad_base += first.to(tl.int64) * VEC * grad_stride_k
        last = tl.minimum(first + turns, tiles)
        if PLANE:
            # Logits are asked for a turn ahead: left to itself the compiler asks for one at a time.
            coming = load_across(
                base, inside, whole, first * VEC, num_classes, stride_k, stride_d, VEC, ROWS, PLANE, 0.0
            )
        for tile in range(first, last):
            start = tile * VEC
            grad_pointers = pointers_across(grad_base, grad_stride_k, grad_stride_d, VEC, ROWS, PLANE)
            grad_base += tl.cast(grad_stride_k, tl.int64) * VEC
            if PLANE:
                z, end = coming, tl.where(tile + 1 < last, num_classes, 0)
                base += tl.cast(stride_k, tl.int64) * VEC
                coming = load_across(base, inside, whole, start + VEC, end, stride_k, stride_d, VEC, ROWS, PLANE, 0.0)
            else:
                z = load_across(base, inside, whole, start, num_classes, stride_k, stride_d, VEC, ROWS, PLANE, 0.0)
                base += tl.cast(stride_k, tl.int64) * VEC
            grad = gradient_across(z, start, target, wanted, shift, log_total, slope, offset, at_target, VEC)
            grad = grad.to(grad_pointer.dtype.element_ty)
            if PLANE and whole & (start + VEC <= num_classes):
                tl.store(grad_pointers, grad)
            else:
                mask = inside[None, :] & (start + tl.arange(0, VEC) < num_classes)[:, None]
                tl.store(grad_pointers, grad, mask=mask)
    else:
        # Whether rows are read at all is asked for a turn ahead.
        start = program * turns * ROWS
        first_rows = start + tl.arange(0, ROWS)
        coming = load_log_total(state_pointer, first_rows, first_rows < num_rows, num_rows)
        for turn in range(turns):
            rows, log_total = start + turn * ROWS + tl.arange(0, ROWS), coming
            coming = load_log_total(state_pointer, rows + ROWS, rows + ROWS < num_rows, num_rows)
            inside, wanted = rows < num_rows, log_total != float("inf")
            base = row_pointers(logits_pointer, rows, inner, hint(stride_n, ALIGN), stride_d)
            grad_base = row_pointers(grad_pointer, rows, inner, hint(grad_stride_n, ALIGN), grad_stride_d)
            head = first_classes(base, ROWS, VEC, HEADS)
            pieces = load_pieces(base, head, wanted, num_classes, PIECES, WIDTH, VEC, ALIGN, HEADS, 0.0, 0.0)
            if HEADS:
                start_end = load_end(base, head, wanted, num_classes, VEC, True)
                last_end = load_end(base, head, wanted, num_classes, VEC, False)
            target, shift, slope, offset, at_target = load_state(
                target_pointer, state_pointer, upstream_pointer,
                rows, inside, num_rows, num_classes, upstream_stride, factor, HAS_FACTOR,
            )  # fmt: skip
            write_pieces(
                pieces, grad_base, head, target, inside, wanted, num_classes,
                shift, log_total, slope, offset, at_target, PIECES, ROWS, WIDTH, VEC, ALIGN, HEADS,
            )  # fmt: skip
            if HEADS:
                write_end(
                    start_end, grad_base, head, target, inside, wanted, num_classes,
                    shift, log_total, slope, offset, at_target, VEC, True,
                )  # fmt: skip
                write_end(
                    last_end, grad_base, head, target, inside, wanted, num_classes,
                    shift, log_total, slope, offset, at_target, VEC, False,
                )  # fmt: skip
