"""Objects that torch.export can't handle, such as the caches of transformers, taken apart and put together again.

torch.export takes nested lists, tuples, dicts and registered classes apart into tensors, and refuses any other object.
Here such an object is taken apart by its attributes, and put together again from the tensors of a call. No class of
another package is registered.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

ATOMS = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
"""What a graph can take and give."""
Atoms: TypeAlias = tuple[type, ...]


@dataclass(frozen=True)
class Slot:
    """The place of the i-th atom."""

    index: int


@dataclass(frozen=True)
class _Within:
    """A reference to an enclosing object, for an object that holds itself. The outermost object has depth 0."""

    depth: int


@dataclass(frozen=True)
class _Device:
    """A device. Any other one is as good: weights and inputs may move together after the capture."""

    device: torch.device = field(compare=False)


@dataclass(frozen=True)
class Parts:
    """An object, list, tuple or dict without its atoms."""

    kind: type
    parts: Any
    """A list of the items for a list or tuple. A dict of the entries for a dict, of the attributes for an object."""

    def __hash__(self) -> int:
        return hash(self.kind)

    def differs_from(self, other: Any, name: str = "") -> str:
        """Where this object differs from `other`, as it was captured, in words. Empty if only in its tensors."""
        if not isinstance(other, Parts) or self.kind is not other.kind:
            return f"{name or 'it'} is {_in_words(self)}, and was {_in_words(other)}"
        mine, its = (p.parts if isinstance(p.parts, dict) else dict(enumerate(p.parts)) for p in (self, other))
        is_object = isinstance(self.parts, dict) and not issubclass(self.kind, dict)
        for key in [*mine, *its]:
            place = f"{name}.{key}" if is_object else f"{name}[{key!r}]"
            if key not in mine or key not in its:
                return f"{place} {'is new' if key in mine else 'is missing'}"
            found: str = mine[key].differs_from(its[key], place) if isinstance(mine[key], Parts) else ""
            if found:
                return found
            if isinstance(mine[key], Slot) and isinstance(its[key], Slot) and mine[key] != its[key]:
                return f"{place} is the same tensor as another part in one of them, and not in the other"
            if not isinstance(mine[key], Parts) and mine[key] != its[key]:
                return f"{place} is {_in_words(mine[key])}, and was {_in_words(its[key])}"
        return ""


def _in_words(value: Any) -> str:
    if isinstance(value, Slot):
        return "a tensor"
    return f"a {value.kind.__name__}" if isinstance(value, Parts) else repr(value)


@dataclass
class Pieces:
    """What `take_apart` found."""

    kinds: Atoms = ATOMS
    atoms: list[Any] = field(default_factory=list)
    """Each atom once, also if it is in several places."""
    names: list[str] = field(default_factory=list)
    """Where each atom is in the object: `_layers_0_keys`."""

    def slot(self, atom: Any, name: str) -> Slot:
        for index, known in enumerate(self.atoms):
            if known is atom:
                return Slot(index)
        self.atoms.append(atom)
        self.names.append(name)
        return Slot(len(self.atoms) - 1)


class Opened:
    """An object among the outputs. A pytree of it is made into the object."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole


class Given(Opened):
    """An object among the inputs. A pytree of it stays one: torch.export makes and flattens inputs several times."""


def holds_tensors(value: Any) -> bool:
    """Whether this is an object, and no tensor itself, with tensors among its attributes or their parts."""
    pieces = Pieces()
    if not isinstance(value, ATOMS):
        take_apart(value, pieces)
    return bool(pieces.atoms)


def has_attributes(value: Any) -> bool:
    """Whether an object is what its attributes are."""
    return hasattr(value, "__dict__") and not isinstance(value, (type, Enum, nn.Module)) and not callable(value)


def leaves(values: Any, kinds: Atoms = ATOMS) -> list[Any]:
    """All leaves of a pytree. An object with atoms of these kinds counts as its atoms."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(values):
        pieces = Pieces(kinds)
        take_apart(leaf, pieces)
        found += pieces.atoms or [leaf]
    return found


def take_apart(value: Any, pieces: Pieces, name: str = "", within: tuple[int, ...] = ()) -> Any:
    """The value with a `Slot` in place of each atom. The atoms are added to `pieces`."""
    if isinstance(value, pieces.kinds):
        return pieces.slot(value, name)
    if isinstance(value, torch.device):
        return _Device(value)
    if id(value) in within:
        return _Within(within.index(id(value)))
    inner = (*within, id(value))
    if isinstance(value, (list, tuple)):
        return Parts(type(value), [take_apart(v, pieces, f"{name}_{i}", inner) for i, v in enumerate(value)])
    if isinstance(value, dict):
        return Parts(type(value), {k: take_apart(v, pieces, f"{name}_{k}", inner) for k, v in value.items()})
    if has_attributes(value):
        return Parts(type(value), {k: take_apart(v, pieces, f"{name}_{k}", inner) for k, v in vars(value).items()})
    return copy.deepcopy(value) if isinstance(value, set) else value


def put_together(value: Any, atoms: list[Any], around: tuple[Any, ...] = ()) -> Any:
    """A new object from its parts. Apart from the atoms, it shares no mutable value with the objects of other calls."""
    if isinstance(value, Slot):
        return atoms[value.index]
    if isinstance(value, _Device):
        return value.device
    if isinstance(value, _Within):
        return around[value.depth]
    if not isinstance(value, Parts):
        return copy.deepcopy(value) if isinstance(value, set) else value
    if isinstance(value.parts, list):
        items = [put_together(part, atoms, (*around, None)) for part in value.parts]
        return value.kind(*items) if hasattr(value.kind, "_fields") else value.kind(items)
    whole: Any = object.__new__(value.kind) if not issubclass(value.kind, dict) else dict.__new__(value.kind)
    named = {name: put_together(part, atoms, (*around, whole)) for name, part in value.parts.items()}
    (whole if isinstance(whole, dict) else vars(whole)).update(named)
    return whole


def _flatten(opened: Opened) -> tuple[list[Any], Any]:
    pieces = Pieces()
    parts = take_apart(opened.whole, pieces)
    return pieces.atoms, parts


def _flatten_with_keys(opened: Opened) -> tuple[list[tuple[Any, Any]], Any]:
    pieces = Pieces()
    parts = take_apart(opened.whole, pieces)
    names = [re.sub(r"\W", "_", name[1:]) for name in pieces.names]
    return [(pytree.GetAttrKey(name), atom) for name, atom in zip(names, pieces.atoms, strict=True)], parts


for _kind, _make in ((Opened, put_together), (Given, lambda parts, atoms: Given(put_together(parts, atoms)))):
    pytree.register_pytree_node(
        _kind,
        _flatten,
        lambda atoms, parts, make=_make: make(parts, list(atoms)),  # type: ignore[misc]
        serialized_type_name=f"{__name__}.{_kind.__name__}",
        flatten_with_keys_fn=_flatten_with_keys,
    )
