"""A pass of `normalise`: writes into intermediate tensors become new tensors.

Which tensors a write reaches is read off the storages of a run on fake tensors (`graph/memory.py`). All writes into one
storage become new tensors, or all of them stay. They stay if it is the storage of an input or a buffer (a cache), which
the model changes for its caller, or if one of them can't be expressed. The new tensors have the strides of the old
ones, so that every operator which decides by strides, as `reshape` does, decides as before.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from neuron_attn_rewrite.capture.scatters import Scatter, scatter
from neuron_attn_rewrite.graph.memory import Memory, memory
from neuron_attn_rewrite.graph.nodes import attribute, fake_mode, mutates
from neuron_attn_rewrite.graph.strides import memory_order, same_strides, with_strides
from neuron_attn_rewrite.graph.writes import written

aten = torch.ops.aten

METADATA: dict[Any, Any] = {
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
    aten.swapaxes_.default: aten.swapaxes.default,
    aten.swapdims_.default: aten.swapdims.default,
    aten.as_strided_.default: aten.as_strided.default,
    aten.detach_.default: aten.detach.default,
}
"""Operators that change the sizes of a tensor and not its elements, and the view that has the new sizes."""


def functionalise(module: fx.GraphModule) -> None:
    """Replace writes into intermediate tensors by new tensors, so that no value changes after it is computed."""
    graph = module.graph
    if not any(mutates(node) for node in graph.nodes):
        return
    _outputs_as_copies(graph)
    where = memory(graph)
    if any(node.target in METADATA for node in graph.nodes):
        _resized_by_views(graph, where)
        where = memory(graph)
    gradients = _gradients(graph, where)
    _drop_idle_copies(graph, where, gradients)
    _Functionalisation(graph, where, gradients).run()


def _outputs_as_copies(graph: fx.Graph) -> None:
    """Replace each call that writes its result into `out` by the result and a copy of it into `out`."""
    for node in list(graph.nodes):
        plain = _without_out(node.target) if mutates(node) else None
        out = node.kwargs.get("out")
        if plain is None or not isinstance(out, fx.Node) or out.meta["val"].shape != node.meta["val"].shape:
            continue
        named = {name: value for name, value in node.kwargs.items() if name != "out"}
        given, fakes = fx.node.map_arg((node.args, named), lambda n: n.meta["val"])
        with graph.inserting_before(node):
            result = graph.call_function(plain, node.args, named)
        with fake_mode(graph), torch.no_grad():
            result.meta = {**node.meta, "val": plain(*given, **fakes)}
        node.target, node.args, node.kwargs = aten.copy_.default, (out, result), {}


def _without_out(target: Any) -> Any:
    """The overload that returns what this one writes into `out`. None if there is none."""
    *inputs, last = target._schema.arguments
    if last.name != "out" or not last.is_out:
        return None
    wanted = [(a.name, str(a.type)) for a in inputs]
    overloads = [getattr(target.overloadpacket, name) for name in target.overloadpacket.overloads()]
    found = [o for o in overloads if [(a.name, str(a.type)) for a in o._schema.arguments] == wanted]
    return next((o for o in found if not o._schema.is_mutable), None)


def _resized_by_views(graph: fx.Graph, where: Memory) -> None:
    """Replace each call that changes the sizes of an intermediate tensor by a view, which all later nodes read."""
    given = {s for node in graph.nodes if node.op in ("placeholder", "get_attr") for s in where.of(node)}
    now: dict[int, fx.Node] = {}
    for node in graph.nodes:
        resizes = node.target in METADATA and where.of(node).isdisjoint(given)
        node.args, node.kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: now.get(where.objects.get(n, -1), n)
        )
        if resizes:
            node.target = METADATA[node.target]
            now[where.objects[node]] = node


def _gradients(graph: fx.Graph, where: Memory) -> set[int]:
    """The storages of tensors through which a gradient may flow to an input or a parameter."""
    found: set[int] = set()
    for node in graph.nodes:
        is_given = node.op == "placeholder" or (node.op == "get_attr" and isinstance(attribute(node), nn.Parameter))
        reads = [n for n in node.all_input_nodes if n.target is not aten.detach.default and _is_real(n)]
        if is_given or any(not where.of(n).isdisjoint(found) for n in reads):
            found |= {s for n in (node, *written(node)) if _is_real(n) for s in where.of(n)}
    return found


def _is_real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()


def _drop_idle_copies(graph: fx.Graph, where: Memory, gradients: set[int]) -> None:
    """Remove copies of a tensor to where it lies already: `x[0] += 1` makes one after it has added.

    Autograd would take such a copy for a change of a tensor that it has saved.
    """

    def place(node: Any) -> Any:
        if mutates(node) and list(written(node)) == [node.args[0]]:
            return place(node.args[0])
        is_idle = node.target is aten.detach.default and where.of(node).isdisjoint(gradients)
        if is_idle or not where.is_view(node):
            return place(node.args[0]) if is_idle else node.target if node.op == "get_attr" else node
        return node.target, place(node.args[0]), node.args[1:], node.kwargs

    for node in list(graph.nodes):
        if node.target is aten.copy_.default and place(node.args[0]) == place(node.args[1]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


class _Functionalisation:
    """Walks a graph in order and tracks which node holds the present value of each original node."""

    def __init__(self, graph: fx.Graph, where: Memory, gradients: set[int]) -> None:
        self.graph, self.memory, self.mode, self.gradients = graph, where, fake_mode(graph), gradients
        self.source: dict[fx.Node, fx.Node] = {}
        """For each view, and each result of a write: the tensor that it is a view of, or that was written."""
        for node in graph.nodes:
            is_view = where.is_view(node) and not self._is_new_part(node)
            if is_view or (mutates(node) and node in where.objects and list(written(node)) == [node.args[0]]):
                self.source[node] = node.args[0]
        self.scatters: dict[fx.Node, Scatter | None] = {}
        self.writes = self._expressible()
        self.present: dict[fx.Node, fx.Node] = {}
        self.views: dict[int, list[fx.Node]] = {}
        """The views of each storage up to now."""
        self.stale: set[fx.Node] = set()

    def _is_new_part(self, node: fx.Node) -> bool:
        """Whether the node is one of several results of an operator, each with memory of its own."""
        return node.target is operator.getitem and not self.memory.is_view(node.args[0])  # type: ignore[arg-type]

    def _expressible(self) -> set[fx.Node]:
        """The writes that can be new tensors, together with all others into the same storage."""
        writes: dict[int, list[fx.Node]] = {}
        for node in self.graph.nodes:
            for target in written(node):
                for storage in self.memory.of(target):
                    writes.setdefault(storage, []).append(node)
        sharing: dict[int, list[fx.Node]] = {storage: [] for storage in writes}
        for node, storages in self.memory.storages.items():
            for storage in storages & writes.keys():
                sharing[storage].append(node)
        return {node for s, nodes in writes.items() if self._can_be(nodes, sharing[s]) for node in nodes}

    def _can_be(self, writes: list[fx.Node], sharing: list[fx.Node]) -> bool:
        first = next((node for node in sharing if node in self.memory.objects), sharing[0])
        if first.op != "call_function" or first in self.source or first not in self.memory.objects:
            return False
        if any(node not in self.source and node not in (first, first.args[0]) for node in sharing if first.args):
            return False
        has_order = memory_order(self.memory.values[first]) is not None
        return has_order and all(self._has_scatters(write, first) for write in writes)

    def _has_scatters(self, write: fx.Node, first: fx.Node) -> bool:
        if write not in self.source or _functional(write) is None:
            return False
        path = self._path(self.source[write])
        stops = any(node.target is aten.detach.default or not _is_real(node) for node in path)
        if stops and not self.memory.of(first).isdisjoint(self.gradients):
            return False  # a new tensor would take the gradient away
        for view in path[:-1]:
            if not _is_several(view) and view not in self.scatters:
                self.scatters[view] = scatter(view, self.memory)
        return all(self.scatters[view] for view in path[:-1] if not _is_several(view))

    def _path(self, node: fx.Node) -> list[fx.Node]:
        """The node, what it is a view of, and so on to the tensor that was made. Results of writes are left out."""
        path = [node]
        while path[-1] in self.source:
            path.append(self.source[path[-1]])
        return [n for n in path if not mutates(n)]

    def run(self) -> None:
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), self._now)
                if node in self.writes:
                    self._write(node)
                elif node in self.source:
                    for storage in self.memory.of(node):
                        self.views.setdefault(storage, []).append(node)
        for node in reversed(self.graph.nodes):
            if node in self.writes:
                self.graph.erase_node(node)

    def _now(self, node: fx.Node) -> fx.Node:
        """The present value of a node. A view is made again if its source has changed since."""
        if node in self.writes:
            return self._now(self.source[node])
        if node in self.stale:
            self.stale.discard(node)
            base = self._now(self.source[node])
            self.present[node] = self._call(node.target, base, *node.args[1:], like=node, **node.kwargs)
        return self.present.get(node, node)

    def _write(self, write: fx.Node) -> None:
        def call(target: Any, *args: Any) -> fx.Node:
            return self._call(target, *args, like=write)

        path = self._path(self.source[write])
        target, base = path[0], path[-1]
        value = self._new_value(write)
        kind = write.meta["val"].dtype
        value = value if value.meta["val"].dtype == kind else call(aten.to.dtype, value, kind)
        written_value = value
        for i, view in enumerate(path[:-1]):
            if not _is_several(view):
                source = next(n for n in path[i + 1 :] if not _is_several(n))
                undo = self.scatters[view]
                assert undo is not None
                value = undo(call, self._now(source), value)
        restored = with_strides(value, self.memory.values[base], call)
        assert restored is not None
        self.present[base] = restored
        self.stale |= {view for s in self.memory.of(base) for view in self.views.get(s, ())}
        if same_strides(written_value.meta["val"], self.memory.values[target]) and target is not base:
            self.stale.discard(target)
            self.present[target] = written_value

    def _new_value(self, write: fx.Node) -> fx.Node:
        """What is written, before a cast. Autograd knows no gradient of `aten.copy`."""
        if write.target is not aten.copy_.default:
            return self._call(_functional(write), *write.args, like=write, **write.kwargs)
        source: Any = write.args[1]
        new: torch.Tensor = write.meta["val"]
        if source.meta["val"].shape != new.shape:
            source = self._call(aten.expand_as.default, source, write.args[0], like=write)
        if source.meta["val"].dtype != new.dtype:
            return self._call(aten.to.dtype, source, new.dtype, like=write)
        return self._call(aten.clone.default, source, like=write)

    def _call(self, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        given, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta = {**like.meta, "val": target(*given, **named)}
        return node


def _is_several(node: fx.Node) -> bool:
    """Whether the node gives a list of views, as `split` does."""
    return not isinstance(node.meta.get("val"), torch.Tensor)


def _functional(write: fx.Node) -> Any:
    """The operator without a write that computes the same, up to a cast; None if there is none."""
    assert isinstance(write.target, torch._ops.OpOverload)
    name = write.target.overloadpacket.__name__
    if name in ("set_", "resize_", "resize_as_"):  # they change which memory the tensor shows
        return None
    plain = name.replace("__i", "__", 1) if name.startswith("__i") else name.removesuffix("_")
    return getattr(getattr(aten, plain, None), write.target._overloadname, None)
