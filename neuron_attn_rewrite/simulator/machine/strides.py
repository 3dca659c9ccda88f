"""Strides of shapes, in elements."""

from __future__ import annotations

from collections.abc import Sequence


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor whose last dimension is the fastest."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def view_strides(shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of the same elements in another shape, or None if the shape needs a copy."""
    groups: list[list[int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = [groups[-1][0] * size, stride]
        else:
            groups.append([size, stride])
    result, rest = [1] * len(new), list(groups)
    for d in reversed(range(len(new))):
        if new[d] == 1:
            continue
        if not rest or rest[-1][0] % new[d]:
            return None
        size, stride = rest.pop()
        result[d] = stride
        if size > new[d]:
            rest.append([size // new[d], stride * new[d]])
    return tuple(result)
