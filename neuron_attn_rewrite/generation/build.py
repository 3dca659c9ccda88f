"""`rewrite_for_generation`: a generator, its graphs, and their comparison with the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.errors import CaptureError, InputError, RewriteWarning
from neuron_attn_rewrite.generation import layers
from neuron_attn_rewrite.generation.check import compare
from neuron_attn_rewrite.generation.encoder import Encode, Encoder
from neuron_attn_rewrite.generation.fit import Window
from neuron_attn_rewrite.generation.generator import Generator, check_autocast, graph_name
from neuron_attn_rewrite.generation.layers import Room
from neuron_attn_rewrite.generation.part import Part
from neuron_attn_rewrite.generation.plan import Lengths
from neuron_attn_rewrite.generation.step import State, grown_cache, step_of
from neuron_attn_rewrite.generation.tokens import random_tokens
from neuron_attn_rewrite.generation.towers import towers
from neuron_attn_rewrite.generation.trace import EXAMPLE
from neuron_attn_rewrite.module import RewrittenModule
from neuron_attn_rewrite.rewriter import rewrite


@torch.inference_mode(False)
def rewrite_for_generation(
    model: Any,
    *,
    max_length: int,
    batch_size: int = 1,
    prompt_lengths: int | Sequence[int] | None = None,
    decode_lengths: int | Sequence[int] = 1,
    encoder_lengths: int | Sequence[int] | None = None,
    example: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    config: RewriteConfig | None = None,
    verify: bool = True,
) -> Generator:
    """A generator: transformers' `generate` of this model, computed by rewritten graphs with a cache of fixed shape.

    There is one graph for each length of a prompt, and one for each number of tokens that follow. Compilation for a
    Neuron device needs such fixed shapes. A shorter prompt is filled up, and a longer one is processed in pieces.

    Args:
        model: a model of transformers that can generate, in eval mode. It is not changed. The generator shares its
            weights.
        max_length: how many tokens a sequence has at most, prompt, padding and new tokens together.
        batch_size: how many sequences the graphs process at once. Each beam is a sequence. Fewer are allowed.
        prompt_lengths: the lengths of the graphs for prompts. By default `max_length`. For a model with an encoder,
            these are prompts of the decoder, 1 by default.
        decode_lengths: the lengths of the graphs for new tokens. A graph for one token is always made. Longer ones
            check several proposed tokens at once, for `assistant_model` and `prompt_lookup_num_tokens`.
        encoder_lengths: the lengths of the graphs for an encoder that takes tokens. By default `max_length`. Shorter
            inputs are filled up, and `attention_mask` hides what is filled in.
        example: inputs of `generate` with media, such as what a processor gives, or several of them. Each tower gets a
            graph for each size and number of media in them. Only the text part of a multimodal model without examples
            is rewritten. An encoder that takes features needs one, and has one graph, for features of this shape.
        config: see `RewriteConfig`.
        verify: compare the generator with `model.generate`: the logits of five steps, for each graph, with padding on
            the left and without. `config.verify` compares each graph with the model.

    Raises:
        InputError: an argument does not fit the model or the others.
        CaptureError: a call of the model can't be captured as one graph, its cache is of an unknown kind, or the
            generator gives other logits than the model.
        RewriteError: `config.require` is not met.
    """
    config = RewriteConfig.of(config)
    _check_model(model)
    check_autocast("rewrite_for_generation", model.device)
    has_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for name, count in {"max_length": max_length, "batch_size": batch_size}.items():
        if not _is_count(count):
            raise InputError(f"rewrite_for_generation: {name} must be an integer of at least 1, not {count!r}.")
    by_default = 1 if has_encoder else max_length
    prompts = _lengths("prompt_lengths", by_default if prompt_lengths is None else prompt_lengths, max_length)
    steps = _lengths("decode_lengths", decode_lengths, max_length)
    examples: list[Mapping[str, Any]] = [example] if isinstance(example, Mapping) else list(example)
    if not has_encoder:
        _check_examples(examples, batch_size, max_length)
    part = Part.of(model, batch_size, prompts[-1], examples)
    if examples and not part.path and not has_encoder:
        raise InputError(
            f"rewrite_for_generation: example can't be given: {type(model).__name__} has no part that reads embeddings "
            "and text alone, so its graphs take text only."
        )
    encoder = None
    if has_encoder:
        wanted = max_length if encoder_lengths is None else encoder_lengths
        encoder = Encoder.of(
            model, part.names, batch_size, _lengths("encoder_lengths", wanted), next(iter(examples), None)
        )
    elif encoder_lengths is not None:
        raise InputError(
            f"rewrite_for_generation: encoder_lengths can't be given: {type(model).__name__} has no encoder."
        )
    first = part.first(batch_size) | ({} if encoder is None else encoder.given(part.names))
    grown = grown_cache(part.module, part.names, first)
    lengths = Lengths.of(prompts, steps, max_length, layers.kind_of(grown.cache).recurrent)
    place = torch.zeros(2, dtype=torch.int64, device=model.device)
    spare = lengths.steps[-1] - 1 if part.takes_padding else None
    room = Room(batch_size, max_length + lengths.slack, place, spare)
    state = State.of(grown, room)
    graphs = {
        graph_name(length, fresh): _graph(part, state, room, length, fresh, encoder, config)
        for fresh, each in ((True, lengths.prompts), (False, lengths.steps))
        for length in each
    }
    for length in lengths.pieces:
        try:
            graphs[graph_name(length, False)] = _graph(part, state, room, length, False, encoder, config)
        except CaptureError as error:
            _warn_of_pieces(length, error)
            lengths = replace(lengths, pieces=())
    if encoder is not None:
        encode = Encode(model.get_encoder())
        graphs |= {name: _rewritten(name, encode, (each,), config) for name, each in encoder.examples.items()}
    media = towers(model, part.path, examples if part.path else [], config)

    def made(lengths: Lengths) -> Generator:
        generator = Generator(model, part, state, room, lengths, max_length, graphs, media, encoder)
        if verify:
            compare(model, generator, examples)
        return generator

    try:
        return made(lengths)
    except CaptureError as error:
        if not lengths.pieces:
            raise
        for length in lengths.pieces:
            del graphs[graph_name(length, False)]
        generator = made(replace(lengths, pieces=()))  # raises if something else is wrong
        _warn_of_pieces(length, error)
        return generator


def _warn_of_pieces(length: int, error: CaptureError) -> None:
    words = f"prompts of more than {length} tokens are processed token by token after the first {length}. {error}"
    warnings.warn(words, RewriteWarning, stacklevel=4)


def _check_examples(examples: Sequence[Mapping[str, Any]], batch_size: int, max_length: int) -> None:
    """Check the examples for a multimodal model.

    Raises:
        InputError: one has no tokens, or does not fit.
    """
    for each in examples:
        tokens = each.get("input_ids")
        if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
            raise InputError("rewrite_for_generation: example must hold input_ids [batch, length] beside the media.")
        if len(tokens) > batch_size or tokens.shape[1] >= max_length:
            raise InputError(
                f"rewrite_for_generation: the example has input_ids {list(tokens.shape)}, which do not fit "
                f"batch_size={batch_size} and max_length={max_length}."
            )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "generate") or not hasattr(model, "generation_config"):
        raise InputError(
            f"rewrite_for_generation: model must be a model of transformers that can generate, such as that of "
            f"AutoModelForCausalLM, not {type(model).__name__}."
        )
    if model.training:
        raise InputError("rewrite_for_generation: the model is in train mode: call model.eval() first.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _lengths(name: str, given: Any, max_length: int | None = None) -> tuple[int, ...]:
    """Lengths of graphs, increasing.

    Raises:
        InputError: they are no positive integers, or larger than `max_length`.
    """
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    wrong = [value for value in values if not _is_count(value) or value > (max_length or value)]
    if wrong or not values:
        limits = "of at least 1" if max_length is None else f"from 1 to max_length={max_length}"
        raise InputError(f"rewrite_for_generation: {name} must be integers {limits}, not {given!r}.")
    return tuple(sorted(set(values)))


def _graph(
    part: Part, state: State, room: Room, length: int, fresh: bool, encoder: Encoder | None, config: RewriteConfig
) -> RewrittenModule:
    """The rewritten graph of one call.

    Raises:
        CaptureError: the call can't be captured as one graph.
        RewriteError: `config.require` is not met.
    """
    cached, given = _usual(part, state, room, length, fresh)
    if encoder is not None:
        given |= encoder.tensors(part.names)
    example = (room.place.new_tensor([cached, length]), [t.clone() for t in state.tensors], given)
    step = step_of(part.module, part.names, state, fresh, None if encoder is None else encoder.kind)
    with warnings.catch_warnings():
        if encoder is not None:  # keys and values of its output are cached: only a fresh call reads it
            warnings.filterwarnings("ignore", f".* does not read its input inputs_{part.names.encoder_outputs}")
        graph = _rewritten(graph_name(length, fresh), step, example, config)
    graph.meta[EXAMPLE] = (example[0], *pytree.tree_leaves(given))
    return graph


def _rewritten(name: str, module: nn.Module, example: tuple[Any, ...], config: RewriteConfig) -> RewrittenModule:
    """A rewritten graph.

    Raises:
        CaptureError: the module can't be captured as one graph.
        RewriteError: `config.require` is not met.
    """
    try:
        with torch.no_grad():
            return rewrite(module, example, config=config)
    except (CaptureError, InputError) as error:
        raise CaptureError(f"{name}: {error}") from error


def _usual(part: Part, state: State, room: Room, length: int, fresh: bool) -> tuple[int, dict[str, Any]]:
    """How many tokens are cached before a call, and the inputs of the call: as while generating."""
    names, attends = part.names, state.kind.attends
    width = length if fresh or not attends else room.capacity + state.held
    if part.path:
        count = part.usual[names.tokens].shape[1]
        begin = 0 if fresh else max(count - length, 0)
        end = min(count, begin + length)
        keys = (0, width - end) if fresh or attends else None
        return begin, Window(begin, end, 0, (0, length + begin - end), keys, room.batch).fit(part.usual, names)
    cached = 0 if fresh or not attends else (room.capacity - length + 1) // 2  # of a continuing call at least 1
    # So that the model builds its mask from it: with padding, and zeros for what comes later.
    mask = (torch.arange(width) < cached + length).repeat(room.batch, 1).long()
    mask[0, 0] = int(cached + length < 2)
    inputs = {
        names.tokens: random_tokens(part.module, room.batch, length),
        names.mask: mask,
        names.positions: (mask.cumsum(1) - 1).clamp_min(0)[:, cached : cached + length],
        names.keep: torch.tensor([length - 1]) if fresh else None,
    }
    return cached, {name: t.to(room.place.device) for name, t in inputs.items() if name is not None and t is not None}
