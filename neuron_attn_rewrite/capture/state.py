"""The tensors and plain values that a model keeps between calls, outside of its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from torch import Tensor, fx, nn

MOST_KEPT = 2**16
"""The most elements of a tensor that is restored after a capture, such as the length of a cache."""


def state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each tensor and each plain value that is reachable from the model, but its parameters. Buffers come first."""
    yield from model.named_buffers()
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
            if isinstance(value, Tensor):
                yield path, value
            elif isinstance(value, Mapping):
                stack += [(f"{path}[{key!r}]", part) for key, part in value.items()]
            elif isinstance(value, (list, tuple)):
                stack += [(f"{path}[{i}]", part) for i, part in enumerate(value)]
            elif hasattr(value, "__dict__") and not isinstance(value, (type, Enum, nn.Module)) and not callable(value):
                stack += [(f"{path}.{key}", part) for key, part in vars(value).items()]


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Restore small tensors: export runs a write into a tensor that is no buffer, or that an object holds as well."""
    small = [t for _, t in state(model) if isinstance(t, Tensor) and t.numel() <= MOST_KEPT and not t.is_meta]
    saved = [(t, t.detach().clone(), t._version) for t in small if not t.is_inference()]
    try:
        yield
    finally:
        for tensor, value, version in saved:
            if tensor._version != version:
                tensor.detach().copy_(value)
