"""16-bit logits in pairs, as they lie in registers, and what NVIDIA's GPUs do with both of a pair at once.

The language takes them apart before it compares them, and then holds them in registers of their own. So a tile of
logits is here one of half as many int32, the former of a pair in the lower half; and two instructions for which the
language has no word are assembly, and in Triton's interpreter what they stand for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cot_kernels.backends.triton.arithmetic import INTERPRETED
from cot_kernels.backends.triton.tiles import FLOOR, by_row, is_target

_LOWER = tl.constexpr(0x0000FFFF)
_UPPER = tl.constexpr(-0x10000)


@triton.jit
def in_pairs(z, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile [ROWS, WIDTH] as [ROWS, WIDTH // 2]. Of no instruction: the halves are where they were."""
    former, latter = tl.split(tl.reshape(z, [ROWS, WIDTH // 2, 2]))
    former = former.to(tl.uint16, bitcast=True).to(tl.uint32)
    latter = latter.to(tl.uint16, bitcast=True).to(tl.uint32)
    return ((latter << 16) | former).to(tl.int32, bitcast=True)


@triton.jit
def formers(pairs, dtype: tl.constexpr):
    """The former of each pair, in float32."""
    if dtype == tl.bfloat16:  # the upper half of a float32
        z = (pairs << 16).to(tl.float32, bitcast=True)
    else:
        z = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return z


@triton.jit
def latters(pairs, dtype: tl.constexpr):
    """The latter of each pair, in float32."""
    if dtype == tl.bfloat16:
        z = (pairs & _UPPER).to(tl.float32, bitcast=True)
    else:
        z = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return z


@triton.jit
def _larger_bfloat16(x, y):
    """Of numbers and NaN the number."""
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, is_pure=True, pack=1)


@triton.jit
def _larger_float16(x, y):
    return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, is_pure=True, pack=1)


@triton.jit
def larger(x, y, dtype: tl.constexpr):
    """The larger of the formers and of the latters of two tiles."""
    if INTERPRETED:
        former = tl.maximum(formers(x, dtype), formers(y, dtype)).to(dtype).to(tl.uint16, bitcast=True)
        latter = tl.maximum(latters(x, dtype), latters(y, dtype)).to(dtype).to(tl.uint16, bitcast=True)
        pairs = ((latter.to(tl.uint32) << 16) | former.to(tl.uint32)).to(tl.int32, bitcast=True)
    elif dtype == tl.bfloat16:
        pairs = _larger_bfloat16(x, y)
    else:
        pairs = _larger_float16(x, y)
    return pairs


@triton.jit
def largest(pairs, axis: tl.constexpr, dtype: tl.constexpr):
    """Of all logits along an axis, in float32."""
    if INTERPRETED:
        former, latter = tl.max(formers(pairs, dtype), axis), tl.max(latters(pairs, dtype), axis)
    else:
        if dtype == tl.bfloat16:
            pair = tl.reduce(pairs, axis, _larger_bfloat16)
        else:
            pair = tl.reduce(pairs, axis, _larger_float16)
        former, latter = formers(pair, dtype), latters(pair, dtype)
    return tl.maximum(former, latter)


@triton.jit
def finite(pairs, dtype: tl.constexpr):
    """Formers and latters with a number below the floor in place of -inf, of which nothing comes: 0 * -inf would make a
    moment NaN. The NaN of a logit is let through."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        below = tl.full(pairs.shape, -0xE7F0E80, tl.int32)  # -2^100 twice
        pairs = tl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [pairs, below], tl.int32, is_pure=True, pack=1
        )
        former, latter = formers(pairs, dtype), latters(pairs, dtype)
    else:
        former = tl.maximum(formers(pairs, dtype), FLOOR, propagate_nan=tl.PropagateNan.ALL)
        latter = tl.maximum(latters(pairs, dtype), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return former, latter


@triton.jit
def only(z, kept):
    """Logits where they are ``kept``, -inf elsewhere. The interpreter has no constants in bfloat16."""
    return tl.where(kept, z, tl.full(z.shape, -float("inf"), tl.float32).to(z.dtype))


@triton.jit
def without_target(pairs, target, ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, dtype: tl.constexpr):
    """Pairs of a tile [ROWS, WIDTH] with -inf at the place ``target``, [ROWS], of each row."""
    nothing: tl.constexpr = 0xFF80 if dtype == tl.bfloat16 else 0xFC00
    latter = (target & 1) != 0
    kept = by_row(tl.where(latter, _LOWER, _UPPER))
    filled = by_row(tl.where(latter, (nothing - 0x10000) << 16, nothing))
    return tl.where(is_target(target >> 1, ROWS, WIDTH // 2, VEC // 2), (pairs & kept) | filled, pairs)
