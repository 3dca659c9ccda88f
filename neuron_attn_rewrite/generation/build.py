"""`rewrite_for_generation`: the graphs of a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.generation.check import compare
from neuron_attn_rewrite.generation.generator import Generator, graph_name
from neuron_attn_rewrite.generation.layers import Room
from neuron_attn_rewrite.generation.plan import Lengths
from neuron_attn_rewrite.generation.step import Names, State, Step
from neuron_attn_rewrite.rewriter import rewrite


def rewrite_for_generation(
    model: Any,
    *,
    batch_size: int = 1,
    max_length: int,
    prompt_lengths: Sequence[int] | int,
    decode_lengths: Sequence[int] = (1,),
    config: RewriteConfig | None = None,
    verify: bool = True,
) -> Generator:
    """A generator..."""
    config = RewriteConfig.of(config)
    prompts = tuple(sorted({prompt_lengths} if isinstance(prompt_lengths, int) else set(prompt_lengths)))
    steps = tuple(sorted({1, *decode_lengths}))
    names = Names.of(model)
    capacity = max_length + steps[-1] - 1
    room = Room(batch_size, capacity, torch.zeros((), dtype=torch.int64))
    one = {names.tokens: torch.zeros(batch_size, 1, dtype=torch.int64)}
    state = State.of(model, names, room, one)
    if state.is_recurrent:
        steps = (1,)
    long = (prompts[-1],) if max_length > prompts[-1] and not state.is_recurrent else ()
    lengths = Lengths(prompts, steps, long)
    graphs = {}
    for fresh, each in ((True, prompts), (False, (*steps, *long))):
        for length in each:
            graphs[graph_name(length, fresh)] = _graph(model, names, state, room, length, fresh, config)
    generator = Generator(model, names, state, room, lengths, max_length, graphs)
    if verify:
        compare(model, generator)
    return generator


def _graph(
    model: Any, names: Names, state: State, room: Room, length: int, fresh: bool, config: RewriteConfig
) -> Any:
    width = length if fresh else room.capacity
    cached = 0 if fresh else (width - length) // 2
    # As while generating, so that the model builds its mask from it: with padding, and zeros for what comes later.
    mask = (torch.arange(width) < cached + length).repeat(room.batch, 1).long()
    mask[0, 0] = int(cached + length < 2)
    inputs = {
        names.tokens: torch.randint(0, model.config.get_text_config(decoder=True).vocab_size, (room.batch, length)),
        names.mask: mask,
        names.positions: (mask.cumsum(1) - 1).clamp_min(0)[:, cached : cached + length],
        names.keep: torch.tensor([length - 1]) if fresh else None,
    }
    start = torch.full((), cached)
    inputs = {name: t for name, t in inputs.items() if name is not None and t is not None}
    step = Step(model, names, state, fresh)
    with torch.no_grad():
        return rewrite(step, (start, [t.clone() for t in state.tensors], inputs), config=config)
