"""What the instructions of PTX compute, of NumPy arrays with a number a thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "16x2": 4, "32x2": 8}


def dtype_of(suffix: str) -> np.dtype[Any]:
    """Of an operand of type b32, s64, f32 and the like."""
    kind, bits = suffix[0], suffix[1:]
    return np.dtype(f"{ {'b': 'u', 'u': 'u', 's': 'i', 'f': 'f'}[kind] }{_SIZES[bits]}")


def unsigned(size: int) -> np.dtype[Any]:
    return np.dtype(f"u{size}")


def to_bfloat16(value: Array) -> Array:
    """float32 rounded to nearest even, as its upper 16 bits."""
    bits = value.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def to_half(value: Array) -> Array:
    return value.astype(np.float16).view(np.uint16)


def _flushed(value: Array) -> Array:
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, value * np.float32(0), value)


def _shift(value: Array, by: Array, left: bool) -> Array:
    """Shifts by as many bits as there are, or more, leave zeros, or the sign."""
    bits = value.dtype.itemsize * 8
    kept = np.minimum(by, bits - 1).astype(value.dtype)
    if left:
        return np.where(by < bits, value << kept, 0)
    return np.where((by < bits) | (value.dtype.kind == "i"), value >> kept, 0)


def permuted(eight: Array, selector: Array) -> Array:
    """Four of eight bytes, or where the selector asks for it their signs, one for every digit of it."""
    result = np.zeros(np.broadcast_shapes(eight.shape, selector.shape), np.uint32)
    for at in range(4):
        digit = selector >> np.uint64(4 * at)
        byte = (eight >> np.uint64(8) * (digit & np.uint64(7))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where(digit & np.uint64(8), sign, byte)
        result |= (byte << np.uint64(8 * at)).astype(np.uint32)
    return result


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": lambda a, b: ~(a == b), "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip

BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def arithmetic(name: str, modifiers: list[str], values: list[Array]) -> Array:
    """What an instruction computes of its operands. Its ``ftz`` takes subnormal numbers for zeros, before and after."""
    flush = "ftz" in modifiers and values[0].dtype == np.float32
    result = _exact(name, modifiers, [_flushed(each) for each in values] if flush else values)
    return _flushed(result) if flush else result


def _exact(name: str, modifiers: list[str], values: list[Array]) -> Array:
    if name in BINARY:
        first, second = values
        return BINARY[name](first, second)
    if name in ("shl", "shr"):
        return _shift(*values, left=name == "shl")
    first, dtype = values[0], values[0].dtype
    if name == "mul":
        return first * values[1]
    if name == "fma":  # the product is not rounded: float64 holds that of two float32
        wider = np.float64 if dtype == np.float32 else np.longdouble
        return (first.astype(wider) * values[1] + values[2]).astype(dtype)
    if name == "mad":
        return first * values[1] + values[2]
    if name in ("max", "min"):
        propagates = dtype.kind != "f" or "NaN" in modifiers
        pick = {"max": (np.fmax, np.maximum), "min": (np.fmin, np.minimum)}[name][propagates]
        picked: Array = functools.reduce(pick, values)  # of two, or of three
        return picked
    if name == "div" and dtype.kind == "f":
        huge = ("approx" in modifiers) & (np.abs(values[1]) > 2.0**126) & np.isfinite(first)
        return np.where(huge, first * 0, first / values[1])
    if name in ("div", "rem") and dtype.kind != "f":  # towards zero
        quotient = np.where(values[1] != 0, np.trunc(first / np.where(values[1] == 0, 1, values[1])), 0)
        quotient = quotient.astype(dtype)
        return quotient if name == "div" else first - quotient * values[1]
    if name == "bfe":
        _, start, length = values
        bits = 8 * dtype.itemsize
        above = _shift(first, np.maximum(bits - start.astype(np.int64) - length, 0).astype(np.uint32), left=True)
        return _shift(above, (bits - length.astype(np.int64)).astype(np.uint32), left=False)
    unary: dict[str, Callable[[Array], Array]] = {
        "neg": np.negative, "not": np.invert, "abs": np.abs, "rcp": np.reciprocal, "sqrt": np.sqrt,
        "ex2": np.exp2, "lg2": np.log2,
    }  # fmt: skip
    return unary[name](first)
