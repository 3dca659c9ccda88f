"""One call of a model with a cache, as a function of tensors alone."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neuron_attn_rewrite.capture.objects import Pieces, holds_tensors, put_together, take_apart
from neuron_attn_rewrite.errors import CaptureError
from neuron_attn_rewrite.generation import layers
from neuron_attn_rewrite.generation.layers import Kind, Room
from neuron_attn_rewrite.generation.own import Answers, OwnCache, own_cache
from neuron_attn_rewrite.generation.position import Slicing

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
    sliding: tuple[int, ...]
    """Which tensors hold the last tokens alone."""
    passing: tuple[int, ...]
    """Which tensors each token changes for good: those, and states."""
    batch_dims: tuple[int, ...]
    """Which dim of each tensor is the batch."""
    first: tuple[int, ...]
    """Which tensors a fresh call begins with."""
    zeros: frozenset[int]
    """Which of them are zeros then."""
    first_positions: int | None
    """How many positions the model wants in a fresh call, if it is not the number of tokens."""
    capacity: int
    """How many tokens a sequence can have."""
    held: int
    """The largest number of tokens that one of them holds. 0 if there is none."""
    least_held: int
    """The smallest number."""

    @classmethod
    def of(cls, grown: Grown, room: Room) -> State:
        """Give a cache a fixed shape, and take it apart.

        Args:
            grown: the cache after one token.
            room: how much it shall hold.

        Raises:
            CaptureError: a layer has no counterpart of fixed shape.
        """
        kind = layers.kind_of(grown.cache)
        cache = layers.fixed(grown.cache, room)
        pieces = _pieces(room.place)
        going_on = take_apart(cache, pieces)
        cache.reset()
        first = _pieces(room.place)
        fresh = take_apart(cache, first)
        tensors, names = pieces.atoms[1:], pieces.names[1:]
        numbers = tuple(names.index(name) for name in first.names[1:])
        new = [n for n, t in zip(numbers, first.atoms[1:], strict=True) if t is not tensors[n]]
        if any(t.any() for n, t in zip(numbers, first.atoms[1:], strict=True) if n in new):
            raise CaptureError("the cache holds other numbers than zeros before the first call, and a graph has none.")
        sliding = layers.sliding(cache)
        last = {id(t) for layer in sliding for t in (layer.keys, layer.values)}
        kept = layers.kept(cache)
        return cls(
            tensors,
            [name.strip("_") for name in names],
            fresh,
            going_on,
            kind,
            sliding=tuple(number for number, t in enumerate(tensors) if id(t) in last),
            passing=tuple(number for number, t in enumerate(tensors) if id(t) not in kept),
            batch_dims=tuple(grown.batch_dims.get(name, 0) for name in names),
            first=numbers,
            zeros=frozenset(new),
            first_positions=grown.first_positions,
            capacity=room.capacity,
            held=max((layer.held for layer in sliding), default=0),
            least_held=min((layer.held for layer in sliding), default=0),
        )

    def take(self, others: list[Tensor], which: Tensor) -> None:
        """Take some sequences of the cache from other tensors.

        Args:
            others: of the same shapes as `tensors`.
            which: bool [batch].
        """
        for number, (other, dim) in enumerate(zip(others, self.batch_dims, strict=True)):
            mine = self.tensors[number].movedim(dim, -1)
            mine.copy_(torch.where(which, other.movedim(dim, -1), mine))


@dataclass(frozen=True)
class Grown:
    """A cache after a few tokens of each sequence."""

    cache: Any
    batch_dims: dict[str, int] = field(default_factory=dict)
    """Which dim of a tensor is the batch, if it is not the first."""
    first_positions: int | None = None
    """How many positions the model wants in a fresh call, if it is not the number of tokens."""


def grown_cache(model: Any, names: Names, inputs: dict[str, Any]) -> Grown:
    """What the model caches of a few tokens for each sequence.

    Raises:
        CaptureError: the model fails, or gives no cache.
    """
    kind = type(model).__name__
    try:
        cache = _cached(model, names, inputs, None)
    except Exception as error:
        raise CaptureError(f"{kind} fails on a few tokens: {type(error).__name__}: {error}") from error
    if hasattr(cache, "layers") or hasattr(cache, "cross_attention_cache"):
        return Grown(cache)
    if cache is None and getattr(model.config, "is_decoder", None) is False:
        raise CaptureError(
            f"{kind} caches nothing, because config.is_decoder is False: each token sees the whole sequence. Set "
            "is_decoder=True in the config before the model is made."
        )
    if not holds_tensors(cache):
        gives = "nothing" if cache is None else f"a {type(cache).__name__} without tensors"
        raise CaptureError(f"{kind} gives {gives} as {names.cache}, and a generator needs a cache of tensors.")
    return _own(model, names, len(inputs[names.tokens]), type(cache))


def _own(model: Any, names: Names, batch: int, kind: type) -> Grown:
    """With a cache of the model's own kind."""
    found = []
    for rows in (batch, batch + 1):
        pieces, zeros = Pieces(), torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        cache = own_cache(kind, functools.partial(_cached, model, names, {names.tokens: zeros}))
        take_apart(cache, pieces)
        found.append((cache, dict(zip(pieces.names, pieces.atoms, strict=True))))
    (cache, tensors), (_, more) = found
    dims = {}
    for name, tensor in tensors.items():
        differ = [
            dim for dim, sizes in enumerate(zip(tensor.shape, more[name].shape, strict=True)) if len({*sizes}) > 1
        ]
        if len(differ) != 1:
            raise CaptureError(f"{name.strip('_')} of the {kind.__name__} has no dim that is the batch.")
        dims[name] = differ[0]
    positions = _prepared(model, names, torch.zeros_like(zeros)).get("cache_position")
    count = None if positions is None or len(positions) == 1 else len(positions)
    return Grown(cache, {name: dim for name, dim in dims.items() if dim}, count)


