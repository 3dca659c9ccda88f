"""transformers' continuous batching: its paged cache and its batch of requests as operands of `flash_paged`.

The new tokens of all requests lie one behind the other. transformers gives the place of each key in the cache, from
which the numbers of the blocks are read. The schedule is the same for all layers of a step, and is made once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from neuron_attn_rewrite.errors import RewriteError
from neuron_attn_rewrite.kernels.schedule import Schedule, kv_tile_of, make_schedule

PREFIX = "paged|"
"""What transformers puts before the name of an attention implementation whose keys lie in a paged cache."""
SUFFIX = "|paged"
"""Ours, from transformers 5 on, which takes the prefix away. No mask is made for an implementation of this name."""
_HOOKED = "_neuron_attn_rewrite_hook"


@dataclass(frozen=True)
class PagedStep:
    """One layer in one step of continuous batching."""

    cache: Any
    """The `PagedAttentionCache` of transformers."""
    layer: int
    options: dict[str, Any]
    """The keyword arguments of the attention."""
    query_ends: Tensor
    """Int [requests + 1]: request r has the new tokens [query_ends[r], query_ends[r + 1])."""
    key_ends: Tensor
    """Int [requests + 1]: the same of its keys, the cached ones and then the new ones."""
    read: Tensor
    """Int [keys]: where the keys lie in the cache. Empty if no request has cached keys."""
    window: int | None
    """Tokens that a token sees, its own included. The cache of such a layer is a ring."""
    blocks: tuple[Tensor, Tensor] | None
    """Keys and values of the layer, each [blocks, block_size, num_kv_heads, head_dim]. None for a ring."""

    def why_not(self, key: Tensor, value: Tensor) -> str:
        """Why `flash_paged` can't compute this layer; "" if it can."""
        if self.window is not None or self.blocks is None:
            return f"its cache is a ring of the last {self.window} tokens, and flash_paged reads blocks in order"
        for name, new, blocks in (("key", key, self.blocks[0]), ("value", value, self.blocks[1])):
            if new.dtype != blocks.dtype or new.shape[3] != blocks.shape[3]:
                of = f"{list(new.shape)}, {new.dtype}"
                return f"the {name} is {of}, and its cache {list(blocks.shape)}, {blocks.dtype}"
        return ""

    def schedule(self, q_len: int) -> Schedule:
        """The schedule of the step, for `q_len` rows."""
        assert self.blocks is not None
        read = self.read.to("cpu", torch.int64).numpy().tobytes()
        query_ends, key_ends = (tuple(ends.tolist()) for ends in (self.query_ends, self.key_ends))
        return _schedule(query_ends, key_ends, read, self.blocks[0].shape[1], q_len)

    def write(self, key: Tensor, value: Tensor) -> None:
        """Write the new keys and values, each [1, num_kv_heads, q_len, dim], into the cache."""
        if _is_first_form(self.cache):
            group, at = self.cache.layer_index_to_group_indices[self.layer]
            slots = self.options["write_index"][group].long()
            for blocks, new in ((self.cache.key_cache[at], key), (self.cache.value_cache[at], value)):
                blocks[slots] = new[0].transpose(0, 1)
        else:  # with nothing to read, it writes and gives back what it is given
            none = [index[:0] for index in self.options["read_index"]]
            self.cache.update(key, value, self.layer, {**self.options, "read_index": none})

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `write`. Gives copies of the keys and values of all requests, [1, num_kv_heads, keys, dim].

        Raises:
            RewriteError: transformers would give the wrong keys.
        """
        if not _is_first_form(self.cache):
            found: tuple[Tensor, Tensor] = self.cache.update(key, value, self.layer, dict(self.options))
            return found
        context_lens = self.key_ends.diff() - self.query_ends.diff()
        if self.window is not None and (context_lens >= self.window - 1).any():
            raise RewriteError(
                f"continuous batching: a request is longer than the sliding window of {self.window} tokens, and "
                "transformers 4.57 reads a full window without its newest token. Use transformers >= 5, or generate."
            )
        keys, values = self.cache.update(key, value, self.layer, **self.options)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def mask(self, q_len: int, kv_len: int) -> Tensor:
        """Bool [1, 1, q_len, kv_len]: each row sees the keys of its request, up to its own."""
        ends, key_ends = (t.long() for t in (self.query_ends, self.key_ends))
        i = torch.arange(q_len, device=ends.device)
        request = torch.searchsorted(ends, i, right=True).clamp(1, len(ends) - 1)
        last = i - ends[request] + key_ends[request]
        first = key_ends[request - 1]
        if self.window is not None:
            first = torch.maximum(first, last + 1 - self.window)
        j = torch.arange(kv_len, device=ends.device)
        return ((first[:, None] <= j) & (j <= last[:, None]))[None, None]


def _is_first_form(cache: Any) -> bool:
    """Whether it is the cache of transformers 4.57, with a tensor of tokens for each layer of a group."""
    return hasattr(cache, "layer_index_to_group_indices")


def paged_step(module: nn.Module, cache: Any, options: dict[str, Any]) -> PagedStep:
    """What continuous batching hands to the attention of one layer."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    blocks: tuple[Tensor, Tensor] | None = None
    if _is_first_form(cache):
        group, at = cache.layer_index_to_group_indices[layer]
        window = None if cache.sliding_windows[layer] == 1 else cache.sliding_windows[layer]
        kind, size = ("full_attention" if window is None else "sliding_attention"), cache.block_size
        # The last token of the tensor takes what padding writes.
        blocks = tuple(t[:-1].view(-1, size, *t.shape[1:]) for t in (cache.key_cache[at], cache.value_cache[at]))
    else:
        allocator = cache.layer_to_allocator[layer]
        group, kind, window = allocator.index, allocator.layer_type, getattr(allocator, "sliding_window", None)
        blocks = None if window is not None else allocator.get_cache_for_block_table(layer)
    key_ends = options["cu_seq_lens_k"]
    return PagedStep(
        cache,
        layer,
        options,
        options["cu_seq_lens_q"],
        key_ends[kind] if isinstance(key_ends, dict) else key_ends,
        options["read_index"][group],
        window,
        blocks,
    )


