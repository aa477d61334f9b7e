"""What numbers among the arguments must be, and errors that name the argument, what was got and what is wanted."""

from __future__ import annotations

import math
from numbers import Real


def check_positive(name: str, value: float) -> None:
    """TypeError or ValueError for all but a positive, finite number."""
    _check_number(name, value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_nonnegative(name: str, value: float) -> None:
    """TypeError or ValueError for all but a finite number of at least 0."""
    _check_number(name, value)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")


def check_count(name: str, value: int, *, least: int) -> None:
    """TypeError or ValueError for all but an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
