"""Cache layers of fixed shape, in the place of those that grow.

A layer of transformers that grows has another shape after each token. These have room for all tokens from the start:
new keys and values are written at their positions, and the mask of the model hides what is not written yet.

A model in generation is called in two ways. In a *fresh* call nothing is cached: the new keys and values are all that
there is. In a *continuing* call the attention reads the whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import CaptureError, RewriteError
from neuron_attn_rewrite.generation.own import OwnCache
from neuron_attn_rewrite.generation.position import Position

try:
    cache_utils: Any = import_module("transformers.cache_utils")
    cache_utils.CacheLayerMixin  # noqa: B018
except (ImportError, AttributeError) as missing:
    raise RewriteError(
        "rewrite_for_generation needs transformers >= 4.57: pip install 'transformers>=4.57'."
    ) from missing
Linear: Any = getattr(cache_utils, "LinearAttentionLayer", ())
"""The layers with a state of fixed shape, such as those of Mamba. Older versions of transformers have none."""


@dataclass(frozen=True)
class Room:
    """How much a cache of fixed shape holds."""

    batch: int
    capacity: int
    """Tokens."""
    place: Tensor
    """Int64 [2]: how many tokens are cached before a call, and how many of its tokens count. All layers share it."""
    spare: int | None = 0
    """How many tokens may be taken back after a call. None if layers with a window must hold all tokens."""


@dataclass(frozen=True)
class Kind:
    """Which kinds of layers a cache has."""

    recurrent: bool
    """A layer holds a state that each token changes. No token can be taken back, and a filled-in one must be masked."""
    attends: bool
    """A layer holds keys and values of single tokens."""
    own: bool
    """The class of the cache is the model's own."""


class FixedLayer(cache_utils.CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one attention, [batch, num_kv_heads, capacity, size].

    It has the methods that models and mask functions of transformers call while a graph is captured.
    """

    is_compileable = False  # transformers would make a mask itself, of the size that it takes for that of the cache
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.place = keys, values, place
        self.fresh, self.new = False, 0
        self.is_initialized = True

    @property
    def start(self) -> Tensor:
        """Int64 []: how many tokens are cached before a call."""
        return self.place[0]

    @property
    def capacity(self) -> int:
        """The number of tokens that the layer has room for."""
        return int(self.keys.shape[2])

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new rows, [batch, num_kv_heads, q_len, size]. Gives all keys and values that the attention reads."""
        self.new = key.shape[2]
        _write(self.keys, key, 2, self)
        _write(self.values, value, 2, self)
        return (key, value) if self.fresh else (self.keys, self.values)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the tensors are there."""

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """How many keys the attention reads, and the position of the first.

        Older versions of transformers give the positions of the queries instead of their number.
        """
        rows = query_length if isinstance(query_length, int) else query_length.shape[0]
        return (rows if self.fresh else self.capacity), 0

    def get_seq_length(self, *args: Any) -> Any:
        """How many tokens are cached: a number, or a `Position` in a continuing call that is captured."""
        if self.fresh:
            return self.new
        if not torch.compiler.is_exporting():
            return int(self.start) + self.new
        return Position(self.start, 1, self.capacity - 1) + self.new

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Make the next call a fresh one."""
        self.fresh, self.new = True, 0


class SlidingLayer(FixedLayer):
    """Keys and values of the last tokens alone, [batch, num_kv_heads, held, size], the newest at the end.

    An attention with a window sees no others. Early in a sequence the first rows stand for positions before 0. A mask
    function looks these up at the end of the attention mask, so there must be `held` zeros.
    """

    is_sliding = True

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor, capacity: int) -> None:
        super().__init__(keys, values, place)
        self.held, self._capacity = int(keys.shape[2]), capacity

    @property
    def capacity(self) -> int:
        """The number of tokens that a sequence can have."""
        return self._capacity

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new rows, [batch, num_kv_heads, q_len, size]. Gives the rows that were held, and the new ones."""
        self.new = key.shape[2]
        keys, values = self._add(self.keys, key), self._add(self.values, value)
        return (key, value) if self.fresh else (keys, values)

    def _add(self, held: Tensor, new: Tensor) -> Tensor:
        whole = torch.cat([torch.zeros_like(held) if self.fresh else held, new], 2)
        if self.new == 1:
            held.copy_(whole[:, :, 1:])
        else:  # the last tokens of the call may be such that do not count
            held.copy_(whole.index_select(2, torch.arange(held.shape[2], device=held.device) + self.place[1]))
        return whole

    def get_mask_sizes(self, query_length: Any) -> tuple[int, Any]:
        """How many keys the attention reads, and the position of the first."""
        rows = query_length if isinstance(query_length, int) else query_length.shape[0]
        if self.fresh:
            return rows, 0
        return self.held + rows, Position(self.start - self.held, -self.held, self.capacity - rows - self.held)


class CrossLayer(FixedLayer):
    """Keys and values of the encoder's output. They are written once, and stay."""

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write all rows, [batch, num_kv_heads, kv_len, size]."""
        self.new = key.shape[2]
        self.keys.copy_(key)
        self.values.copy_(value)
        return key, value

    def get_seq_length(self, *args: Any) -> Any:
        """How many tokens are cached: all or none."""
        return self.new if self.fresh else self.capacity


class IndexedLayer(FixedLayer):
    """A `FixedLayer` with the keys of an indexer that chooses what an attention sees, [batch, capacity, size]."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor, indexer_keys: Tensor) -> None:
        super().__init__(keys, values, place)
        self.indexer_keys, self.is_indexer_initialized = indexer_keys, True

    def update_indexer(self, key: Tensor) -> Tensor:
        """Write new rows, [batch, q_len, size]. Gives all keys that the indexer reads."""
        _write(self.indexer_keys, key, 1, self)
        return key if self.fresh else self.indexer_keys


