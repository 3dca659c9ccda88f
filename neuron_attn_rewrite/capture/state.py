"""The tensors and plain values that a model keeps between calls, outside of its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake

MOST_KEPT = 2**16
"""The most elements of a tensor that is restored after a capture, such as the length of a cache."""


def state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each tensor and each plain value that is reachable from the model, but its parameters. Buffers come first."""
    yield from model.named_buffers()
    for path, value in _reached(model):
        if isinstance(value, (Tensor, int, float, str, type(None))):
            yield path, value


def _reached(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each tensor, plain value, container and object that is reachable from the model, but its weights and modules."""
    seen = {id(t) for t in (*model.parameters(), *model.buffers())}
    inside = ("_parameters", "_buffers", "_modules")
    stack = [
        (f"{name}.{key}" if name else key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in inside and not isinstance(module, fx.GraphModule)
    ]
    while stack:
        path, value = stack.pop()
        if isinstance(value, (int, float, str, type(None))):
            yield path, value
        elif id(value) not in seen:
            seen.add(id(value))
            yield path, value
            if isinstance(value, Mapping):
                stack += [(f"{path}[{key!r}]", part) for key, part in value.items()]
            elif isinstance(value, (list, tuple)):
                stack += [(f"{path}[{i}]", part) for i, part in enumerate(value)]
            elif _is_object(value):
                stack += [(f"{path}.{key}", part) for key, part in vars(value).items()]


def _is_object(value: Any) -> bool:
    is_other = isinstance(value, (Tensor, type, Enum, nn.Module)) or callable(value)
    return hasattr(value, "__dict__") and not is_other


def _holders(model: nn.Module) -> Iterator[dict[Any, Any] | list[Any]]:
    """The dicts and lists in which the model keeps its state: attributes, and containers."""
    yield from (vars(module) for module in model.modules() if not isinstance(module, fx.GraphModule))
    for _, value in _reached(model):
        if type(value) is dict or type(value) is list:
            yield value
        elif _is_object(value):
            yield vars(value)


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Restore small tensors: export runs a write into a tensor that is no buffer, or that an object holds as well.

    Where the model keeps a tensor that the trace has made, such as a cache that its first call makes, everything is
    restored: the tensor has no values.
    """
    holders = [(holder, holder.copy()) for holder in _holders(model)]
    small = [t for _, t in state(model) if isinstance(t, Tensor) and t.numel() <= MOST_KEPT and not t.is_meta]
    saved = [(t, t.detach().clone(), t._version) for t in small if not t.is_inference()]
    try:
        yield
    finally:
        for tensor, value, version in saved:
            if tensor._version != version:
                tensor.detach().copy_(value)
        if any(is_fake(value) for _, value in state(model)):
            for holder, before in holders:
                holder.clear()
                holder.update(before) if isinstance(holder, dict) else holder.extend(before)
