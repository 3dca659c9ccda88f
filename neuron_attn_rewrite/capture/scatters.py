"""The inverse of each view: how a new value of the view becomes a new value of what it was taken from."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from neuron_attn_rewrite.graph.memory import Memory
from neuron_attn_rewrite.graph.nodes import PERMUTES, arguments, op_name

aten = torch.ops.aten

Call: TypeAlias = Callable[..., fx.Node]
"""Makes a node of the graph from an operator and its arguments."""
Scatter: TypeAlias = Callable[[Call, fx.Node, fx.Node], fx.Node]
"""From a way to make nodes, the source and the new value of the view: the new source."""

RESHAPES = frozenset("view reshape view_as reshape_as flatten unflatten unsqueeze squeeze _reshape_alias".split())
SPLITS = frozenset("split chunk tensor_split split_with_sizes".split())


def scatter(view: fx.Node, where: Memory) -> Scatter | None:
    """The inverse of a view, or of a part of `split` or `unbind` into what was split; None if it is not known."""
    name, source = op_name(view), view.args[0]
    if view.target is operator.getitem:
        assert isinstance(source, fx.Node)
        return _part(view, source, where)
    assert isinstance(source, fx.Node)
    new, old = where.values[view], where.values[source]
    if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor) or old.is_complex() or old.is_neg():
        return None
    if _geometry(new) == _geometry(old):
        return lambda call, base, value: value
    values = arguments(view)
    if name == "slice":
        at = (values["dim"], values["start"], values["end"], values["step"])
        return lambda call, base, value: call(aten.slice_scatter.default, base, value, *at)
    if name == "select":
        place = (values["dim"], values["index"])
        return lambda call, base, value: call(aten.select_scatter.default, base, value, *place)
    if name == "diagonal":
        diagonal = (values["offset"], values["dim1"], values["dim2"])
        return lambda call, base, value: call(aten.diagonal_scatter.default, base, value, *diagonal)
    if name == "narrow" and all(isinstance(values[n], int) for n in ("start", "length")):
        return _slice(values["dim"], values["start"] % old.shape[values["dim"]], values["length"])
    if name in RESHAPES and all(isinstance(size, int) for size in old.shape):
        return lambda call, base, value: call(aten.reshape.default, value, list(old.shape))
    if name in PERMUTES:
        order = _permutation(view, new)
        back = sorted(range(len(order)), key=order.__getitem__)
        return lambda call, base, value: call(aten.permute.default, value, back)
    if name == "view.dtype" and new.element_size() == old.element_size():
        return lambda call, base, value: call(aten.view.dtype, value, old.dtype)
    return None


def _part(view: fx.Node, whole: fx.Node, where: Memory) -> Scatter | None:
    given: Any = view.args[1]
    values, parts, source = arguments(whole), where.values[whole], where.values[whole.args[0]]  # type: ignore[index]
    i = given % len(parts)
    if op_name(whole) == "unbind":
        return lambda call, base, value: call(aten.select_scatter.default, base, value, values["dim"], i)
    if op_name(whole) not in SPLITS or not all(isinstance(n, int) for p in parts for n in p.shape):
        return None
    dim = values["dim"] % source.dim()
    return _slice(dim, sum(part.shape[dim] for part in parts[:i]), parts[i].shape[dim])


def _slice(dim: int, start: int, length: int) -> Scatter:
    return lambda call, base, value: call(aten.slice_scatter.default, base, value, dim, start, start + length)


def _permutation(view: fx.Node, new: torch.Tensor) -> list[int]:
    probe = torch.empty(*range(new.dim()), device="meta")
    return list(view.target(probe, *view.args[1:], **view.kwargs).shape)  # type: ignore[operator]


def _geometry(value: torch.Tensor) -> tuple[Any, ...]:
    """What decides which element lies where, and what its bits mean."""
    sizes = tuple(map(str, (*value.shape, *value.stride(), value.storage_offset())))
    return (value.dtype, value.is_neg(), value.is_conj(), value.dim(), *sizes)