@lru_cache(maxsize=8)
def _schedule(
    query_ends: tuple[int, ...], key_ends: tuple[int, ...], read: bytes, block_size: int, q_len: int
) -> Schedule:
    at = torch.frombuffer(bytearray(read), dtype=torch.int64).tolist() if read else []
    requests = range(len(query_ends) - 1)
    query_lens = [query_ends[r + 1] - query_ends[r] for r in requests]
    context_lens = [key_ends[r + 1] - key_ends[r] - query_lens[r] for r in requests]
    tables = [
        [slot // block_size for slot in at[key_ends[r] : key_ends[r] + context_lens[r] : block_size]] for r in requests
    ]
    return make_schedule(query_lens, context_lens, tables, block_size, kv_tile=kv_tile_of(block_size), q_len=q_len)


def admit(is_ours: Callable[[str], bool]) -> None:
    """Let the continuous batching of transformers take attention implementations of this package.

    transformers 5 has a list of names that it takes, and no way to add one. 4.57 can't size its cache on a CPU, which
    it would only write to its log.

    Args:
        is_ours: whether this package has registered an attention implementation under a name.
    """
    try:
        batching: Any = import_module("transformers.generation.continuous_batching.continuous_api")
    except ImportError:
        return
    manager = batching.ContinuousBatchingManager
    if hasattr(manager, "switch_to_cb_friendly_attn"):
        _hook(manager, "switch_to_cb_friendly_attn", lambda self, model, *_: _switch(self, model, is_ours))
    else:
        _hook(manager, "start", lambda self: _refuse_cpu(batching, self.model, is_ours))


def _hook(owner: Any, method: str, first: Callable[..., bool]) -> None:
    """Call `first` before a method, and the method only if `first` gives False. A second hook replaces the first."""
    original = getattr(owner, method)
    original = getattr(original, _HOOKED, original)

    @wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return None if first(*args, **kwargs) else original(*args, **kwargs)

    setattr(hooked, _HOOKED, original)
    setattr(owner, method, hooked)


def _switch(manager: Any, model: Any, is_ours: Callable[[str], bool]) -> bool:
    """Switch a model to the paged form of its implementation, if that is ours. The manager switches it back."""
    name = model.config._attn_implementation
    if not is_ours(name):
        return False
    if not name.endswith(SUFFIX):
        model.set_attn_implementation(name.removeprefix(PREFIX) + SUFFIX)
        manager._original_attn_impl = name
    return True


def _refuse_cpu(batching: Any, model: Any, is_ours: Callable[[str], bool]) -> bool:
    if is_ours(model.config._attn_implementation) and batching.get_device_and_memory_breakdown()[1] is None:
        raise RewriteError(
            "generate_batch: this release of transformers can't size a paged cache on a CPU, with any attention. "
            "Install transformers >= 5, or call generate."
        )
    return False
