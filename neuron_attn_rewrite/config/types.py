"""Whether a value is of the type that a field declares."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type hint: a class, a union, a literal, a tuple `tuple[T, ...]` or a mapping.

    A bool is no number, and an int is also a float.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(value is part or (type(value) is type(part) and value == part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(entry, parts[0]) for entry in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if isinstance(value, bool):
        return hint in (bool, Any)
    if hint is float:
        return isinstance(value, (int, float))
    return hint is Any or (value is None if hint is None else isinstance(value, hint))


def in_words(hint: Any) -> str:
    """A type hint as a reader would write it, such as `str or None`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, parts))
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}" if len(parts) > 1 else repr(parts[0])
    if origin is tuple:
        return f"a tuple with entries of: {in_words(parts[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a dict from {in_words(parts[0])} to {in_words(parts[1])}"
    return "None" if hint in (None, type(None)) else str(getattr(hint, "__name__", hint))
