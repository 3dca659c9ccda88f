"""One call of a model with a cache, as a function of tensors alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuron_attn_rewrite.capture.objects import Pieces, put_together, take_apart
from neuron_attn_rewrite.errors import CaptureError
from neuron_attn_rewrite.generation import layers
from neuron_attn_rewrite.generation.layers import Kind, Room

CACHES = ("past_key_values", "cache_params")
"""What models of transformers call their cache."""


@dataclass(frozen=True)
class Names:
    """What a model calls its inputs. None for one that it does not take."""

    tokens: str
    mask: str | None
    positions: str | None
    cache_position: str | None
    keep: str | None
    cache: str
    encoder_outputs: str | None = None
    encoder_mask: str | None = None

    @classmethod
    def of(cls, model: Any, tokens: str | None = None) -> Names:
        """Read from the signature of a model of transformers.

        Args:
            model: the model.
            tokens: what it is called with in the place of `input_ids`.

        Raises:
            CaptureError: it takes no tokens or no cache.
        """
        parameters = inspect.signature(model.forward).parameters
        prefix = "decoder_" if model.config.is_encoder_decoder else ""

        def known(*names: str) -> str | None:
            return next((name for name in names if name in parameters), None)

        tokens, cache = tokens or known(f"{prefix}input_ids"), known(*CACHES)
        if tokens is None or cache is None:
            lacks = f"{prefix}input_ids" if tokens is None else " or ".join(CACHES)
            raise CaptureError(f"{type(model).__name__}.forward takes no {lacks}: it can't generate token by token.")
        return cls(
            tokens,
            known(f"{prefix}attention_mask"),
            known(f"{prefix}position_ids"),
            known("cache_position"),
            known("logits_to_keep"),
            cache,
            known("encoder_outputs") if prefix else None,
            known("attention_mask") if prefix else None,
        )


@dataclass(frozen=True)
class State:
    """What a model has cached: tensors of fixed shape, and all else that its cache consists of."""

    tensors: list[Tensor]
    names: list[str]
    """Where each tensor is in the cache: `layers_0_keys`."""
    fresh: Any
    """The cache without its tensors, before a fresh call."""
    going_on: Any
    """The cache without its tensors, before a continuing call."""
    kind: Kind

    @classmethod
    def of(cls, cache: Any, room: Room) -> State:
        """Give a cache a fixed shape, and take it apart.

        Args:
            cache: as `grown_cache` gives it.
            room: how much it shall hold.

        Raises:
            CaptureError: a layer has no counterpart of fixed shape.
        """
        kind = layers.kind_of(cache)
        cache = layers.fixed(cache, room)
        pieces = _pieces(room.start)
        going_on = take_apart(cache, pieces)
        cache.reset()
        names = [name.strip("_") for name in pieces.names[1:]]
        return cls(pieces.atoms[1:], names, take_apart(cache, _pieces(room.start)), going_on, kind)


def grown_cache(model: Any, names: Names, inputs: dict[str, Any]) -> Any:
    """What the model caches of a few tokens for each sequence.

    Raises:
        CaptureError: the model fails, or gives no cache with layers.
    """
    kind = type(model).__name__
    try:
        with torch.no_grad():
            outputs = model(**inputs, use_cache=True, return_dict=True)
    except Exception as error:
        raise CaptureError(f"{kind} fails on a few tokens: {type(error).__name__}: {error}") from error
    cache = outputs.get(names.cache)
    if hasattr(cache, "layers") or hasattr(cache, "cross_attention_cache"):
        return cache
    if cache is None and getattr(model.config, "is_decoder", None) is False:
        raise CaptureError(
            f"{kind} caches nothing, because config.is_decoder is False: each token sees the whole sequence. Set "
            "is_decoder=True in the config before the model is made."
        )
    gives = "nothing" if cache is None else f"a {type(cache).__name__} without layers"
    raise CaptureError(f"{kind} gives {gives} as {names.cache}, and a generator needs a cache of transformers.")


def _pieces(start: Tensor) -> Pieces:
    return Pieces(atoms=[start], names=["start"])


class Step(nn.Module):
    """A model in generation: it takes the tensors of its cache and gives what they are after the call."""

    def __init__(self, model: Any, names: Names, state: State, fresh: bool, encoded: Any) -> None:
        super().__init__()
        self.model, self.names, self.fresh, self.encoded = model, names, fresh, encoded
        self.parts = state.fresh if fresh else state.going_on
        self.config = model.config
        self.training = model.training

    def forward(self, start: Tensor, cache: list[Tensor], inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """The logits, and the tensors of the cache.

        Args:
            start: int64 [], how many tokens are cached.
            cache: as in `State.tensors`.
            inputs: what the model takes, by name: tensors, and those of the encoder's output by name.

        Raises:
            CaptureError: the model changes the shape of its cache.
        """
        state = put_together(self.parts, [start, *cache])
        if self.names.cache_position is not None:
            rows = torch.arange(inputs[self.names.tokens].shape[1], device=start.device)
            inputs = {**inputs, self.names.cache_position: rows if self.fresh else rows + start}
        if self.names.encoder_outputs is not None:
            inputs = {**inputs, self.names.encoder_outputs: self.encoded(**inputs[self.names.encoder_outputs])}
        outputs = self.model(**inputs, **{self.names.cache: state}, use_cache=True, return_dict=True)
        pieces = _pieces(start)
        take_apart(state, pieces)
        after = pieces.atoms[1:]
        if [t.shape for t in after] != [t.shape for t in cache]:
            raise CaptureError("the model changes the shapes of the tensors in its cache")
        return outputs[0], after


def step_of(model: Any, names: Names, state: State, fresh: bool, encoded: Any = None) -> Step:
    """A `Step` whose class has the name of the model's, for reports and errors.

    Args:
        model: a model of transformers.
        names: what it calls its inputs.
        state: what it caches.
        fresh: whether nothing is cached yet.
        encoded: the class of the encoder's output.
    """
    named: type[Step] = type(type(model).__name__, (Step,), {})
    return named(model, names, state, fresh, encoded)
