"""Arithmetic of single numbers, in the fewest instructions that keep its accuracy.

The operations of the language serve any number, subnormal ones and infinities with them; those here are for numbers of
which more is known.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(knobs.runtime.interpret)

# As an integer, the float32 at which the significand begins anew, 1 / sqrt 2, and the bits of the exponent.
_HALF_WAY = tl.constexpr(0x3F3504F3)
_EXPONENT = tl.constexpr(-(1 << 23))


@tl.core.builtin
def _for_nvidia(_semantic=None):
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


@triton.jit
def multiply_add(x, y, z):
    """x y + z, rounded once; in the interpreter, which rounds the product too, of those that a float64 holds."""
    return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(z.dtype) if INTERPRETED else tl.fma(x, y, z)


# What is done once a row takes as much time as some ten logits: with few classes it is what takes the time. HALF: the
# logits are of 16 bits, and instructions count; of wider ones there are fewer to a byte, and registers do.


@triton.jit
def quotient(x, y, HALF: tl.constexpr):
    """x / y, within two units in the last place; if HALF, of |y| from 2^-126 to 2^126. On AMD's GPUs it would cost
    registers."""
    if INTERPRETED:
        ours: tl.constexpr = False
    else:
        ours: tl.constexpr = HALF and _for_nvidia()  # type: ignore[no-redef]
    return libdevice.fast_dividef(x, y) if ours else x / y


@triton.jit
def _log2(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _HALF_WAY) & _EXPONENT
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1
    p = -0.10749789418083205 * f + 0.1847603336518138
    p = p * f - 0.1913883765667254
    p = p * f + 0.2048576477862193
    p = p * f - 0.23960812190957284
    p = p * f + 0.28855256143746744
    p = p * f - 0.3606965418075051
    p = p * f + 0.4808985203240642
    p = p * f - 0.7213473544789053
    p = p * f + 1.4426950399991885
    # An infinity and a NaN have lost what they are.
    return tl.fma(f, p, exponent.to(tl.float32) * 2.0**-23) + x * 0


@triton.jit
def log2(x, HALF: tl.constexpr):
    """log2 x, within two units in the last place; if HALF, of numbers from 2^-126 on, and NaN of infinity.

    There x = 2^i (1 + f) with f between sqrt 1/2 - 1 and sqrt 2 - 1, and log2 x = i + f P(f). P is the polynomial of
    degree 9 whose largest distance from log2(1 + f) / f there is least, 8e-9. It takes two thirds of the instructions
    of the language's own; but AMD's GPUs have the logarithm in hardware.
    """
    if INTERPRETED:
        ours: tl.constexpr = HALF
    else:
        ours: tl.constexpr = HALF and _for_nvidia()  # type: ignore[no-redef]
    return _log2(x) if ours else tl.log2(x)
