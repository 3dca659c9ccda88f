"""The structure of the inputs or outputs of a graph as JSON, with a number for each tensor.

Lists, tuples, dicts, and the output and cache classes of transformers come back as what they are. Any other object
comes back as a tuple of its tensors.
"""

from __future__ import annotations

import importlib
import re
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.capture.handed import Effects
from neuron_attn_rewrite.capture.objects import Given, Opened
from neuron_attn_rewrite.capture.objects import leaves as parts
from neuron_attn_rewrite.errors import InputError, RewriteError
from neuron_attn_rewrite.storage import literals

_OUTPUTS = r"transformers\.(modeling_outputs|models\.\w+\.modeling_\w+)"
_CACHES = r"transformers\.cache_utils"
_DICTS: dict[str, Any] = {"dict": dict, "ordered": OrderedDict}


def encode(spec: pytree.TreeSpec) -> tuple[Any, list[str]]:
    """A structure as JSON, and the names of the classes in it that a file can't hold.

    Raises:
        RewriteError: it has objects among its inputs.
    """
    tensors = [torch.empty(0) for _ in range(spec.num_leaves)]
    numbers, unknown = {id(tensor): i for i, tensor in enumerate(tensors)}, list[str]()

    def write(value: Any) -> Any:
        if isinstance(value, (Given, Effects)):
            raise RewriteError(
                "a graph that takes an object, such as a cache, can't be saved: wrap the model in a module that takes "
                "the tensors and makes the object from them."
            )
        if isinstance(value, Tensor):
            return {"leaf": numbers[id(value)]}
        for name, kind in _DICTS.items():
            if type(value) is kind:
                return {name: [[literals.encode(key), write(part)] for key, part in value.items()]}
        if isinstance(value, (list, tuple)):
            if type(value) not in (list, tuple):
                unknown.append(type(value).__name__)
            return {"list" if isinstance(value, list) else "tuple": [write(part) for part in value]}
        kind, known = type(value), f"{type(value).__module__}:{type(value).__qualname__}"
        if isinstance(value, dict):
            fields = [[literals.encode(key), write(part)] for key, part in value.items()]
            if not _may_be_output(kind):
                unknown.append(kind.__name__)
                return {"dict": fields}
            return {"output": [known, fields]}
        if re.fullmatch(_CACHES, kind.__module__) and hasattr(value, "__dict__"):
            try:
                attributes = [[name, attribute(part)] for name, part in vars(value).items()]
            except RewriteError:
                unknown.append(kind.__name__)
                return plain(value)
            return {"object": [known, attributes, plain(value)]}
        if hasattr(value, "__dict__") and parts(value, (Tensor,)) != [value]:
            unknown.append(kind.__name__)
            return plain(value)
        return {"literal": literals.encode(value)}

    def attribute(value: Any) -> Any:
        if isinstance(value, type) and re.fullmatch(_CACHES, value.__module__):
            return {"class": f"{value.__module__}:{value.__qualname__}"}
        return write(value)

    def plain(value: Any) -> Any:
        return {"tuple": [{"leaf": numbers[id(part)]} for part in parts(value, (Tensor,)) if isinstance(part, Tensor)]}

    return write(pytree.tree_unflatten(tensors, spec)), unknown


def _may_be_output(kind: type) -> bool:
    return re.fullmatch(_OUTPUTS, kind.__module__) is not None


def decode(data: Any, count: int) -> tuple[pytree.TreeSpec, list[int], list[str]]:
    """The structure, the number of each of its leaves in order, and the classes that this installation does not have.

    Args:
        data: what `encode` gave.
        count: how many leaves there are.

    Raises:
        InputError: the data is nothing that `encode` gives.
    """
    tensors = [torch.empty(0) for _ in range(count)]
    missing: list[str] = []

    def read(data: Any, depth: int = 0) -> Any:
        ((kind, content),) = data.items()
        if kind == "leaf":
            if type(content) is not int or not 0 <= content < count:
                raise InputError(f"there is no output {content!r:.80}")
            return tensors[content]
        if kind == "literal":
            return literals.decode(content, {})
        if kind in ("list", "tuple"):
            items = [read(part, depth) for part in content]
            return items if kind == "list" else tuple(items)
        if kind in _DICTS:
            return _DICTS[kind]((literals.decode(key, {}), read(part, depth)) for key, part in content)
        if kind == "output":
            fields = {literals.decode(key, {}): read(part, depth) for key, part in content[1]}
            output = _class_of(content[0], _OUTPUTS, ("ModelOutput",), missing)
            return fields if output is None else output(**fields)
        if kind == "class":
            return _class_of(content, _CACHES, ("Cache", "CacheLayerMixin"), missing)
        if kind == "object":
            made = _class_of(content[0], _CACHES, ("Cache", "CacheLayerMixin"), missing)
            if made is None:
                return read(content[2], depth)
            whole = object.__new__(made)
            vars(whole).update({literals.name(name): read(part, depth + 1) for name, part in content[1]})
            return whole if depth else Opened(whole)
        raise InputError(f"unknown output {kind!r:.80}")

    found, spec = pytree.tree_flatten(read(data))
    numbers = {id(tensor): i for i, tensor in enumerate(tensors)}
    return spec, [numbers[id(tensor)] for tensor in found], missing


def _class_of(place: Any, modules: str, bases: tuple[str, ...], missing: list[str]) -> Any:
    """A class of transformers, given as "module:name". None if this installation has no such class.

    Raises:
        InputError: it is not a class of one of these modules that inherits from one of the bases.
    """
    module, _, name = str(place).partition(":")
    if not re.fullmatch(modules, module) or not name.isidentifier():
        raise InputError(f"{place!r:.80} is no class of outputs")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):
        missing.append(f"{module}.{name}")
        return None
    if not isinstance(found, type) or not any(base.__name__ in bases for base in found.__mro__):
        raise InputError(f"{place!r:.80} is no class of outputs")
    return found
