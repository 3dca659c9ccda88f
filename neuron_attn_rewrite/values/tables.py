"""Evaluating a piece of the graph for *all* values of its 0/1 inputs at once.

Constants are computed exactly. A tensor that depends on a 0/1 tensor is carried as a `Table`: each element's value
if its cell is 0, its value if it is 1, and which cell that is. Data movement moves tables, elementwise operators
combine them, and an element that really depends on two cells becomes unknown. So what a table says holds for every
input, not for a sample.

The 0/1 tensors are every bool tensor whose origin can't be followed (an input, or a comparison of activations), where
nothing is assumed; and integer inputs with `mask` in their name, which by the contract of Hugging Face's
`attention_mask` hold only 0 and 1. The second is an assumption, and is reported as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph.nodes import draws, op_name, tensor, values_read
from neuron_attn_rewrite.values.regions import Region, restrict

MOST_CELLS = 2**24
CONSTANT, UNKNOWN = -1, -2
"""Values of `Table.cell` that are not the number of a cell."""

ELEMENTWISE = frozenset(
    """
    add sub rsub mul div neg abs pow exp log sqrt rsqrt sign reciprocal clamp clamp_min clamp_max minimum maximum
    floor_divide remainder eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or
    bitwise_not bitwise_xor __and__ __or__ __xor__ where masked_fill to _to_copy type_as nan_to_num isinf isnan copy
    """.split()
)
MOVEMENT = frozenset(
    """
    view reshape _unsafe_view flatten unflatten unsqueeze squeeze expand expand_as broadcast_to permute transpose
    t mT movedim slice select narrow index index_select gather cat stack clone contiguous alias detach
    lift_fresh_copy flip roll repeat repeat_interleave constant_pad_nd diagonal tile
    """.split()
)


class Kind(IntEnum):
    """What a tensor can depend on, weakest claim last."""

    CONSTANT = 0
    CELLS = 1
    OPAQUE = 2


@dataclass(frozen=True)
class Leaf:
    """A 0/1 tensor at which a table ends. Its cells are numbered from `first`, row by row."""

    node: fx.Node
    first: int
    assumed: bool
    """Whether 0/1 is a contract (an integer input) instead of a fact (a bool tensor)."""


@dataclass(frozen=True)
class Table:
    """Elements as functions of one cell each."""

    lo: Tensor
    hi: Tensor
    cell: Tensor
    """Int32, broadcasts to `lo`: the one cell on which an element can depend, `CONSTANT` for none, `UNKNOWN` for
    several."""

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """`lo`, `hi` and `cell`, of one shape."""
        return self.lo, self.hi, self.cell.expand(self.lo.shape)

    def move(self, apply: Any) -> Table:
        """The same data movement on all three tensors."""
        return Table(*map(apply, self.parts))


@dataclass(frozen=True)
class Opaque:
    """A value of which nothing is known, and the node that made it so."""

    cause: fx.Node


@dataclass
class Evaluator:
    """Values of the nodes of one graph, computed on demand and kept."""

    module: fx.GraphModule
    changed: frozenset[fx.Node]
    """What some node writes into: `graph.Writes.changed`."""
    leaves: list[Leaf] = field(default_factory=list)
    _kinds: dict[fx.Node, Kind] = field(default_factory=dict)
    _values: dict[fx.Node, Any] = field(default_factory=dict)
    _parts: dict[tuple[fx.Node, Region], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.module.graph.nodes:
            self._kinds[node] = Kind.OPAQUE if node in self.changed else self._kind(node)

    def constant(self, value: Any) -> float | None:
        """A number: a literal, or the single element of a tensor that depends on constants alone."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, fx.Node) and self._kinds[value] is Kind.CONSTANT:
            found = self.value(value)
            if isinstance(found, Tensor) and found.numel() == 1 and found.dtype != torch.bool:
                return float(found)
        return None

    def table(self, node: fx.Node, region: Region | None = None) -> Table | Opaque:
        """The node's value as a table, whole or restricted to a region."""
        value = self.value(node, region)
        return value if isinstance(value, Opaque) else _as_table(value)

    def forget_regions(self) -> None:
        """Free everything that was computed for a part of a tensor."""
        self._parts.clear()

    def cause(self, node: fx.Node) -> fx.Node:
        """The first node on the way back from an opaque node whose own inputs are all known."""
        while True:
            opaque = [n for n in node.all_input_nodes if self._kinds[n] is Kind.OPAQUE]
            if not opaque:
                return node
            node = opaque[0]

    def leaf(self, node: fx.Node) -> Leaf:
        return next(leaf for leaf in self.leaves if leaf.node is node)

    def leaf_of(self, cell: int) -> Leaf:
        return max((leaf for leaf in self.leaves if leaf.first <= cell), key=lambda leaf: leaf.first)

    def value(self, node: fx.Node, region: Region | None = None) -> Any:
        """A tensor (constant), a `Table`, an `Opaque`, or a plain Python value."""
        if region is None:
            if node not in self._values:
                self._values[node] = self._compute(node)
            return self._values[node]
        if (node, region) not in self._parts:
            self._parts[node, region] = self._compute_part(node, region)
        return self._parts[node, region]

    def _compute_part(self, node: fx.Node, region: Region) -> Any:
        """Compute what the region needs and nothing else; where that is not known, all of it."""
        inner = None if node in self._values or self._kinds[node] is Kind.OPAQUE else restrict(node, region)
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
            held = _attribute(self.module, node)
            no_value = isinstance(held, Tensor) and held.is_meta
            return Kind.OPAQUE if no_value or isinstance(held, torch.nn.Parameter) else Kind.CONSTANT
        if node.op != "call_function" or draws(node):
            return Kind.OPAQUE
        kind = max((self._kinds[n] for n in values_read(node)), default=Kind.CONSTANT)
        return Kind.CELLS if kind is Kind.OPAQUE and _is_bool(node) and _is_small(node) else kind

    def _compute(self, node: fx.Node) -> Any:
        kind = self._kinds[node]
        if kind is Kind.OPAQUE:
            return Opaque(node)
        if node.op == "placeholder":
            return self._new_leaf(node)
        if node.op == "get_attr":
            return _attribute(self.module, node)
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
        tables = [v for v in pytree.tree_leaves((args, kwargs), is_leaf=_is_table) if isinstance(v, Table)]
        with torch.no_grad():
            if not tables:
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if name in ELEMENTWISE:
                return _elementwise(node, tables, args, kwargs)
            if name in MOVEMENT:
                return _movement(node, name, args, kwargs)
        return Opaque(node)

    def _new_leaf(self, node: fx.Node) -> Table:
        value = tensor(node)
        assert value is not None
        first = self.leaves[-1].first + _numel(self.leaves[-1].node) if self.leaves else 0
        self.leaves.append(Leaf(node, first, assumed=value.dtype != torch.bool))
        cell = torch.arange(first, first + value.numel(), dtype=torch.int32).reshape(tuple(value.shape))
        return Table(torch.zeros(cell.shape, dtype=value.dtype), torch.ones(cell.shape, dtype=value.dtype), cell)


