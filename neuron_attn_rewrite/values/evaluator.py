"""The value of each node of a graph: a constant, a table over 0/1 inputs, or unknown.

Values are computed on demand. What depends on constants alone is a tensor. What depends on a 0/1 tensor is a
`CellTable`, which holds for all inputs (`values/cells.py`). Everything else is `Opaque`.

For `mask = attention_mask[:, None, None, :].bool() & causal`, where `causal` comes from `torch.arange`:

    causal            a bool tensor
    attention_mask    a table in which each element is its own cell
    mask              a table: `lo` is all False, `hi` is `causal`, the cell of element [b, 0, i, j] is (b, j)

Two kinds of tensors are 0/1 tensors:

* Every bool tensor whose origin can't be followed: an input, or a comparison of activations. Nothing is assumed.
* Each integer input with `mask` in its name. By the contract of `attention_mask` in Hugging Face models, it holds
  only 0 and 1. This is an assumption, and the report names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph.held import read_value
from neuron_attn_rewrite.graph.nodes import attribute, draws, op_name, tensor, values_read
from neuron_attn_rewrite.values.cells import ELEMENTWISE, MOVEMENT, CellTable, as_table, elementwise, is_table, movement
from neuron_attn_rewrite.values.regions import Region, restrict

MOST_CELLS = 2**24
"""A larger 0/1 tensor is not followed."""


class Kind(IntEnum):
    """What a tensor depends on. A result has the largest kind of its inputs."""

    CONSTANT = 0
    """Constants alone."""
    CELLS = 1
    """0/1 tensors."""
    OPAQUE = 2
    """Anything else."""


@dataclass(frozen=True)
class Leaf:
    """A 0/1 tensor on which tables depend. Its cells are numbered from `first`, row by row."""

    node: fx.Node
    first: int
    assumed: bool
    """Whether it is an integer input that is assumed to hold only 0 and 1. False for a bool tensor."""


@dataclass(frozen=True)
class Opaque:
    """An unknown value, and the node at which it became unknown."""

    cause: fx.Node


@dataclass
class Evaluator:
    """The values of the nodes of one graph. Each is computed once."""

    module: fx.GraphModule
    changed: frozenset[fx.Node]
    """Tensors that some node writes into (`graph.writes.Writes.changed`): their values are unknown."""
    leaves: list[Leaf] = field(default_factory=list)
    _kinds: dict[fx.Node, Kind] = field(default_factory=dict)
    _values: dict[fx.Node, Any] = field(default_factory=dict)
    _parts: dict[tuple[fx.Node, Region], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.module.graph.nodes:
            self._kind_of(node)

    def _kind_of(self, node: fx.Node) -> Kind:
        if node not in self._kinds:
            self._kinds[node] = Kind.OPAQUE if node in self.changed else self._kind(node)
        return self._kinds[node]

    def constant(self, value: Any) -> float | None:
        """A number: a literal, or the single element of a tensor that depends on constants alone."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, fx.Node) and self._kind_of(value) is Kind.CONSTANT:
            like = tensor(value)
            if like is not None and like.numel() == 1 and like.dtype != torch.bool:
                return float(self.value(value))
        return None

    def table(self, node: fx.Node, region: Region | None = None) -> CellTable | Opaque:
        """The node's value as a table, whole or restricted to a region."""
        value = self.value(node, region)
        return value if isinstance(value, Opaque) else as_table(value)

    def is_opaque(self, node: fx.Node) -> bool:
        """Whether the value depends on anything else than constants and 0/1 tensors. Nothing is computed."""
        return self._kind_of(node) is Kind.OPAQUE

    def forget_regions(self) -> None:
        """Free all values that were computed for regions."""
        self._parts.clear()

    def cause(self, node: fx.Node) -> fx.Node:
        """Follow the unknown inputs of an opaque node back to the first node whose inputs are all known."""
        while True:
            opaque = [n for n in node.all_input_nodes if self._kind_of(n) is Kind.OPAQUE]
            if not opaque:
                return node
            node = opaque[0]

    def leaf(self, node: fx.Node) -> Leaf:
        """The 0/1 tensor that a node is."""
        return next(leaf for leaf in self.leaves if leaf.node is node)

    def leaf_of(self, cell: int) -> Leaf:
        """The 0/1 tensor to which a cell belongs."""
        return max((leaf for leaf in self.leaves if leaf.first <= cell), key=lambda leaf: leaf.first)

    def value(self, node: fx.Node, region: Region | None = None) -> Any:
        """A tensor (constant), a `CellTable`, an `Opaque`, or a plain Python value."""
        if region is None:
            if node not in self._values:
                self._values[node] = self._compute(node)
            return self._values[node]
        if (node, region) not in self._parts:
            self._parts[node, region] = self._compute_part(node, region)
        return self._parts[node, region]

    def _compute_part(self, node: fx.Node, region: Region) -> Any:
        """Compute only what the region needs. If that is not known, compute the whole value and cut the region out."""
        inner = None if node in self._values or self._kind_of(node) is Kind.OPAQUE else restrict(node, region)
        if inner is None:
            return _narrowed(self.value(node), region)
        values = {n: self.value(n, inner.regions.get(n)) for n in node.all_input_nodes if n not in inner.stand_ins}
        values |= {n: _shape_stand_in(n) for n in inner.stand_ins}
        opaque = next((v for v in values.values() if isinstance(v, Opaque)), None)
        result = opaque or self._apply(node, op_name(node), values, inner.args)
        if isinstance(result, Opaque):
            return _narrowed(self.value(node), region)
        return result

    def _kind(self, node: fx.Node) -> Kind:
        if not _is_sized(node):
            return Kind.OPAQUE
        if node.op == "placeholder":
            return Kind.CELLS if _is_zero_one(node) and _is_small(node) else Kind.OPAQUE
        if node.op == "get_attr":
            kept = attribute(node)
            no_value = isinstance(kept, Tensor) and kept.is_meta
            return Kind.OPAQUE if no_value or isinstance(kept, torch.nn.Parameter) else Kind.CONSTANT
        if node.op != "call_function" or draws(node):
            return Kind.OPAQUE
        kind = max((self._kind_of(n) for n in values_read(node)), default=Kind.CONSTANT)
        return Kind.CELLS if kind is Kind.OPAQUE and _is_bool(node) and _is_small(node) else kind

    def _compute(self, node: fx.Node) -> Any:
        kind = self._kind_of(node)
        if kind is Kind.OPAQUE:
            return Opaque(node)
        if node.op == "placeholder":
            return self._new_leaf(node)
        if node.op == "get_attr":
            return read_value(node)
        if op_name(node) == "getattr":
            return torch.device("cpu")
        name = op_name(node)
        needs = values_read(node)
        values = {n: self.value(n) if n in needs else _shape_stand_in(n) for n in node.all_input_nodes}
        opaque = next((v for v in values.values() if isinstance(v, Opaque)), None)
        result = opaque or self._apply(node, name, values)
        return self._new_leaf(node) if isinstance(result, Opaque) and _is_bool(node) else result

    def _apply(self, node: fx.Node, name: str, values: dict[fx.Node, Any], given: Any = None) -> Any:
        args, kwargs = fx.node.map_arg((given or node.args, node.kwargs), lambda n: values[n])
        tables = [v for v in pytree.tree_leaves((args, kwargs), is_leaf=is_table) if isinstance(v, CellTable)]
        with torch.no_grad():
            if not tables:
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if name in ELEMENTWISE:
                return elementwise(node, tables, args, kwargs)
            if name in MOVEMENT:
                return movement(node, name, args, kwargs) or Opaque(node)
        return Opaque(node)

    def _new_leaf(self, node: fx.Node) -> CellTable:
        value = tensor(node)
        assert value is not None
        first = self.leaves[-1].first + _numel(self.leaves[-1].node) if self.leaves else 0
        self.leaves.append(Leaf(node, first, assumed=value.dtype != torch.bool))
        cell = torch.arange(first, first + value.numel(), dtype=torch.int32).reshape(tuple(value.shape))
        return CellTable(torch.zeros(cell.shape, dtype=value.dtype), torch.ones(cell.shape, dtype=value.dtype), cell)


