"""Backward pass: one kernel for the whole family, one read of the logits and one write of their gradient.

    dl/dz_j = q_j (f_L + f_S ((z_j - L) - S)),  j != g        dl/dz_g = f_g

In the units of the forward pass, with x = z_j log2 e - shift - log2 s = (z_j - L) log2 e, that is
``2^x (slope x - offset)``: an exponential and three multiply-adds a logit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cot_kernels.backends.triton.tiles import (
    FLOOR,
    LOG2E,
    first_classes,
    hint,
    is_interior,
    load_rows,
    misalignment,
    row_pointers,
    step_back,
)


@triton.jit
def complement_gradient(z, shift, log_total, slope, offset):
    # Subtracting the shift first keeps the rounding of a large L out of q. The clamp is for logits at -inf.
    x = tl.maximum((z * LOG2E - shift) - log_total, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(x) * (slope * x - offset)


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
    EVICTION: tl.constexpr,
):
    """The gradient of the BLOCK classes from ``start`` of one row; of an ignored one, without reading it.

    Masks, and all that is for the edges, are formed within the branches that need them: most tiles do without.
    """
    dtype: tl.constexpr = shift.dtype
    out_dtype: tl.constexpr = grad_pointers.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    if log_total == float("inf"):  # ignored
        classes = start + columns
        mask = (classes >= 0) & (classes < num_classes)
        tl.store(grad_pointers + columns, tl.zeros([BLOCK], out_dtype), mask=mask)
    elif is_interior(start, target, num_classes, BLOCK):
        z = tl.load(pointers + columns, eviction_policy=EVICTION).to(dtype)
        tl.store(grad_pointers + columns, complement_gradient(z, shift, log_total, slope, offset).to(out_dtype))
    else:
        classes = start + columns
        mask = (classes >= 0) & (classes < num_classes)
        z = tl.load(pointers + columns, mask=mask, other=0.0, eviction_policy=EVICTION).to(dtype)
        grad = complement_gradient(z, shift, log_total, slope, offset)
        grad = tl.where(classes == target, at_target, grad)
        tl.store(grad_pointers + columns, grad.to(out_dtype), mask=mask)


@triton.jit
def gradient_of_rows(z, classes, target, wanted, shift, log_total, slope, offset, at_target):
    """Of some classes [ROWS, BLOCK], or [1, BLOCK], of several rows; zero where they are ignored."""
    grad = complement_gradient(z, shift[:, None], log_total[:, None], slope[:, None], offset[:, None])
    grad = tl.where(classes == target[:, None], at_target[:, None], grad)
    return tl.where(wanted[:, None], grad, 0.0)


@triton.jit
def write_rows(
    z,
    classes,
    within,
    grad_base,
    head,
    target,
    inside,
    wanted,
    num_classes,
    grad_stride_k,
    shift,
    log_total,
    slope,
    offset,
    at_target,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of what :func:`.tiles.load_rows` found; of rows that begin anywhere, what fills whole accesses."""
    grad = gradient_of_rows(z.to(shift.dtype), classes, target, wanted, shift, log_total, slope, offset, at_target)
    if HEADS:
        places = tl.arange(0, BLOCK)
        access = (places // VEC * VEC)[None, :]
        within = (access >= head[:, None]) & (access + VEC <= head[:, None] + num_classes)
        pointers = step_back(grad_base, head, VEC)[:, None] + places[None, :]
    else:
        pointers = grad_base[:, None] + classes.to(tl.int64) * grad_stride_k
    tl.store(pointers, grad.to(grad_base.dtype.element_ty), mask=inside[:, None] & within)


@triton.jit
def write_ends(
    base,
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
):
    """What :func:`write_rows` leaves: the accesses that a row shares with its neighbours, one at either end."""
    end = head + num_classes
    last = end // VEC * VEC
    columns = tl.arange(0, 2 * VEC)
    at_start = (columns < VEC)[None, :]
    places = tl.where(at_start, columns[None, :], last[:, None] + (columns - VEC)[None, :])
    classes = places - head[:, None]
    # Of a row within one access either its start or its end, not both, is what is left.
    left = tl.where(at_start, head[:, None] > 0, ((last > 0) | (head == 0))[:, None])
    mask = left & (classes >= 0) & (places < end[:, None])
    z = tl.load(base[:, None] + classes, mask=mask & wanted[:, None], other=0.0).to(shift.dtype)
    grad = gradient_of_rows(z, classes, target, wanted, shift, log_total, slope, offset, at_target)
    tl.store(grad_base[:, None] + classes, grad.to(grad_base.dtype.element_ty), mask=mask & inside[:, None])


@triton.jit(do_not_specialize_on_alignment=["tiles", "turns"])
def gradient_kernel(
    logits_pointer,
    target_pointer,
    state_pointer,
    upstream_pointer,
    factor_pointer,  # read where the loss is a mean: 1 / count
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
    tiles,
    turns,
    HAS_FACTOR: tl.constexpr,
    LONG: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of ``turns`` tiles of BLOCK classes of one long row, or of ROWS rows."""
    program = tl.program_id(0).to(tl.int64)
    shares = tl.cdiv(tiles, turns)  # programs to a row
    block = program // shares
    num_rows = tl.cast(num_rows, tl.int64)  # 5 N entries of state pass 2^31
    first = (program - block * shares).to(tl.int32) * turns
    dtype: tl.constexpr = state_pointer.dtype.element_ty

    if LONG:
        row = block
        target = tl.load(target_pointer + row).to(tl.int64)
        state = state_pointer + row
        shift = tl.load(state)
        log_total = tl.load(state + num_rows)
        upstream = tl.load(upstream_pointer + row * upstream_stride).to(dtype)
        if HAS_FACTOR:
            upstream *= tl.load(factor_pointer)
        slope = tl.load(state + 2 * num_rows) * upstream
        offset = tl.load(state + 3 * num_rows) * upstream
        at_target = tl.load(state + 4 * num_rows) * upstream

        base = row_pointers(logits_pointer, row, inner, stride_n, stride_d)
        grad_base = row_pointers(grad_pointer, row, inner, grad_stride_n, grad_stride_d)
        head = misalignment(base, ALIGN)
        aligned = step_back(base, head, ALIGN)
        grad_aligned = step_back(grad_base, head, ALIGN)
        for tile in range(first, tl.minimum(first + turns, tiles)):
            place = tile * BLOCK
            write_tile(
                aligned + place, grad_aligned + place, place - head, target, num_classes,
                shift, log_total, slope, offset, at_target, BLOCK, "",
            )  # fmt: skip
    else:
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = rows < num_rows
        target = tl.load(target_pointer + rows, mask=inside, other=-1).to(tl.int64)
        state = state_pointer + rows
        log_total = tl.load(state + num_rows, mask=inside, other=float("inf"))
        wanted = log_total != float("inf")
        shift = tl.load(state, mask=wanted, other=0.0)
        upstream = tl.load(upstream_pointer + rows * upstream_stride, mask=wanted, other=0.0).to(dtype)
        if HAS_FACTOR:
            upstream *= tl.load(factor_pointer)
        slope = tl.load(state + 2 * num_rows, mask=wanted, other=0.0) * upstream
        offset = tl.load(state + 3 * num_rows, mask=wanted, other=0.0) * upstream
        at_target = tl.load(state + 4 * num_rows, mask=wanted, other=0.0) * upstream

        base = row_pointers(logits_pointer, rows, inner, hint(stride_n, ALIGN), stride_d)
        grad_base = row_pointers(grad_pointer, rows, inner, hint(grad_stride_n, ALIGN), grad_stride_d)
        head = first_classes(base, ROWS, VEC, HEADS)
        for tile in range(first, tl.minimum(first + turns, tiles)):
            read = inside if ACROSS else wanted  # as in the forward pass
            z, classes, within = load_rows(
                base, head, tile * BLOCK, read, num_classes, stride_k, BLOCK, VEC, ALIGN, HEADS, 0.0
            )
            write_rows(
                z, classes, within, grad_base, head, target, inside, wanted, num_classes, grad_stride_k,
                shift, log_total, slope, offset, at_target, BLOCK, VEC, HEADS,
            )  # fmt: skip
        if HEADS:
            write_ends(
                base, grad_base, head, target, inside, wanted, num_classes,
                shift, log_total, slope, offset, at_target, VEC,
            )  # fmt: skip