def equal(one: Table, two: Table) -> bool:
    """Whether two tables that broadcast to each other say the same for all inputs."""
    return all(bool((a == b).all()) for a, b in zip(one.parts, two.parts, strict=True))


def _narrowed(value: Any, region: Region) -> Any:
    if isinstance(value, Table):
        return value.move(lambda t: t.narrow(region.dim, region.start, region.length))
    return value.narrow(region.dim, region.start, region.length) if isinstance(value, Tensor) else value


def _is_table(value: Any) -> bool:
    return isinstance(value, Table)


def _is_bool(node: fx.Node) -> bool:
    value = tensor(node)
    return value is not None and value.dtype == torch.bool


def _is_zero_one(node: fx.Node) -> bool:
    value = tensor(node)
    if value is None:
        return False
    named = "mask" in node.name and not value.is_floating_point() and not value.is_complex()
    return value.dtype == torch.bool or named


def _is_sized(node: fx.Node) -> bool:
    """Whether all sizes are numbers: a table of symbols can't be computed."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return all(isinstance(size, int) for size in value.shape)
    return not isinstance(value, torch.SymInt)


def _is_small(node: fx.Node) -> bool:
    """Whether a cell for each element is affordable; a larger mask is not one cell for each key anyway."""
    return _numel(node) <= MOST_CELLS


def _numel(node: fx.Node) -> int:
    value = tensor(node)
    assert value is not None
    return value.numel()


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    path, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(path), name)


def _shape_stand_in(node: fx.Node) -> Any:
    """A tensor of the right shape and dtype for operators that look at nothing else."""
    value = tensor(node)
    if value is None:
        return torch.device("cpu")
    return torch.empty((), dtype=value.dtype).expand(tuple(value.shape))


def _as_table(value: Any) -> Table:
    if isinstance(value, Table):
        return value
    value = torch.as_tensor(value)
    return Table(value, value, torch.tensor(CONSTANT, dtype=torch.int32))


def _elementwise(node: fx.Node, tables: Sequence[Table], args: Any, kwargs: Any) -> Table:
    """Run the operator for every combination of low and high operands, then see on which operands it depends."""
    outcomes: dict[tuple[bool, ...], Tensor] = {}
    for choice in itertools.product((False, True), repeat=len(tables)):
        picked = {id(t): t.hi if high else t.lo for t, high in zip(tables, choice, strict=True)}
        picked_args, picked_kwargs = pytree.tree_map(
            lambda v, picked=picked: picked[id(v)] if isinstance(v, Table) else v, (args, kwargs), is_leaf=_is_table
        )
        outcomes[choice] = node.target(*picked_args, **picked_kwargs)  # type: ignore[operator]
    lo, hi = outcomes[(False,) * len(tables)], outcomes[(True,) * len(tables)]
    if len(tables) == 1 and not (tables[0].cell == UNKNOWN).any():
        return Table(lo, hi, tables[0].cell)
    cell = torch.full(lo.shape, CONSTANT, dtype=torch.int32)
    for i, table in enumerate(tables):
        depends = torch.zeros(lo.shape, dtype=torch.bool)
        for choice, outcome in outcomes.items():
            if not choice[i]:
                depends |= _differs(outcome, outcomes[(*choice[:i], True, *choice[i + 1 :])])
        if table.lo.dtype != torch.bool:
            depends |= table.cell == UNKNOWN  # the two values of an unknown number are not all it can be
        clash = depends & (cell != CONSTANT) & (cell != table.cell)
        cell = torch.where(depends, table.cell, cell).masked_fill_(clash, UNKNOWN)
    unknown = cell == UNKNOWN
    if lo.dtype == torch.bool and unknown.any():
        lo, hi = lo & ~unknown, hi | unknown
    return Table(lo, hi, cell)


def _differs(a: Tensor, b: Tensor) -> Tensor:
    different = a != b
    return different & ~(a.isnan() & b.isnan()) if a.is_floating_point() else different


def _movement(node: fx.Node, name: str, args: Any, kwargs: Any) -> Table | Opaque:
    """Run the operator on the low values, the high values and the cells."""
    if name in ("slice_scatter", "select_scatter"):
        whole, part = (_as_table(v).parts for v in args[:2])
        return Table(*(node.target(w, p, *args[2:], **kwargs) for w, p in zip(whole, part, strict=True)))  # type: ignore[operator]
    if name in ("cat", "stack"):
        pieces = zip(*(_as_table(v).parts for v in args[0]), strict=True)
        return Table(*(node.target(list(p), *args[1:], **kwargs) for p in pieces))  # type: ignore[operator]
    moved = args[0]
    rest = pytree.tree_leaves((args[1:], kwargs), is_leaf=_is_table)
    if not isinstance(moved, Table) or any(isinstance(v, Table) for v in rest):
        return Opaque(node)

    def apply(t: Tensor, *given: Any) -> Tensor:
        return node.target(t, *given, **kwargs)  # type: ignore[operator, no-any-return]

    if name == "constant_pad_nd":
        lo, hi, cell = moved.parts
        return Table(apply(lo, *args[1:]), apply(hi, *args[1:]), apply(cell, args[1], CONSTANT))
    return moved.move(lambda t: apply(t, *args[1:]))
