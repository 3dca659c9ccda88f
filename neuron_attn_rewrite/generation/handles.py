"""The cache that transformers' `generate` sees: the tensors of a generator, and how far they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.capture.objects import put_together
from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.generation.layers import cache_utils


@dataclass
class Progress:
    """How far the cached sequences are."""

    tokens: int = 0
    """Cached tokens of each sequence, padding of the caller included."""
    gap: int = 0
    """How many tokens were filled in before them."""
    most: int = 0
    """The largest number of tokens that were cached at once."""


@dataclass(frozen=True)
class Saved:
    """What was cached before one of several proposed tokens."""

    progress: Progress
    tensors: Mapping[int, Tensor]
    """Those of the cache, by number, that each token changes for good."""


class Cache(cache_utils.Cache):  # type: ignore[misc]
    """What transformers' `generate` sees of the tensors of a generator."""

    is_compileable = False

    def __init__(self, generator: Any) -> None:
        """Of a `Generator`."""
        cache_utils.Cache.__init__(self, layers=[])
        self._generator = generator

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        """How many tokens are cached."""
        return int(self._generator._progress.tokens)

    def get_max_length(self, *args: Any) -> int:
        """How many tokens the cache holds."""
        return int(self._generator.max_length)

    get_max_cache_shape = get_max_length

    @property
    def is_initialized(self) -> bool:
        """Whether something is cached. Models ask it to find out whether a call is the first one."""
        return self.get_seq_length() > 0

    def get_query_offset(self, *args: Any) -> int:
        """The position of the next token."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: Any, *args: Any) -> tuple[int, int]:
        """As of a layer: how many keys a mask is for, and the position of the first."""
        rows = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + rows, 0

    def reset(self) -> None:
        """Forget everything."""
        self._generator._progress = Progress()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other sequences: the i-th becomes number `beam_idx[i]`."""
        state, batch = self._generator._state, self._generator.batch_size
        tensors = state.tensors
        rows = torch.cat([beam_idx, torch.arange(len(beam_idx), batch, device=beam_idx.device)])
        tensors[:] = [t.index_select(dim, rows) for t, dim in zip(tensors, state.batch_dims, strict=True)]

    def crop(self, count: int) -> None:
        """Forget the last tokens: all but `count`, or `-count` of them.

        Raises:
            InputError: a state holds them for good, or layers with a window do not hold the tokens any more that the
                window shows then.
        """
        generator, progress = self._generator, self._generator._progress
        state, spare = generator._state, generator._room.spare or 0
        tokens = min(count, progress.tokens) if count > 0 else progress.tokens + count
        saved = next((each for each in generator._saved if each.progress.tokens >= tokens), Saved(progress, {}))
        progress = replace(saved.progress)
        taken = progress.most - tokens
        if taken and state.kind.recurrent:
            raise InputError(f"generate: {taken} tokens are taken back, and the state of this model still holds them.")
        if state.held and taken > spare and progress.gap + progress.most > state.least_held:
            raise InputError(
                f"generate: {taken} tokens are taken back, and layers with a window hold {spare} more tokens than the "
                f"window shows. Make the graphs with decode_lengths=(1, {taken + 1})."
            )
        for number, tensor in saved.tensors.items():
            state.tensors[number].copy_(tensor)
        for number in state.sliding:
            tensor = state.tensors[number]
            tensor.copy_(tensor.roll(progress.tokens - tokens, 2))  # the newest token is always the last
        progress.tokens = tokens
        generator._progress = progress


class EncoderDecoderCache(Cache, cache_utils.EncoderDecoderCache):  # type: ignore[misc]
    """The same for a model with an encoder: `generate` of some asks for this class, or reads the layers."""

    @property
    def is_updated(self) -> dict[int, bool]:
        """For `generate`, keys and values of the encoder's output are known: the graphs compute them."""
        return {0: True}

    @property
    def self_attention_cache(self) -> Any:
        """Keys and values of the decoder, with room for all tokens."""
        return self._layers().self_attention_cache

    @property
    def cross_attention_cache(self) -> Any:
        """Keys and values of what the encoder gives."""
        return self._layers().cross_attention_cache

    def _layers(self) -> Any:
        generator = self._generator
        return put_together(generator._state.going_on, [generator._room.place, *generator._state.tensors])
