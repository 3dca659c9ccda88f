"""`Generator`: transformers' `generate` on rewritten graphs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.generation.fit import Window, check_pieces
from neuron_attn_rewrite.generation.layers import Room, cache_utils
from neuron_attn_rewrite.generation.part import IGNORED, Part, bound, with_forwards
from neuron_attn_rewrite.generation.plan import Lengths, Piece
from neuron_attn_rewrite.generation.step import State
from neuron_attn_rewrite.generation.trace import ForTrace, for_trace
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
        part: Part,
        state: State,
        room: Room,
        lengths: Lengths,
        max_length: int,
        graphs: Mapping[str, RewrittenModule],
    ) -> None:
        self.graphs = dict(graphs)
        self.max_length, self.batch_size = max_length, room.batch
        self._part, self._names = part, part.names
        self._state, self._room, self._lengths = state, room, lengths
        self._progress = Progress()
        self._cache = Cache(self)
        signature = inspect.signature(part.module.forward)

        @functools.wraps(part.module.forward)  # generate reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(bound(signature, args, kwargs))

        self._model = with_forwards(model, {part.path: forward})

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """The lengths of the graphs for prompts."""
        return self._lengths.prompts

    @property
    def reports(self) -> dict[str, RewriteReport]:
        """The report of each graph."""
        return {name: graph.report for name, graph in self.graphs.items()}

    def for_trace(self, name: str) -> ForTrace:
        """A graph for `torch_neuronx.trace`, with the cache as aliased buffers.

        Args:
            name: of one of the `graphs`, such as "decode".

        Raises:
            InputError: there is no such graph.
        """
        if name not in self.graphs:
            raise InputError(f"for_trace: there is no graph {name!r}. There are {', '.join(self.graphs)}.")
        cache = dict(zip(self._state.names, self._state.tensors, strict=True))
        return for_trace(self.graphs[name], cache, fresh=name.startswith(PREFILL))

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
        prompt = options.get(self._part.prompt, inputs)
        if not isinstance(prompt, Tensor):
            return  # generate makes or asks for it
        if prompt.dim() != 2 or 0 in prompt.shape or prompt.is_floating_point():
            raise InputError(
                f"generate: {self._part.prompt} must be integers [batch, length] with at least one token, not "
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
                f"generate: attention_mask must be {list(prompt.shape)}, as {self._part.prompt}, not "
                f"{list(mask.shape)}."
            )

    def _forward(self, given: dict[str, Any]) -> Any:
        names, part, cached = self._names, self._part, self._progress.tokens
        tokens = given[names.tokens]
        rows, count = tokens.shape[:2]
        if cached + count > self.max_length or rows > self.batch_size:
            raise InputError(
                f"generate: {rows} sequences of {cached + count} tokens do not fit "
                f"batch_size={self.batch_size} and max_length={self.max_length}, for which the graphs were made."
            )
        inputs = part.inputs(given, cached) if part.path else self._inputs(given, cached)
        kept = min(given.get(names.keep or "") or 1, count)
        plan = self._lengths.plan(count, kept, cached)
        check_pieces(inputs.get(names.mask or ""), [(cached + piece.begin, cached + piece.end) for piece in plan])
        found = []
        for piece in plan:
            result = self._run(piece, inputs, cached)
            if names.keep is None or piece.end > count - kept:
                found.append(result[:rows])
        whole = torch.cat(found, 1)
        given_back = whole if names.keep is None else whole[:, -kept:]
        return part.output(**{part.result: given_back, names.cache: self._cache})

    def _inputs(self, given: dict[str, Any], cached: int) -> dict[str, Any]:
        names = self._names
        for name, value in given.items():
            if name not in (*vars(names).values(), *IGNORED) and (isinstance(value, Tensor) or value is True):
                raise InputError(f"generate: the graphs were made without {name}, and can't take or give it.")
        tokens, mask = given[names.tokens], given.get(names.mask or "")
        shape = len(tokens), cached + tokens.shape[1]
        if mask is None:
            mask = torch.ones(shape, dtype=torch.int64, device=tokens.device)
        elif mask.shape != shape:
            raise InputError(f"generate: {names.mask} must be {list(shape)}, not {list(mask.shape)}.")
        positions = given.get(names.positions or "")
        if positions is None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, cached:]
        found = {names.tokens: tokens, names.mask: mask, names.positions: positions}
        return {name: tensor for name, tensor in found.items() if name is not None}

    def _run(self, piece: Piece, inputs: dict[str, Any], cached: int) -> Tensor:
        names, progress, state = self._names, self._progress, self._state
        left = piece.fresh and self._lengths.fill_left
        gap = piece.filling if left else progress.gap
        fill = (piece.filling, 0) if left else (0, piece.filling)
        start = 0 if piece.fresh else progress.gap + progress.tokens
        rows = piece.end - piece.begin
        keys = None
        if piece.fresh or state.kind.attends:
            width = piece.length if piece.fresh else self._room.capacity
            keys = gap, width - gap - cached - piece.end
        inputs = Window(piece.begin, piece.end, cached, fill, keys, self.batch_size).fit(inputs, names)
        last = piece.length - 1 if left else rows - 1
        if names.keep is not None and piece.fresh:
            inputs[names.keep] = torch.tensor([last])
        self._room.start.fill_(start)
        graph = self.graphs[graph_name(piece.length, piece.fresh)]
        result: Tensor
        result, tensors = graph(self._room.start, state.tensors, inputs)
        state.tensors[:] = tensors
        progress.gap = gap
        progress.tokens = rows if piece.fresh else progress.tokens + rows
        if piece.fresh and names.keep is not None:
            return result
        return result[:, fill[0] : fill[0] + rows]


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
        tensors = self._generator._state.tensors
        rows = torch.cat([beam_idx, torch.arange(len(beam_idx), len(tensors[0]))])
        tensors[:] = [t.index_select(0, rows) for t in tensors]

    def crop(self, count: int) -> None:
        """Forget the last tokens: all but `count`, or `-count` of them."""
        progress = self._generator._progress
        progress.tokens = min(count, progress.tokens) if count > 0 else progress.tokens + count


CONFLICTING = ("past_key_values", "cache_params", "cache_implementation", "inputs_embeds")


PREFILL = "prefill"


def graph_name(length: int, fresh: bool) -> str:
    """The name of a graph, as in `Generator.graphs`."""
    if fresh:
        return f"{PREFILL}[{length}]"
    return "decode" if length == 1 else f"decode[{length}]"
