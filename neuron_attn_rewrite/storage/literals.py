"""The literals of a graph as JSON, and JSON as literals.

None, bools, integers, finite floats, strings and lists are themselves. Every other kind is an object with one key.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from neuron_attn_rewrite.errors import InputError, RewriteError

_NAMED: Mapping[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
"""The kinds of constants that are attributes of `torch`."""


def encode(value: Any) -> Any:
    """An argument of a node as JSON.

    Raises:
        RewriteError: it is of no kind that a file can hold.
    """
    if value is None or isinstance(value, (bool, str)) or (type(value) is int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(part) for part in value]}
    if isinstance(value, list):
        return [encode(part) for part in value]
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(part)] for key, part in value.items()]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in _NAMED.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise RewriteError(f"a {type(value).__name__} in the graph can't be saved: {value!r:.80}.")


def decode(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The value that `encode` made `data` from.

    Args:
        data: JSON.
        nodes: the nodes that it may refer to.

    Raises:
        InputError: it is none of the kinds that `encode` writes.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(part, nodes) for part in data]
    if isinstance(data, dict) and len(data) == 1:
        (kind, content), read = next(iter(data.items())), lambda part: decode(part, nodes)
        if kind in _NAMED:
            return _constant(kind, content)
        if kind in _READ:
            return _READ[kind](content, read)
        if kind == "node":
            return nodes[content]
    raise InputError(f"unknown value {data!r:.80}")


def _constant(kind: str, name: Any) -> Any:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, _NAMED[kind]):
        raise InputError(f"unknown {kind} {name!r:.80}")
    return found


_READ: Mapping[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "float": lambda content, read: float(content),
    "complex": lambda content, read: complex(*map(read, content)),
    "tuple": lambda content, read: tuple(map(read, content)),
    "slice": lambda content, read: slice(*map(read, content)),
    "dict": lambda content, read: {read(key): read(part) for key, part in content},
    "device": lambda content, read: torch.device(content),
}


def name(text: Any) -> str:
    """A name that goes into the source code of a graph module.

    Raises:
        InputError: it is not an identifier of Python.
    """
    if not isinstance(text, str) or not text.isidentifier() or keyword.iskeyword(text):
        raise InputError(f"{text!r:.80} is not a name")
    return text


def path(text: Any) -> str:
    """The path of a weight, which goes into the source code of a graph module between quotes.

    Raises:
        InputError: it has a character that could end the quotes.
    """
    if not isinstance(text, str) or not re.fullmatch(r"""[^"'\\\s\x00-\x1f]+""", text) or "" in text.split("."):
        raise InputError(f"{text!r:.80} is not the path of a weight")
    return text
