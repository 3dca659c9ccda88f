"""Outputs that torch.export can't handle, such as the caches of transformers, keep their class in a captured graph.

torch.export takes nested lists, tuples, dicts and registered classes apart into tensors, and refuses any other object
that holds tensors. Here each such object among the outputs is taken apart by its attributes while the model is
captured, and put together again from the tensors that the graph gives. No class of another package is registered.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

ATOMS = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
"""What a graph can give."""
Atoms: TypeAlias = tuple[type, ...]


@dataclass(frozen=True)
class _Slot:
    """The place of the i-th atom."""

    index: int


@dataclass(frozen=True)
class _Within:
    """A reference to an enclosing object, for an object that holds itself. The outermost object has depth 0."""

    depth: int


@dataclass(frozen=True)
class _Parts:
    """An object without its atoms."""

    kind: type
    parts: Any
    """A dict of the attributes for an object. A list or dict of the entries for a list, tuple or dict."""

    def __hash__(self) -> int:
        return hash(self.kind)


class Opened:
    """An object that is to be taken apart by `_flatten`."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole


def holds_tensors(value: Any) -> bool:
    """Whether this is an object, and no tensor itself, with tensors among its attributes or their parts."""
    atoms: list[Any] = []
    if not isinstance(value, ATOMS):
        _take_apart(value, atoms, ATOMS)
    return bool(atoms)


@contextlib.contextmanager
def objects_opened(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` returns an `Opened` for each output that `holds_tensors`."""
    forward, had_own = model.forward, "forward" in vars(model)

    @functools.wraps(forward)
    def opening(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map(lambda leaf: Opened(leaf) if holds_tensors(leaf) else leaf, forward(*args, **kwargs))

    model.forward = opening
    try:
        yield
    finally:
        if had_own:
            model.forward = forward
        else:
            del model.forward


def leaves(outputs: Any, kinds: Atoms = ATOMS) -> list[Any]:
    """All leaves of the outputs. An object with atoms of these kinds counts as its atoms."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(outputs):
        atoms: list[Any] = []
        _take_apart(leaf, atoms, kinds)
        found += atoms or [leaf]
    return found


def _take_apart(value: Any, atoms: list[Any], kinds: Atoms, within: tuple[int, ...] = ()) -> Any:
    """The value with a slot in place of each atom. Adds the atoms to `atoms`. A value without atoms is not changed."""
    if isinstance(value, kinds):
        atoms.append(value)
        return _Slot(len(atoms) - 1)
    if id(value) in within:
        return _Within(within.index(id(value)))
    before, inner = len(atoms), (*within, id(value))
    parts: Any = None
    if isinstance(value, (list, tuple)):
        parts = [_take_apart(part, atoms, kinds, inner) for part in value]
    elif isinstance(value, dict) or _has_attributes(value):
        named = value if isinstance(value, dict) else vars(value)
        parts = {name: _take_apart(part, atoms, kinds, inner) for name, part in named.items()}
    return value if len(atoms) == before else _Parts(type(value), parts)


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (type, Enum, nn.Module)) and not callable(value)


def _put_together(value: Any, atoms: list[Any], around: tuple[Any, ...] = ()) -> Any:
    """A new object from its parts. Apart from the atoms, it shares no mutable value with the objects of other calls."""
    if isinstance(value, _Slot):
        return atoms[value.index]
    if isinstance(value, _Within):
        return around[value.depth]
    if not isinstance(value, _Parts):
        return copy.deepcopy(value) if isinstance(value, (list, dict, set)) or _has_attributes(value) else value
    if isinstance(value.parts, list):
        items = [_put_together(part, atoms, (*around, None)) for part in value.parts]
        return value.kind(*items) if hasattr(value.kind, "_fields") else value.kind(items)
    whole: Any = object.__new__(value.kind) if not issubclass(value.kind, dict) else dict.__new__(value.kind)
    named = {name: _put_together(part, atoms, (*around, whole)) for name, part in value.parts.items()}
    (whole if isinstance(whole, dict) else vars(whole)).update(named)
    return whole


def _flatten(opened: Opened) -> tuple[list[Any], Any]:
    atoms: list[Any] = []
    parts = _take_apart(opened.whole, atoms, ATOMS)
    return atoms, parts


def _unflatten(atoms: Any, parts: Any) -> Any:
    return _put_together(parts, list(atoms))


pytree.register_pytree_node(Opened, _flatten, _unflatten, serialized_type_name=f"{__name__}.Opened")
