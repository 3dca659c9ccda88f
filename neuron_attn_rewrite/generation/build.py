"""`rewrite_for_generation`: a generator, its graphs, and their comparison with the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.errors import CaptureError, InputError
from neuron_attn_rewrite.generation import layers
from neuron_attn_rewrite.generation.check import compare
from neuron_attn_rewrite.generation.fit import Window
from neuron_attn_rewrite.generation.generator import Generator, graph_name
from neuron_attn_rewrite.generation.layers import Room
from neuron_attn_rewrite.generation.part import Part
from neuron_attn_rewrite.generation.plan import Lengths
from neuron_attn_rewrite.generation.step import State, grown_cache, step_of
from neuron_attn_rewrite.generation.trace import EXAMPLE
from neuron_attn_rewrite.module import RewrittenModule
from neuron_attn_rewrite.rewriter import rewrite


def rewrite_for_generation(
    model: Any,
    *,
    max_length: int,
    batch_size: int = 1,
    prompt_lengths: int | Sequence[int] | None = None,
    decode_lengths: int | Sequence[int] = 1,
    example: Mapping[str, Any] | None = None,
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
        prompt_lengths: the lengths of the graphs for prompts. By default `max_length`.
        decode_lengths: the lengths of the graphs for new tokens. A graph for one token is always made. Longer ones
            check several proposed tokens at once, for `assistant_model` and `prompt_lookup_num_tokens`.
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
    prompts = _lengths("prompt_lengths", max_length if prompt_lengths is None else prompt_lengths, max_length)
    steps = _lengths("decode_lengths", decode_lengths, max_length)
    if not _is_count(batch_size):
        raise InputError(f"rewrite_for_generation: batch_size must be an integer of at least 1, not {batch_size!r}.")
    part = Part.of(model, batch_size, prompts[-1], example)
    cache = grown_cache(part.module, part.names, part.first(batch_size))
    lengths = Lengths.of(prompts, steps, max_length, layers.kind_of(cache).recurrent)
    start = torch.zeros((), dtype=torch.int64, device=model.device)
    room = Room(batch_size, max_length + lengths.slack, start)
    state = State.of(cache, room)
    graphs = {
        graph_name(length, fresh): _graph(part, state, room, length, fresh, config)
        for fresh, each in ((True, lengths.prompts), (False, (*lengths.steps, *lengths.pieces)))
        for length in each
    }
    generator = Generator(model, part, state, room, lengths, max_length, graphs)
    if verify:
        compare(model, generator, example)
    return generator


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


def _lengths(name: str, given: Any, max_length: int) -> tuple[int, ...]:
    """Lengths of graphs, increasing.

    Raises:
        InputError: they are no positive integers, or larger than `max_length`.
    """
    if not _is_count(max_length):
        raise InputError(f"rewrite_for_generation: max_length must be an integer of at least 1, not {max_length!r}.")
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    wrong = [value for value in values if not _is_count(value) or value > max_length]
    if wrong or not values:
        raise InputError(
            f"rewrite_for_generation: {name} must be integers from 1 to max_length={max_length}, not {given!r}."
        )
    return tuple(sorted(set(values)))


def _graph(part: Part, state: State, room: Room, length: int, fresh: bool, config: RewriteConfig) -> RewrittenModule:
    """The rewritten graph of one call.

    Raises:
        CaptureError: the call can't be captured as one graph.
        RewriteError: `config.require` is not met.
    """
    cached, given = _usual(part, state, room, length, fresh)
    example = (torch.full_like(room.start, cached), [t.clone() for t in state.tensors], given)
    try:
        with torch.no_grad():
            rewritten = rewrite(step_of(part.module, part.names, state, fresh), example, config=config)
    except (CaptureError, InputError) as error:
        raise CaptureError(f"{graph_name(length, fresh)}: {error}") from error
    rewritten.meta[EXAMPLE] = (example[0], *given.values())
    return rewritten


def _usual(part: Part, state: State, room: Room, length: int, fresh: bool) -> tuple[int, dict[str, Any]]:
    """How many tokens are cached before a call, and the inputs of the call: as while generating."""
    names, attends = part.names, state.kind.attends
    width = length if fresh or not attends else room.capacity
    if part.path:
        count = part.usual[names.tokens].shape[1]
        begin = 0 if fresh else max(count - length, 0)
        end = min(count, begin + length)
        keys = (0, width - end) if fresh or attends else None
        return begin, Window(begin, end, 0, (0, length + begin - end), keys, room.batch).fit(part.usual, names)
    cached = 0 if fresh or not attends else (width - length) // 2
    vocabulary = part.module.config.get_text_config(decoder=True).vocab_size
    # So that the model builds its mask from it: with padding, and zeros for what comes later.
    mask = (torch.arange(width) < cached + length).repeat(room.batch, 1).long()
    mask[0, 0] = int(cached + length < 2)
    inputs = {
        names.tokens: torch.randint(0, vocabulary, (room.batch, length)),
        names.mask: mask,
        names.positions: (mask.cumsum(1) - 1).clamp_min(0)[:, cached : cached + length],
        names.keep: torch.tensor([length - 1]) if fresh else None,
    }
    return cached, {name: t.to(room.start.device) for name, t in inputs.items() if name is not None and t is not None}
