"""What a dtype does to numbers, and which algebra of real numbers is exact in it.

Real numbers allow `a + (b + c) == (a + b) + c` and `a * (b * c) == (a * b) * c`. A dtype allows this only in a part of
its range. In int8, 100 + 100 is -56. In bool, 1 + 1 is 1. In float32, `finfo.min * 2` is -inf, and -inf * 0 is NaN.
Every rule that reorders or joins operations of a model asks one of these functions first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_FACTOR = 2.0**64
"""Factors beyond this number, or below its reciprocal, are not joined.

Their product may leave the range of float32 although the model's own products stay in it, or the other way round.
"""


def number_in(kind: torch.dtype, value: float) -> float:
    """The number that a literal becomes in a dtype.

    It is rounded in a floating dtype, infinite beyond its range, and 0 or 1 in bool. In an integer dtype it wraps.
    """
    if kind == torch.bool or kind.is_floating_point or kind.is_complex:
        return float(torch.tensor(value, dtype=torch.float64).to(kind).real)
    if not math.isfinite(value):
        return math.nan  # what a cast of it gives differs from machine to machine
    info = torch.iinfo(kind)
    return float((int(value) - info.min) % (info.max - info.min + 1) + info.min)


def holds(kind: torch.dtype, lowest: int, highest: int) -> bool:
    """Whether an integer dtype holds all integers between two. False for bool and for floating dtypes."""
    if kind == torch.bool or kind.is_floating_point or kind.is_complex:
        return False
    info = torch.iinfo(kind)
    return info.min <= lowest and highest <= info.max


def is_algebraic(kind: torch.dtype) -> bool:
    """Whether sums and products may be taken apart: in floating dtypes, where nothing wraps."""
    return kind.is_floating_point


def sums_are_fine(kind: torch.dtype) -> bool:
    """Whether a sum in the dtype is as exact as a sum in float32."""
    return kind.is_floating_point and torch.finfo(kind).eps <= torch.finfo(torch.float32).eps


def largest(kind: torch.dtype) -> float:
    """The largest finite number of a floating dtype; infinite for other dtypes."""
    return torch.finfo(kind).max if kind.is_floating_point else math.inf


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors hold the same number, or none. 0.0 and -0.0 are two: one divided by them is inf and -inf."""
    if not a.is_floating_point():
        return a == b
    return torch.where(a.isnan(), b.isnan(), (a == b) & (a.signbit() == b.signbit()))


def product(a: float, b: float) -> float | None:
    """Two factors as one; None if `x * (a * b)` may differ from `(x * a) * b` by more than rounding."""
    if not math.isfinite(a) or not math.isfinite(b):
        return None
    if abs(a) == 1.0 or abs(b) == 1.0:
        return a * b
    return a * b if all(1 / LARGEST_FACTOR <= abs(n) <= LARGEST_FACTOR for n in (a, b, a * b)) else None
