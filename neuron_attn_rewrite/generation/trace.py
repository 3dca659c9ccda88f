"""The graphs of a generator for `torch_neuronx.trace`, with the cache as aliased buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.backends.activations import restore_activations
from neuron_attn_rewrite.module import SIGNATURE, RewrittenModule

EXAMPLE = "neuron_attn_rewrite.generation_example"
"""The key of `module.meta` for example inputs of a graph, without the cache: the place, then those of the model."""
aten = torch.ops.aten


class ForTrace(NamedTuple):
    """What `torch_neuronx.trace` takes: `trace(module, example_inputs, input_output_aliases=aliases)`."""

    module: RewrittenModule
    """It takes its inputs by position. It gives a tuple: the logits, then the tensors of the cache after the call.

    Its buffers are the tensors of the cache before the call. The call itself does not change them: the aliases do.
    """
    example_inputs: tuple[Tensor, ...]
    """`place`, int64 [2]: how many tokens are cached, and how many of the new ones count. Then what the model takes."""
    aliases: dict[Tensor, int]
    """For each of these buffers the number of the output that takes its place."""


def for_trace(graph: RewrittenModule, cache: Mapping[str, Tensor], fresh: bool) -> ForTrace:
    """The graph of a `Step` as a module that can be traced. Weights and cache are shared, and the graph is not changed.

    Args:
        graph: rewritten, with an `EXAMPLE`.
        cache: the tensors that shall be the buffers, by name.
        fresh: whether nothing is cached before the call, so that the graph may overwrite a tensor without reading it.
    """
    copied = fx.Graph()
    logits, *after = copied.graph_copy(graph.graph, {})  # type: ignore[misc]
    copied.output((logits, *after))
    module = fx.GraphModule(graph, copied)
    place, *others = module.graph.find_nodes(op="placeholder")
    before = [_as_buffer(module, given, *named) for given, named in zip(others, cache.items(), strict=False)]
    output = module.graph.output_node()
    if fresh:
        logits, *after = cast(tuple[fx.Node, ...], output.args[0])
        with module.graph.inserting_before(output):
            after = [_taken(place, new, old) for new, old in zip(after, before, strict=True)]
        output.args = ((logits, *after),)
    module.meta = {key: value for key, value in graph.meta.items() if key not in (SIGNATURE, EXAMPLE)}
    module.train(graph.training)
    restore_activations(module)
    aliases = {tensor: place for place, tensor in enumerate(cache.values(), start=1)}
    return ForTrace(RewrittenModule.wrap(module, graph.report), graph.meta[EXAMPLE], aliases)


def _as_buffer(module: fx.GraphModule, given: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    """Put a buffer in the place of an input. Gives its value before the call."""
    name = f"cache_{name}"
    module.register_buffer(name, tensor)
    with module.graph.inserting_before(given):
        buffer = module.graph.get_attr(name)
        # The graph writes into a copy. A trace finds a buffer by the memory that it had before, and a copy costs
        # nothing where each write makes a new value, as in XLA.
        copied = module.graph.call_function(aten.clone.default, (buffer,))
    buffer.meta, copied.meta = dict(given.meta), dict(given.meta)
    given.replace_all_uses_with(copied)
    module.graph.erase_node(given)
    return buffer


def _taken(place: fx.Node, new: fx.Node, old: fx.Node) -> fx.Node:
    """The new tensor, as no number of tokens is negative. So the old one is read too: else it can't be aliased."""
    graph = place.graph
    is_there = graph.call_function(aten.ge.Scalar, (graph.call_function(aten.select.int, (place, 0, 0)), 0))
    taken = graph.call_function(aten.where.self, (is_there, new, old))
    value = place.meta["val"]
    is_there.args[0].meta, is_there.meta = {"val": value[0]}, {"val": value[0] >= 0}  # type: ignore[union-attr]
    taken.meta = dict(new.meta)
    return taken
