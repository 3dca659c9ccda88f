"""The axis algebra: which axes of the attention each dim of a tensor runs over.

The scores of an attention have axes (batch, head, query, key, ...). Each dim of a tensor near them runs over a product
of *atoms*. An atom is one digit of the index along one axis. So splitting, merging, permuting and broadcasting dims is
arithmetic on atoms, and a role (query, key, feature) is never guessed from a size.

A dim that runs over nothing has size 1, so an axis of size 1 has no atom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias


@dataclass(frozen=True, order=True)
class Atom:
    """The digit `index // stride % size` of the index along one axis."""

    axis: int
    stride: int
    size: int


Dim: TypeAlias = tuple[Atom, ...]
"""Atoms from the slowest to the fastest, as in a reshape."""
Dims: TypeAlias = tuple[Dim, ...]


def axis_dim(axis: int, size: int) -> Dim:
    """A dim that runs over one whole axis."""
    return (Atom(axis, 1, size),) if size > 1 else ()


def dim_size(dim: Iterable[Atom]) -> int:
    return prod(atom.size for atom in dim)


def sizes(dims: Dims) -> tuple[int, ...]:
    return tuple(map(dim_size, dims))


def atoms(dims: Iterable[Dim]) -> list[Atom]:
    return [atom for dim in dims for atom in dim]


def merged(dim: Iterable[Atom]) -> Dim:
    """The same dim with neighbouring digits of one axis joined. Two equal dims are the same tuple then."""
    out: list[Atom] = []
    for atom in dim:
        if out and out[-1].axis == atom.axis and out[-1].stride == atom.stride * atom.size:
            out[-1] = Atom(atom.axis, atom.stride, out[-1].size * atom.size)
        else:
            out.append(atom)
    return tuple(out)


def split(dim: Dim, low: int) -> tuple[Dim, Dim] | None:
    """Cut a dim into a slow part and a fast part of size `low`; None if there is no digit boundary."""
    fast: list[Atom] = []
    slow = list(dim)
    while low > 1:
        if not slow:
            return None
        atom = slow.pop()
        if low % atom.size == 0:
            fast.insert(0, atom)
            low //= atom.size
        elif atom.size % low == 0:
            fast.insert(0, Atom(atom.axis, atom.stride, low))
            slow.append(Atom(atom.axis, atom.stride * low, atom.size // low))
            low = 1
        else:
            return None
    return merged(slow), merged(fast)


def regroup(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """The dims of a row-major reshape to `shape`."""
    rest: Dim = merged(atoms(dims))
    out: list[Dim] = []
    for size in reversed(shape):
        cut = split(rest, size)
        if cut is None:
            return None
        rest, fast = cut
        out.insert(0, fast)
    return None if rest else tuple(out)


def permute(dims: Dims, order: Sequence[int]) -> Dims:
    return tuple(dims[i] for i in order)


def refine(dim: Iterable[Atom], others: Iterable[Atom]) -> tuple[Atom, ...]:
    """Cut each atom at every digit boundary that one of `others` has inside it."""
    others = tuple(others)
    out: list[Atom] = []
    for atom in dim:
        end = atom.stride * atom.size
        cuts = {c for o in others if o.axis == atom.axis for c in (o.stride, o.stride * o.size)}
        strides = sorted({atom.stride, *(c for c in cuts if atom.stride < c < end)})
        pieces = [Atom(atom.axis, lo, hi // lo) for lo, hi in zip(strides, [*strides[1:], end], strict=True)]
        if prod(p.size for p in pieces) != atom.size or any(
            hi % lo for lo, hi in zip(strides, [*strides[1:], end], strict=True)
        ):
            return tuple(dim)  # digits of unrelated bases: nothing to align
        out.extend(reversed(pieces))
    return tuple(out)


@dataclass(frozen=True)
class Step:
    """One data movement of a layout: reshape, permute or expand, with its sizes or order."""

    op: str
    arg: tuple[int, ...]


Layout: TypeAlias = tuple[Step, ...]


def layout_steps(source: Dims, target: Dims, full: bool = False) -> Layout | None:
    """The steps that bring a tensor over `source` into the dims `target`.

    If the source has no atom of a target dim, that dim has size 1 and broadcasts, or is expanded with `full`. If it has
    some of its atoms, the dim is expanded. None if the source runs over an atom that the target does not have, or if
    digits don't align.
    """
    if source == target:
        return ()
    fine_source = refine(atoms(source), atoms(target))
    fine_target = tuple(refine(dim, atoms(source)) for dim in target)
    wanted = [atom for dim in fine_target for atom in dim]
    if not set(fine_source) <= set(wanted) or len(set(fine_source)) != len(fine_source):
        return None
    have = set(fine_source)
    order = [fine_source.index(atom) for atom in wanted if atom in have]
    partial = [dim if full or any(a in have for a in dim) else () for dim in fine_target]
    steps = [
        Step("reshape", tuple(a.size for a in fine_source)),
        Step("permute", tuple(order)),
        Step("reshape", tuple(a.size if a in have else 1 for dim in partial for a in dim)),
        Step("expand", tuple(a.size for dim in partial for a in dim)),
        Step("reshape", tuple(dim_size(dim) for dim in partial)),
    ]
    return _simplified(steps, sizes(source))


def _simplified(steps: list[Step], shape: tuple[int, ...]) -> Layout:
    """Drop steps that change nothing, and join reshapes that follow each other."""
    kept: list[Step] = []
    for step in steps:
        before = shape
        shape = tuple(shape[i] for i in step.arg) if step.op == "permute" else step.arg
        if step.op == "permute" and step.arg == tuple(range(len(step.arg))):
            continue
        if step.op != "permute" and shape == before:
            continue
        if step.op == "reshape" and kept and kept[-1].op == "reshape":
            kept.pop()
        kept.append(step)
    return tuple(kept)


def run_layout(layout: Layout, value: Any, apply: Callable[[str, Any, tuple[int, ...]], Any]) -> Any:
    """Apply the steps one after another with `apply(op, value, arg)`."""
    for step in layout:
        value = apply(step.op, value, step.arg)
    return value
