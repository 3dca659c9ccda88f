"""Runs a graph that holds kernel calls beside their attentions, and hands both results to a function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph.writes import buffers_restored, changed_in_place
from neuron_attn_rewrite.replace.graft import Graft

aten = torch.ops.aten
Values = Mapping[fx.Node, Any]
Visit = Callable[[Graft, Values, "Tensor | Exception"], "Tensor | None"]
"""Gets a graft, the values of the nodes in `reads`, and the result of the kernel call or the error that it raises. It
may give another value for the output of the attention. The run goes on with this value."""


class ModelError(Exception):
    """An operator of the model raises an error on these inputs."""

    def __init__(self, error: Exception, node: fx.Node, values: Values) -> None:
        super().__init__(str(error))
        self.error, self.node = error, node
        self.values = {n: values[n] for n in node.all_input_nodes if n in values}


class Runs:
    """Runs of one graph. The graph must not change between them."""

    def __init__(self, module: fx.GraphModule, grafts: Sequence[Graft]) -> None:
        self.module = module
        self.changed = changed_in_place(module.graph)
        self.added = frozenset(node for g in grafts for node in g.added)
        self.position = {node: i for i, node in enumerate(module.graph.nodes)}

    def run(
        self,
        inputs: Sequence[Any],
        reads: Mapping[Graft, Collection[fx.Node]],
        visit: Visit,
        given: Mapping[fx.Node, Callable[[], Tensor]] | None = None,
    ) -> Any:
        """Run the graph on values for its placeholders, and visit kernel calls.

        Buffers and inputs that the graph writes into, and the random state, are unchanged. Each run draws the same
        random numbers.

        Args:
            inputs: a value for each placeholder.
            reads: the grafts to visit, and the nodes of which `visit` reads the values.
            visit: see `Visit`.
            given: nodes whose values are drawn and not computed. Then only what the visited attentions and kernel calls
                need is run.

        Returns:
            The outputs of the graph, None with `given`.

        Raises:
            ModelError: an operator of the model raises an error. The error of a kernel call goes to `visit`.
        """
        runner = _Beside(self, reads, visit, given)
        values = [
            value.clone() if isinstance(value, Tensor) and node in self.changed else value
            for node, value in zip(self.module.graph.find_nodes(op="placeholder"), inputs, strict=True)
        ]
        with buffers_restored(self.module, self.changed), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return runner.run(*values, enable_io_processing=False)


class _Beside(fx.Interpreter):
    def __init__(
        self,
        runs: Runs,
        reads: Mapping[Graft, Collection[fx.Node]],
        visit: Visit,
        given: Mapping[fx.Node, Callable[[], Tensor]] | None,
    ) -> None:
        super().__init__(runs.module)
        self.visit, self.added, self.given = visit, runs.added, given or {}
        self.by_result = {g.result: g for g in reads}
        ends = [node for g in reads for node in (g.verdict.site.output, g.result, *reads[g])]
        self.only = needed(ends, self.given) if self.given else set(self.graph.nodes)
        last = {node: user for user, nodes in self.user_to_last_uses.items() for node in nodes}
        for g, nodes in reads.items():
            for node in nodes:
                if node not in last or runs.position[last[node]] < runs.position[g.result]:
                    last[node] = g.result
        self.user_to_last_uses = {}
        for node, user in last.items():
            self.user_to_last_uses.setdefault(user, []).append(node)

    def run_node(self, node: fx.Node) -> Any:
        value = self._value(node)
        if node not in self.by_result:
            return value
        graft = self.by_result[node]
        instead = self.visit(graft, self.env, value)
        if instead is not None:
            self.env[graft.verdict.site.output] = instead
        return None

    def _value(self, node: fx.Node) -> Any:
        if node not in self.only and node.op != "placeholder":
            return None
        if node in self.given:
            if node.op == "placeholder":
                super().run_node(node)  # takes the next input
            return self.given[node]()
        if node not in self.added:
            try:
                return super().run_node(node)
            except Exception as error:  # whatever an operator raises
                raise ModelError(error, node, self.env) from error
        for read in node.all_input_nodes:
            if isinstance(failed := self.env[read], Exception):
                return failed
        try:
            return super().run_node(node)
        except Exception as error:
            return error

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.view.default:  # a kernel's result may have other strides than the model's
            target = aten.reshape.default
        return super().call_function(target, args, kwargs)


def needed(ends: Sequence[fx.Node], stop: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that these ones are computed from, without what is behind `stop`."""
    stack, found = list(ends), set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += () if node in stop else node.all_input_nodes
    return found
