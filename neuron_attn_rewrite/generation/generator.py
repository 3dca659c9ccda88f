"""`Generator`: transformers' `generate` on rewritten graphs."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.generation.layers import Room, cache_utils
from neuron_attn_rewrite.generation.plan import Lengths, Piece
from neuron_attn_rewrite.generation.step import Names, State
from neuron_attn_rewrite.module import RewrittenModule
from neuron_attn_rewrite.report.report import RewriteReport


@dataclass
class Progress:
    """How far the cached sequences are."""

    tokens: int = 0
    """Cached tokens of each sequence, padding of the caller included."""
    gap: int = 0
    """How many tokens were filled in before them."""


class Generator:
    """A model that generates by rewritten graphs. `rewrite_for_generation` makes it."""

    def __init__(
        self,
        model: Any,
        names: Names,
        state: State,
        room: Room,
        lengths: Lengths,
        max_length: int,
        graphs: Mapping[str, RewrittenModule],
    ) -> None:
        self.graphs = dict(graphs)
        self.max_length, self.batch_size = max_length, room.batch
        self._names, self._state, self._room, self._lengths = names, state, room, lengths
        self._progress = Progress()
        self._cache = Cache(self)
        self._model = copy.copy(model)  # shares all weights
        self._signature = inspect.signature(model.forward)

        @functools.wraps(model.forward)  # generate reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(self._signature.bind(*args, **kwargs))

        self._model.forward = forward

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """The lengths of the graphs for prompts."""
        return self._lengths.prompts

    @property
    def reports(self) -> dict[str, RewriteReport]:
        """The report of each graph."""
        return {name: graph.report for name, graph in self.graphs.items()}

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """As `generate` of the model, with its arguments and its result.

        Raises:
            InputError: the inputs do not fit the graphs. Nothing is cached then.
        """
        self._check(inputs, options)
        self._cache.reset()
        return self._model.generate(inputs, **{self._names.cache: self._cache}, **options)

    def _check(self, inputs: Tensor | None, options: Mapping[str, Any]) -> None:
        """Check what the graphs can't process.

        Raises:
            InputError: there is something.
        """
        for name in CONFLICTING:
            if options.get(name) is not None:
                raise InputError(f"generate: {name} can't be given: a generator has a cache of its own.")
        if options.get("use_cache") is False:
            raise InputError("generate: use_cache=False can't be given: a generator always uses its cache.")
        prompt = options.get(self._names.tokens, inputs)
        if not isinstance(prompt, Tensor):
            return  # generate makes or asks for it
        if prompt.dim() != 2 or 0 in prompt.shape or prompt.is_floating_point():
            raise InputError(
                f"generate: {self._names.tokens} must be integers [batch, length] with at least one token, not "
                f"{list(prompt.shape)}, {prompt.dtype}."
            )
        rows, length = prompt.shape
        settings = options.get("generation_config") or self._model.generation_config

        def setting(name: str) -> Any:
            return options[name] if options.get(name) is not None else getattr(settings, name, None)

        rows *= max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        if rows > self.batch_size:
            raise InputError(
                f"generate: {rows} sequences, beams counted, do not fit batch_size={self.batch_size}, for which the "
                "graphs were made."
            )
        given = setting("max_new_tokens"), setting("max_length")
        total = next((n for n in (given[0] and length + given[0], given[1]) if n), length + 20)
        if max(total, length + 1) > self.max_length:
            raise InputError(
                f"generate: {length} tokens and {max(total - length, 1)} new ones do not fit "
                f"max_length={self.max_length}, for which the graphs were made. Give a shorter prompt or a smaller "
                "max_new_tokens."
            )
        mask = options.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape != prompt.shape:
            raise InputError(
                f"generate: attention_mask must be {list(prompt.shape)}, as {self._names.tokens}, not "
                f"{list(mask.shape)}."
            )

    def _forward(self, bound: inspect.BoundArguments) -> Any:
        given: dict[str | None, Any] = {name: value for name, value in bound.arguments.items() if value is not None}
        given |= given.pop("kwargs", {})
        names = self._names
        for name, value in given.items():
            if name not in (*vars(names).values(), *IGNORED) and (isinstance(value, Tensor) or value is True):
                raise InputError(f"generate: the graphs were made without {name}, and can't take or give it.")
        tokens = given[names.tokens]
        count, cached = tokens.shape[1], self._progress.tokens
        if cached + count > self.max_length or len(tokens) > self.batch_size:
            raise InputError(
                f"generate: {len(tokens)} sequences of {cached + count} tokens do not fit "
                f"batch_size={self.batch_size} and max_length={self.max_length}, for which the graphs were made."
            )
        mask = given.get(names.mask)
        if mask is None:
            mask = torch.ones(len(tokens), cached + count, dtype=torch.int64, device=tokens.device)
        elif mask.shape != (len(tokens), cached + count):
            raise InputError(f"generate: {names.mask} must be {[len(tokens), cached + count]}, not {list(mask.shape)}.")
        positions = given.get(names.positions)
        if positions is None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, cached:]
        kept = min(given.get(names.keep) or 1, count)
        found = []
        for piece in self._lengths.plan(count, kept, cached):
            logits = self._run(piece, tokens, mask[:, : cached + piece.end], positions)
            if names.keep is None or piece.end > count - kept:
                found.append(logits[: len(tokens)])
        given_logits = torch.cat(found, 1)
        return modeling_output(
            given_logits if names.keep is None else given_logits[:, -kept:], names.cache, self._cache
        )

    def _run(self, piece: Piece, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        names, progress, state = self._names, self._progress, self._state
        left = piece.fresh and self._lengths.fill_left
        gap = piece.filling if left else progress.gap
        fill = (piece.filling, 0) if left else (0, piece.filling)
        start = 0 if piece.fresh else progress.gap + progress.tokens
        rows = piece.end - piece.begin
        inputs = {
            names.tokens: pad(tokens[:, piece.begin : piece.end], fill),
            names.mask: self._mask(mask, piece, gap),
            names.positions: pad(positions[..., piece.begin : piece.end], fill),
        }
        inputs = {name: self._whole_batch(t) for name, t in inputs.items() if name is not None}
        last = piece.length - 1 if left else rows - 1
        if names.keep is not None and piece.fresh:
            inputs[names.keep] = torch.tensor([last])
        self._room.start.fill_(start)
        graph = self.graphs[graph_name(piece.length, piece.fresh)]
        logits: Tensor
        logits, tensors = graph(self._room.start, state.tensors, inputs)
        state.tensors[:] = tensors
        progress.gap = gap
        progress.tokens = rows if piece.fresh else progress.tokens + rows
        if piece.fresh and names.keep is not None:
            return logits
        return logits[:, fill[0] : fill[0] + rows]

    def _mask(self, mask: Tensor, piece: Piece, gap: int) -> Tensor:
        """The mask of the caller, for the columns that a graph sees. All others are 0."""
        if not piece.fresh and not self._state.kind.attends:
            return mask[:, -piece.length :]
        width = piece.length if piece.fresh else self._room.capacity
        return pad(mask, (gap, width - gap - mask.shape[1]))

    def _whole_batch(self, tensor: Tensor) -> Tensor:
        missing = self.batch_size - len(tensor)
        return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])]) if missing else tensor


class Cache(cache_utils.Cache):  # type: ignore[misc]
    """What transformers' `generate` sees of the tensors of a generator."""

    is_compileable = False

    def __init__(self, generator: Generator) -> None:
        super().__init__(layers=[])
        self._generator = generator

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        """How many tokens are cached."""
        return self._generator._progress.tokens

    def get_max_length(self, *args: Any) -> int:
        """How many tokens the cache holds."""
        return self._generator.max_length

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self._generator._progress = Progress()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other sequences: the i-th becomes number `beam_idx[i]`."""
        tensors = self._generator._state.tensors
        rows = torch.cat([beam_idx, torch.arange(len(beam_idx), len(tensors[0]))])
        tensors[:] = [t.index_select(0, rows) for t in tensors]

    def crop(self, count: int) -> None:
        """Forget the last tokens: all but `count`, or `-count` of them."""
        progress = self._generator._progress
        progress.tokens = min(count, progress.tokens) if count > 0 else progress.tokens + count


IGNORED = ("use_cache", "return_dict")
"""Inputs of a model that the graphs do not need."""
CONFLICTING = ("past_key_values", "cache_params", "cache_implementation", "inputs_embeds")


def graph_name(length: int, fresh: bool) -> str:
    """The name of a graph, as in `Generator.graphs`."""
    if fresh:
        return f"prefill[{length}]"
    return "decode" if length == 1 else f"decode[{length}]"


def pad(tensor: Tensor, fill: tuple[int, int]) -> Tensor:
    """Zeros before and behind the last dim."""
    return torch.nn.functional.pad(tensor, fill)


def modeling_output(logits: Tensor, cache_name: str, cache: Any) -> Any:
    """As the output of a model of transformers."""
    make = import_module("transformers.utils").ModelOutput
    return make({"logits": logits, cache_name: cache})
