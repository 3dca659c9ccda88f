"""A pass of `normalise`: writes into intermediate tensors become new tensors."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import mutates, op_name
from neuron_attn_rewrite.graph.writes import MAY_COPY

aten = torch.ops.aten


def functionalise(module: fx.GraphModule) -> None:
    """Replace writes into intermediate tensors by new tensors, so that no value changes after it is computed.

    Writes into inputs and buffers (caches) are effects of the model and stay. Writes through a view whose inverse is
    not in `SCATTERS` stay as well.
    """
    if any(mutates(node) for node in module.graph.nodes):
        _Functionalisation(module.graph).run()


SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.detach.default: None,
    aten.alias.default: None,
    **dict.fromkeys((aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other), None),
}
"""For each view the operator that writes it back into its base; None if the view has all elements of the base."""


class _Functionalisation:
    """Walks a graph in order and tracks which node holds the present value of each original node."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.base: dict[fx.Node, fx.Node] = {}
        self.present: dict[fx.Node, fx.Node] = {}
        self.stale: set[fx.Node] = set()
        self.kept: set[fx.Node] = set()
        """Tensors with a write that stays. All later writes into them stay as well."""

    def run(self) -> None:
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                originals = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
                node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), self._now)
                alias = _first_alias(node)
                is_part = node.target is operator.getitem and originals in self.base  # of split or unbind
                if originals is None or (alias is None and not is_part):
                    continue
                if is_part or not alias.is_write:
                    self.base[node] = originals
                elif self._write(node, originals):
                    self.graph.erase_node(node)
                else:
                    self.kept.add(self._path(originals)[-1])
                    self.base[node] = originals

    def _now(self, node: fx.Node) -> fx.Node:
        """The present value of a node. A view is made again if its base has changed since."""
        if node in self.stale:
            self.stale.discard(node)
            base = self._now(self.base[node])
            view = self.graph.node_copy(node)
            view.args = (base, *node.args[1:])
            self.present[node] = view
        return self.present.get(node, node)

    def _path(self, node: fx.Node) -> list[fx.Node]:
        path = [node]
        while path[-1] in self.base:
            path.append(self.base[path[-1]])
        return path

    def _write(self, write: fx.Node, target: fx.Node) -> bool:
        path = self._path(target)
        functional = _functional(write)
        known = all(view.target in SCATTERS for view in path[:-1])
        if functional is None or path[-1].op != "call_function" or path[-1] in self.kept or not known:
            return False
        value = self._call(functional, write.args, write.kwargs, like=write)
        self.present[write] = self.present[target] = value
        write.replace_all_uses_with(value)
        for view, base in itertools.pairwise(path):
            scatter = SCATTERS[view.target]
            if scatter is not None:
                value = self._call(scatter, (self._now(base), value, *view.args[1:]), view.kwargs, like=base)
            self.present[base] = value
        self.stale |= {v for v in self.base if self._path(v)[-1] is path[-1]} - {*path, write}
        return True

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = dict(like.meta)
        return node


def _first_alias(node: fx.Node) -> Any:
    """The alias annotation of the first argument; None if the result has memory of its own."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.arguments:
        return None
    alias = node.target._schema.arguments[0].alias_info
    if alias is not None and op_name(node) in MAY_COPY and isinstance(node.args[0], fx.Node):
        given: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        source, found = given[0][0], node.target(*given[0], **given[1])
        return alias if found.untyped_storage()._cdata == source.untyped_storage()._cdata else None
    return alias


def _functional(write: fx.Node) -> Any:
    """The operator without a write that computes the same; None if there is none with the same dtype."""
    assert isinstance(write.target, torch._ops.OpOverload)
    name = write.target.overloadpacket.__name__
    plain = name.replace("__i", "__", 1) if name.startswith("__i") else name.removesuffix("_")
    packet = getattr(aten, plain, None)
    found = getattr(packet, write.target._overloadname, None)
    if found is None:
        return None
    args, kwargs = fx.node.map_arg((write.args, write.kwargs), lambda n: n.meta.get("val"))
    kwargs = {k: "cpu" if isinstance(v, torch.device) else v for k, v in kwargs.items()}
    return found if found(*args, **kwargs).dtype == write.meta["val"].dtype else None
