"""Caches of a model's own kind, without layers: lists of keys and values, and of states.

A state keeps its shape, and stays what it is. The keys and values of an attention grow: `update` of the model's class
appends to them. Here a class is derived that holds a layer of fixed shape for each attention instead.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.generation.position import Slicing, Width


class OwnCache:
    """What the derived class has of its own. All else is as in the model's class."""

    first: Any
    """The cache before the first call of the model."""
    rows: dict[int, Any]
    """The layer of each attention."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new rows, [batch, num_kv_heads, q_len, size]. Gives all keys and values that the attention reads."""
        if layer_idx not in self.rows:
            self.rows[layer_idx] = _Grown(key, value)
        return self.rows[layer_idx].update(key, value)  # type: ignore[no-any-return]

    def get_seq_length(self, *args: Any) -> Any:
        """How many tokens are cached."""
        return next((layer.get_seq_length() for layer in self.rows.values()), 0)

    def get_mask_sizes(self, positions: Tensor, *args: Any) -> tuple[int, Any]:
        """How many keys the attention reads, and the position of the first."""
        for layer in self.rows.values():
            return layer.get_mask_sizes(positions)  # type: ignore[no-any-return]
        return positions.shape[0], 0

    def reset(self) -> None:
        """Make the next call the first one."""
        rows = self.rows
        vars(self).clear()
        vars(self).update(copy.deepcopy(vars(self.first)))
        self.rows = rows
        for layer in rows.values():
            layer.reset()


class _Grown:
    """Keys and values of the first token."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key, value


class Answers(Slicing):
    """Within the block, what models ask about the values of masks and positions has an answer. A graph has no values.

    `torch.all` of a tensor is False: a model asks whether a mask hides nothing, and does without it then. The first and
    the last one of the positions have a range.
    """

    def __init__(self, positions: Tensor, first: tuple[int, int], last: int) -> None:
        super().__init__()
        self.positions, self.ranges = positions, {0: first, -1: (first[0], last)}

    def __torch_function__(self, operator: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in (torch.all, Tensor.all) and len(args) == 1 and not kwargs:
            return False
        found = super().__torch_function__(operator, kinds, args, kwargs)
        if operator is Tensor.__getitem__ and args[0] is self.positions and isinstance(args[1], int):
            return Width(found, *self.ranges[args[1]]) if args[1] in self.ranges else found
        return found


def own_cache(kind: type, call: Callable[[Any], Any]) -> Any:
    """A cache of a derived class, after one call of the model.

    Args:
        kind: the model's class of its cache.
        call: calls the model with a cache. With None, the model makes one.
    """
    with _recorded(kind) as made:
        call(None)
    first = made[0]
    _drop_empty(first)
    cache: Any = object.__new__(type(kind.__name__, (OwnCache, kind), {"first": first}))
    vars(cache).update(copy.deepcopy(vars(first)))
    cache.rows = {}
    call(cache)
    return cache


@contextlib.contextmanager
def _recorded(kind: Any) -> Iterator[list[Any]]:
    """Within the block, a copy of each new object of this class is put into the list."""
    made: list[Any] = []
    init, is_own = kind.__init__, "__init__" in vars(kind)

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(copy.deepcopy(self))

    kind.__init__ = recording
    try:
        yield made
    finally:
        if is_own:
            kind.__init__ = init
        else:
            del kind.__init__


def _drop_empty(value: Any) -> None:
    """None in the place of each tensor without elements. It stands for a state that a layer does not have."""
    parts = value if isinstance(value, (list, dict)) else vars(value)
    for key, part in enumerate(parts) if isinstance(parts, list) else [*parts.items()]:
        if isinstance(part, Tensor) and part.numel() == 0:
            parts[key] = None
        elif isinstance(part, (list, dict)):
            _drop_empty(part)