def _narrowed(value: Any, region: Region) -> Any:
    if isinstance(value, CellTable):
        return value.move(lambda t: t.narrow(region.dim, region.start, region.length))
    return value.narrow(region.dim, region.start, region.length) if isinstance(value, Tensor) else value


def _is_bool(node: fx.Node) -> bool:
    value = tensor(node)
    return value is not None and value.dtype == torch.bool


def _is_zero_one(node: fx.Node) -> bool:
    value = tensor(node)
    return value is not None and (value.dtype == torch.bool or is_mask_input(node))


NOT_BINARY = "not_binary"
"""The key in `node.meta` of an input whose example holds other numbers than 0 and 1."""


def is_mask_input(node: fx.Node) -> bool:
    """Whether this is an integer input with `mask` in its name. By contract it holds only 0 and 1.

    The contract is not assumed of an input whose own example breaks it (`note_examples`).
    """
    value = tensor(node)
    if node.op != "placeholder" or value is None or value.is_floating_point() or value.is_complex():
        return False
    return "mask" in node.name and NOT_BINARY not in node.meta


def note_examples(graph: fx.Graph, inputs: Sequence[Any]) -> None:
    """Mark the inputs whose example value breaks the contract of `is_mask_input`.

    Args:
        graph: the graph. Only the `meta` of its placeholders is changed.
        inputs: a value for each placeholder.
    """
    for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        known = isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta
        if known and is_mask_input(node) and not bool(((value == 0) | (value == 1)).all()):
            node.meta[NOT_BINARY] = True


def _is_sized(node: fx.Node) -> bool:
    """Whether all sizes are numbers. A tensor of symbolic sizes can't be computed."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return all(isinstance(size, int) for size in value.shape)
    return not isinstance(value, torch.SymInt)


def _is_small(node: fx.Node) -> bool:
    """Whether there is memory for a cell for each element."""
    return _numel(node) <= MOST_CELLS


def _numel(node: fx.Node) -> int:
    value = tensor(node)
    assert value is not None
    return value.numel()


def _shape_stand_in(node: fx.Node) -> Any:
    """A tensor of the right shape and dtype, for operators that read nothing else."""
    value = tensor(node)
    if value is None:
        return torch.device("cpu")
    return torch.empty((), dtype=value.dtype).expand(tuple(value.shape))
