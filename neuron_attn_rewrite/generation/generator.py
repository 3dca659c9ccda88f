"""`Generator`: transformers' `generate` on rewritten graphs."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import InputError, RewriteError
from neuron_attn_rewrite.generation.encoder import MASK, TOKENS, Encoder
from neuron_attn_rewrite.generation.fit import (
    Window,
    check_pieces,
    check_states,
    unseen_rows,
    whole_batch,
    whole_numbers,
)
from neuron_attn_rewrite.generation.handles import Cache, EncoderDecoderCache, Progress, Saved
from neuron_attn_rewrite.generation.layers import Room
from neuron_attn_rewrite.generation.part import IGNORED, Part, bound, with_forwards
from neuron_attn_rewrite.generation.plan import Lengths, Piece
from neuron_attn_rewrite.generation.step import State
from neuron_attn_rewrite.generation.towers import Towers
from neuron_attn_rewrite.generation.trace import ForTrace, for_trace
from neuron_attn_rewrite.module import RewrittenModule
from neuron_attn_rewrite.report.report import RewriteReport


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
        towers: Towers,
        encoder: Encoder | None = None,
    ) -> None:
        self.graphs = {**towers.named(), **graphs}
        self.max_length, self.batch_size = max_length, room.batch
        self._part, self._names = part, part.names
        self._state, self._room, self._lengths = state, room, lengths
        self._progress = Progress()
        self._saved: list[Saved] = []
        self._cache = (Cache if encoder is None else EncoderDecoderCache)(self)
        self._encoder = encoder
        self._in_use = threading.Lock()
        self._original = model
        self._model = with_forwards(
            model, {**towers.forwards(model), part.path: _forward_of(part.module, self._forward)}
        )
        self._model.generation_config = without_cache(model.generation_config)
        if encoder is not None:
            original = model.get_encoder()
            encode = with_forwards(original, {"": _forward_of(original, self._encode)})
            self._model.get_encoder = lambda *args, **kwargs: encode

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
        check_autocast("generate", self._original.device)
        if not self._in_use.acquire(blocking=False):
            raise InputError("generate: this generator is in use. Two calls at the same time need two generators.")
        try:
            # A cache of tensors that were made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                return self._generate(inputs, options)
        finally:
            self._in_use.release()

    def _generate(self, inputs: Tensor | None, options: Mapping[str, Any]) -> Any:
        self._model.generation_config = without_cache(self._original.generation_config)
        self._check(inputs, options)
        self._cache.reset()
        try:
            options = {**options, self._names.cache: self._cache, "use_cache": True}
            return self._model.generate(inputs, **options)
        except RewriteError:
            raise
        except Exception as error:
            if not self._part.path or self._progress.tokens:
                raise
            raise InputError(
                f"generate: {type(self._model).__name__} can't merge these inputs: {type(error).__name__}: {error}"
            ) from error

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RewriteError(
            "a generator can't be copied or pickled: save the model, and call rewrite_for_generation for each copy."
        )

    def _check(self, inputs: Tensor | None, options: Mapping[str, Any]) -> None:
        """Check what the graphs can't process.

        Raises:
            InputError: there is something.
        """
        settings = options.get("generation_config") or self._model.generation_config

        def setting(name: str) -> Any:
            return options[name] if options.get(name) is not None else getattr(settings, name, None)

        for name, reason in REFUSED.items():
            value = setting(name)
            if value is not None and not (isinstance(value, int | float) and value == NEUTRAL.get(name)):
                raise InputError(f"generate: {name} can't be given: {reason}.")
        if options.get("use_cache") is False:
            raise InputError("generate: use_cache=False can't be given: a generator always uses its cache.")
        if isinstance(options.get("assistant_model"), Generator):
            raise InputError("generate: assistant_model must be a model of transformers, and can't be a generator.")
        encoder = self._encoder
        prompt = options.get(self._part.prompt, inputs if encoder is None else None)
        if encoder is not None and not isinstance(prompt, Tensor):
            source = options.get(encoder.main, inputs)  # the decoder starts with one token
            if encoder.main == TOKENS and isinstance(source, Tensor):
                _check_tokens(encoder.main, source)
            prompt = torch.zeros(len(source), 1, dtype=torch.int64) if isinstance(source, Tensor) else None
        if not isinstance(prompt, Tensor):
            return  # generate makes or asks for it
        _check_tokens(self._part.prompt, prompt)
        rows, length = prompt.shape
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
        name = "attention_mask" if encoder is None else self._names.mask or ""
        mask = options.get(name)
        if isinstance(mask, Tensor) and mask.shape != prompt.shape:
            raise InputError(
                f"generate: {name} must be {list(prompt.shape)}, as {self._part.prompt}, not {list(mask.shape)}."
            )

    def _forward(self, given: dict[str, Any]) -> Any:
        names, part = self._names, self._part
        tokens = given[names.tokens]
        rows, count = tokens.shape[:2]
        self._check_cache(given.get(names.cache))
        encoded = {} if self._encoder is None else self._encoded(self._encoder, given)
        cached = self._progress.tokens
        if cached + count > self.max_length or rows > self.batch_size:
            raise InputError(
                f"generate: {rows} sequences of {cached + count} tokens do not fit "
                f"batch_size={self.batch_size} and max_length={self.max_length}, for which the graphs were made."
            )
        inputs = part.inputs(given, cached) if part.path else self._inputs(given, cached)
        kept = min(given.get(names.keep or "") or 1, count)
        plan = self._lengths.plan(count, kept, cached)
        check_pieces(inputs.get(names.mask or ""), [(cached + piece.begin, cached + piece.end) for piece in plan])
        if self._lengths.fill_left:
            check_states(inputs.get(names.mask or ""), cached + plan[0].end if plan[0].fresh else cached)
        proposed = kept if names.keep is not None else count if cached else 1
        self._saved.clear()
        found = []
        for piece in plan:
            if piece.begin > count - proposed:
                self._save()
            result = self._run(piece, inputs, encoded, cached)
            if names.keep is None or piece.end > count - kept:
                found.append(result[:rows])
        whole = torch.cat(found, 1)
        given_back = whole if names.keep is None else whole[:, -kept:]
        return part.output(**{part.result: given_back, names.cache: self._cache})

    def _check_cache(self, cache: Any) -> None:
        """Check that a call goes on with the sequence that is cached. Without a cache, a new one begins.

        Raises:
            InputError: it goes on with another one.
        """
        if cache is None:
            self._progress, self._cache = Progress(), type(self._cache)(self)
        elif cache is not self._cache:
            raise InputError(f"generate: the model is called with another {self._names.cache} than the generator's.")

    def _save(self) -> None:
        state = self._state
        self._saved.append(Saved(replace(self._progress), {n: state.tensors[n].clone() for n in state.passing}))

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
        return {name: whole_numbers(name, tensor) for name, tensor in found.items() if name is not None}

    def _encode(self, given: dict[str, Any]) -> Any:
        """The output of the encoder. A new sequence begins."""
        assert self._encoder is not None
        name, inputs = self._encoder.fit(given)
        rows = len(inputs[self._encoder.main])
        if rows > self.batch_size:
            raise InputError(f"generate: {rows} inputs of the encoder do not fit batch_size={self.batch_size}.")
        self._cache.reset()
        return self._encoder.cut(self.graphs[name](self._whole(inputs)), given)

    def _encoded(self, encoder: Encoder, given: dict[str, Any]) -> dict[str, Any]:
        """What the graphs take of the encoder, by name. The inputs of the encoder are removed from those given."""
        names = self._names
        taken = {name: given.pop(name) for name in (encoder.main, MASK) if name in given}
        output = given.get(names.encoder_outputs or "")
        tensors, mask = encoder.for_decoder(self._encode(taken) if output is None else output, taken.get(MASK))
        found: dict[str, Any] = {str(names.encoder_outputs): self._whole(tensors)}
        return found | (self._whole({names.encoder_mask: mask}) if names.encoder_mask and mask is not None else {})

    def _whole(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: whole_batch(tensor, self.batch_size) for name, tensor in inputs.items()}

    def _run(self, piece: Piece, inputs: dict[str, Any], encoded: dict[str, Any], cached: int) -> Tensor:
        names, progress, state = self._names, self._progress, self._state
        left = piece.fresh and self._lengths.fill_left
        gap = piece.filling if left else progress.gap
        fill = (piece.filling, 0) if left else (0, piece.filling)
        start = 0 if piece.fresh else progress.gap + progress.tokens
        rows = piece.end - piece.begin
        unseen = None
        if self._lengths.fill_left and not piece.fresh:
            unseen = unseen_rows(inputs.get(names.mask or ""), cached + piece.end, self.batch_size)
        keys = None
        if piece.fresh or state.kind.attends:
            width = piece.length if piece.fresh else self._room.capacity + state.held
            keys = gap, width - gap - cached - piece.end
        inputs = Window(piece.begin, piece.end, cached, fill, keys, self.batch_size).fit(inputs, names)
        if state.kind.own and state.kind.attends and not piece.fresh and names.mask is not None:
            # Such models look up the new tokens at the end of the mask. As keys they come later, and are hidden.
            seen = inputs[names.mask]
            inputs[names.mask] = torch.cat([seen[:, : -piece.length], seen[:, start : start + piece.length]], 1)
        last = piece.length - 1 if left else rows - 1
        if names.keep is not None and piece.fresh:
            inputs[names.keep] = torch.tensor([last])
        self._room.place.copy_(torch.tensor([start, piece.length if left else rows]))
        graph = self.graphs[graph_name(piece.length, piece.fresh)]
        before = [] if unseen is None else [t.clone() for t in state.tensors]
        result: Tensor
        result, tensors = graph(self._room.place, state.tensors, inputs | encoded)
        state.tensors[:] = tensors
        if unseen is not None:  # padding is processed as if it were not there
            state.take(before, unseen)
        progress.gap = gap
        progress.tokens = rows if piece.fresh else progress.tokens + rows
        progress.most = max(progress.most, progress.tokens)
        if piece.fresh and names.keep is not None:
            return result
        return result[:, fill[0] : fill[0] + rows]


def check_autocast(caller: str, device: torch.device) -> None:
    """Check that a cache keeps the dtypes of the model.

    Raises:
        InputError: autocast is on, and changes them.
    """
    if torch.is_autocast_enabled(device.type):
        raise InputError(
            f"{caller}: torch.autocast is on, and a cache has the dtypes that the model has without it. Call "
            "model.to(dtype) before rewrite_for_generation, and leave autocast out."
        )


def _check_tokens(name: str, tokens: Tensor) -> None:
    """Check the tokens of a caller.

    Raises:
        InputError: they are no tokens, or there are none.
    """
    if tokens.dim() != 2 or 0 in tokens.shape or tokens.is_floating_point():
        raise InputError(
            f"generate: {name} must be integers [batch, length] with at least one token, not "
            f"{list(tokens.shape)}, {tokens.dtype}."
        )


def _forward_of(module: Any, call: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A function in the place of the `forward` of a module."""
    signature = inspect.signature(module.forward)

    @functools.wraps(module.forward)  # generate reads the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(bound(signature, args, kwargs))

    return forward


OWN_CACHE = "a generator has a cache of its own"
ONE_CACHE = "it calls the model with a second cache, and a generator has one"
REFUSED = {
    "past_key_values": OWN_CACHE,
    "cache_params": OWN_CACHE,
    "cache_implementation": OWN_CACHE,
    "inputs_embeds": "the graphs take tokens",
    "guidance_scale": ONE_CACHE,
    "assistant_early_exit": ONE_CACHE,
}
"""Arguments of `generate` that are refused, and why."""
NEUTRAL = {"guidance_scale": 1}
"""Values of them that change nothing."""


def without_cache(settings: Any) -> Any:
    """The settings of a model, but for the kind of cache that its checkpoint asks for."""
    settings = copy.copy(settings)
    settings.cache_implementation = None
    return settings


PREFILL = "prefill"


def graph_name(length: int, fresh: bool) -> str:
    """The name of a graph, as in `Generator.graphs`."""
    if fresh:
        return f"{PREFILL}[{length}]"
    return "decode" if length == 1 else f"decode[{length}]"
