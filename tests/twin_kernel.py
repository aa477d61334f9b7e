"""A kernel that evaluates a device objective, or its arithmetic, on given rows. Imported by conftest while the
interpreter is chosen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cot_kernels.backends.triton.arithmetic import log2, quotient


@triton.jit
def twin_kernel(
    rows_pointer,
    out_pointer,
    scale: tl.float64,
    parameter: tl.float64,
    exponent: tl.float64,
    count,
    TWIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.arange(0, BLOCK)
    mask = place < count
    log_odds = tl.load(rows_pointer + place, mask=mask, other=0.0)
    negentropy = tl.load(rows_pointer + count + place, mask=mask, other=0.0)
    loss, d_log_odds, d_negentropy = TWIN(
        log_odds,
        negentropy,
        tl.full(place.shape, scale, log_odds.dtype),
        tl.full(place.shape, parameter, log_odds.dtype),
        tl.full(place.shape, exponent, log_odds.dtype),
        log_odds.dtype == tl.float32,
    )
    tl.store(out_pointer + place, loss, mask=mask)
    tl.store(out_pointer + count + place, d_log_odds, mask=mask)
    tl.store(out_pointer + 2 * count + place, d_negentropy, mask=mask)


@triton.jit
def arithmetic(x, y, scale, parameter, exponent, HALF: tl.constexpr):
    """In the place of a device objective: log2 x, x / y and 1 / y."""
    return log2(x, HALF), quotient(x, y, HALF), quotient(tl.full(y.shape, 1.0, y.dtype), y, HALF)