def _cached(model: Any, names: Names, inputs: dict[str, Any], cache: Any) -> Any:
    """The cache after a call. Without a cache, the model makes one."""
    with torch.no_grad():
        if cache is not None:
            prepared = _prepared(model, names, inputs[names.tokens])
            known = {} if names.cache_position is None else {names.cache_position: prepared.get("cache_position")}
            model(**inputs, **known, **{names.cache: cache}, use_cache=True, return_dict=True)
            return cache
        found = model(**inputs, use_cache=True, return_dict=True).get(names.cache)
        if found is None and names.tokens == "input_ids":
            found = _prepared(model, names, inputs[names.tokens]).get(names.cache)
            if found is not None:
                _cached(model, names, inputs, found)
    return found


def _prepared(model: Any, names: Names, tokens: Tensor) -> dict[str, Any]:
    """What `generate` gives the model in its first call."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    given = {names.cache: None, "attention_mask": torch.ones_like(tokens), "cache_position": positions}
    return dict(model.prepare_inputs_for_generation(tokens, **given, use_cache=True))


def _pieces(place: Tensor) -> Pieces:
    return Pieces(atoms=[place], names=["place"])


class Step(nn.Module):
    """A model in generation: it takes the tensors of its cache and gives what they are after the call."""

    def __init__(self, model: Any, names: Names, state: State, fresh: bool, encoded: Any) -> None:
        super().__init__()
        self.model, self.names, self.fresh, self.encoded = model, names, fresh, encoded
        self.parts = state.fresh if fresh else state.going_on
        self.first = state.first if fresh else tuple(range(len(state.tensors)))
        self.zeros = state.zeros if fresh else frozenset()
        self.first_positions, self.capacity = state.first_positions, state.capacity
        self.config = model.config
        self.training = model.training

    def forward(self, place: Tensor, cache: list[Tensor], inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """The logits, and the tensors of the cache.

        Args:
            place: int64 [2], how many tokens are cached, and how many of the new ones count.
            cache: as in `State.tensors`.
            inputs: what the model takes, by name: tensors, and those of the encoder's output by name.

        Raises:
            CaptureError: the model changes the shape of its cache.
        """
        before = [torch.zeros_like(cache[n]) if n in self.zeros else cache[n] for n in self.first]
        state = put_together(self.parts, [place, *before])
        positions = self._positions(inputs[self.names.tokens].shape[1], place)
        if self.names.cache_position is not None:
            inputs = {**inputs, self.names.cache_position: positions}
        if self.names.encoder_outputs is not None:
            inputs = {**inputs, self.names.encoder_outputs: self.encoded(**inputs[self.names.encoder_outputs])}
        last = positions.shape[0] if self.fresh else self.capacity
        answers = Answers(positions, (0, 0) if self.fresh else (1, last), last - 1)
        with answers if isinstance(state, OwnCache) else Slicing():
            outputs = self.model(**inputs, **{self.names.cache: state}, use_cache=True, return_dict=True)
        pieces = _pieces(place)
        take_apart(state, pieces)
        after = pieces.atoms[1:]
        if [t.shape for t in after] != [t.shape for t in cache]:
            raise CaptureError("the model changes the shapes of the tensors in its cache")
        return outputs[0], after

    def _positions(self, count: int, place: Tensor) -> Tensor:
        if self.fresh:
            return torch.arange(self.first_positions or count, device=place.device)
        return torch.arange(count, device=place.device) + place[0]


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