def _write(cached: Tensor, new: Tensor, dim: int, layer: FixedLayer) -> None:
    rows = new.shape[dim]
    if layer.fresh:
        cached.narrow(dim, 0, rows).copy_(new)
    else:
        at = torch.arange(rows, device=layer.start.device) + layer.start
        cached.index_copy_(dim, at, new)


if Linear:

    class HybridLayer(Linear, FixedLayer):  # type: ignore[misc]
        """A `FixedLayer` with the states of linear attention beside."""

        def __init__(self, keys: Tensor, values: Tensor, place: Tensor, linear: Any) -> None:
            FixedLayer.__init__(self, keys, values, place)
            for name in vars(Linear(linear.number_of_states)):
                setattr(self, name, getattr(linear, name))

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            """As of linear attention. Keys and values are there."""
            Linear.lazy_initialization(self, *args, **kwargs)

        def reset(self) -> None:
            """Make the next call a fresh one."""
            Linear.reset(self)
            FixedLayer.reset(self)


def fixed(cache: Any, room: Room) -> Any:
    """The cache with layers of fixed shape.

    Args:
        cache: what the model gave after one token, a `Cache` of transformers. It is changed.
        room: how much it shall hold.

    Raises:
        CaptureError: the kind of a layer is not known.
    """
    if isinstance(cache, OwnCache):
        cache.rows = {index: FixedLayer(*_keys_and_values(layer, room)) for index, layer in cache.rows.items()}
        return cache
    if hasattr(cache, "cross_attention_cache"):
        fixed(cache.self_attention_cache, room)
        cache.cross_attention_cache.layers = [_cross(layer, room) for layer in cache.cross_attention_cache.layers]
        return cache
    cache.layers = [_fixed(layer, room) for layer in cache.layers]
    return cache


def layers(cache: Any) -> Iterator[Any]:
    """Each layer of a cache."""
    if isinstance(cache, OwnCache):
        yield from cache.rows.values()
    elif hasattr(cache, "cross_attention_cache"):
        yield from (*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers)
    else:
        yield from cache.layers


def sliding(cache: Any) -> list[SlidingLayer]:
    """The layers that hold the last tokens alone."""
    return [layer for layer in layers(cache) if isinstance(layer, SlidingLayer)]


def kept(cache: Any) -> set[int]:
    """The ids of the tensors that hold what every token has written."""
    full = [each for each in layers(cache) if isinstance(each, FixedLayer) and not each.is_sliding]
    return {id(getattr(layer, name, None)) for layer in full for name in ("keys", "values", "indexer_keys")}


def kind_of(cache: Any) -> Kind:
    """Which kinds of layers a cache has."""
    linear = [isinstance(layer, Linear) for layer in layers(cache)]
    attends = any(hasattr(layer, "keys") and layer.keys is not None for layer in layers(cache))
    is_own = isinstance(cache, OwnCache)
    return Kind(any(linear) or is_own, attends, is_own)


def _fixed(layer: Any, room: Room) -> Any:
    if _is_unused(layer):
        return layer
    for kinds, make in _LAYERS:
        if type(layer) in kinds:  # a derived class may do anything
            return make(layer, room)
    raise CaptureError(
        f"the cache has a {type(layer).__name__}, and no layer of fixed shape is known that does the same."
    )


def _is_unused(layer: Any) -> bool:
    """Whether no attention writes keys into it, such as one that reads images where there are none."""
    return getattr(layer, "keys", layer) is None


def _grown(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros of the shape of a tensor, with another size of this dim."""
    shape = [*tensor.shape]
    shape[dim] = size
    return tensor.new_zeros(shape)


def _keys_and_values(layer: Any, room: Room, size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (_grown(t, 2, room.capacity if size is None else size) for t in (layer.keys, layer.values))
    return keys, values, room.place


def _sliding(layer: Any, room: Room) -> Any:
    size = layer.sliding_window - 1 + (room.spare or 0)
    if room.spare is None or size >= room.capacity:
        return FixedLayer(*_keys_and_values(layer, room))
    return SlidingLayer(*_keys_and_values(layer, room, size), room.capacity)


def _cross(layer: Any, room: Room) -> Any:
    if _is_unused(layer):
        return layer
    return CrossLayer(torch.zeros_like(layer.keys), torch.zeros_like(layer.values), room.place)


def _indexed(layer: Any, room: Room) -> Any:
    if getattr(layer, "indexer_position_ids", None) is not None:
        raise CaptureError(f"the cache has a {type(layer).__name__} with positions of its own.")
    if layer.indexer_keys is None:  # another layer chooses for this one
        return FixedLayer(*_keys_and_values(layer, room))
    return IndexedLayer(*_keys_and_values(layer, room), _grown(layer.indexer_keys, 1, room.capacity))


def _kinds(*names: str) -> tuple[type, ...]:
    return tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))


_LAYERS: tuple[tuple[tuple[type, ...], Callable[[Any, Room], Any]], ...] = (
    (
        _kinds("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
        lambda layer, room: HybridLayer(*_keys_and_values(layer, room), layer),
    ),
    (_kinds("LinearAttentionLayer", "DummyLayer"), lambda layer, room: layer),
    (_kinds("DynamicIndexedLayer"), _indexed),
    (_kinds("DynamicSlidingWindowLayer"), _sliding),
    (_kinds("DynamicLayer"), lambda layer, room: FixedLayer(*_keys_and_values(layer, room))),
)
"""For each kind of layer that grows, what takes its place."""
