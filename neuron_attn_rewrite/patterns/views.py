"""Data movement: what each operator does to the dims of its tensor, forwards and backwards."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph.nodes import PERMUTES, arguments, dtype, op_name, permutation, shape, tensor
from neuron_attn_rewrite.graph.sizes import is_number
from neuron_attn_rewrite.patterns.axes import Dims, permute, regroup, split
from neuron_attn_rewrite.values.evaluator import Evaluator

RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "_reshape_alias"}
EXPANDS = {"expand", "expand_as", "broadcast_to"}
MOVES = RESHAPES | EXPANDS | PERMUTES
IDENTITIES = {"clone", "contiguous", "alias", "lift_fresh_copy", "lift_fresh"}
"""Operators that return their tensor. detach is not one of them: its gradients differ."""
CASTS = {"to", "_to_copy", "type_as"}
INDICES = (torch.int64, torch.int32)
"""The dtypes of tensors of indices. Others are masks."""
DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout"}


def source(node: fx.Node) -> fx.Node:
    """The tensor that a one-tensor operator reads."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def is_inactive_dropout(node: fx.Node) -> bool:
    if op_name(node) not in DROPOUTS:
        return False
    values = arguments(node)
    return not values["train"] or values["p"] == 0


def keeps_values(node: fx.Node) -> bool:
    """Whether the node has the elements of its source, each in its place. A cast between floats counts as well."""
    name = op_name(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if name in CASTS:
        return dtype(node) == dtype(source(node)) or (_is_fine(dtype(node)) and _is_fine(dtype(source(node))))
    if name in IDENTITIES or is_inactive_dropout(node):
        return True
    return name in EXPANDS | {"slice"} and shape(node) == shape(source(node))


def _is_fine(kind: torch.dtype) -> bool:
    """Whether a cast to this dtype is no more than rounding."""
    return kind.is_floating_point and torch.finfo(kind).bits >= 16


def value_source(node: fx.Node, through_detach: bool = False) -> fx.Node:
    """The tensor that has the same numbers as a node, element for element.

    On the way lie widening casts, copies, inactive dropout, and slices and expands that change no size; with
    `through_detach` also detaches, which give the same numbers but stop gradients. A cast to fewer bits is not on the
    way: in float16, -1e9 is -inf.
    """
    while (keeps_values(node) and not _narrows(node)) or (through_detach and op_name(node) == "detach"):
        node = source(node)
    return node


def rounded_source(node: fx.Node) -> fx.Node:
    """As `value_source`, but through all casts. For weights: numbers from 0 to 1, which a cast rounds and no more."""
    while keeps_values(node):
        node = source(node)
    return node


def _narrows(node: fx.Node) -> bool:
    return op_name(node) in CASTS and not widens(node)


def before(node: fx.Node, dims: Dims, evaluator: Evaluator | None = None) -> tuple[fx.Node, Dims] | None:
    """Undo a data movement: the source and its dims, given the dims of the result. None if the node is no movement.

    With an evaluator this includes an index by constants that repeats a tensor.
    """
    name = op_name(node)
    if name in ("cat", "stack"):
        return _uncopied(node, dims)
    if keeps_values(node):
        return source(node), dims
    undone: Dims | None = None
    if name in RESHAPES:
        undone = regroup(dims, shape(source(node)))
    elif name in PERMUTES:
        order = permutation(node)
        undone = permute(dims, [order.index(i) for i in range(len(order))])
    elif name in EXPANDS:
        inner = shape(source(node))
        tail = dims[len(dims) - len(inner) :]
        undone = tuple(() if size == 1 else dim for size, dim in zip(inner, tail, strict=True))
    elif name in ("repeat", "tile"):
        undone = _unrepeat(dims, shape(source(node)))
    elif name == "repeat_interleave":
        undone = _uninterleave(node, dims)
    elif name in ("index_select", "index") and evaluator is not None:
        undone = _unindexed(node, dims, evaluator)
    return None if undone is None else (source(node), undone)


def after(moved: fx.Node, node: fx.Node, dims: Dims) -> Dims | None:
    """The dims of the result, given those of the tensor that is moved.

    None if the node drops elements, or is no movement of this tensor: `x.type_as(moved)` has the elements of `x`.
    """
    name = op_name(node)
    if not node.args or node.args[0] is not moved:
        return None
    if keeps_values(node):
        return dims
    if name in RESHAPES:
        return regroup(dims, shape(node))
    if name in PERMUTES:
        return permute(dims, permutation(node))
    return None


def broadcast(node: fx.Node, dims: Dims) -> Dims:
    """The dims of an operand that broadcasts against a tensor over `dims`."""
    inner = shape(node)
    tail = dims[len(dims) - len(inner) :]
    return tuple(() if size == 1 else dim for size, dim in zip(inner, tail, strict=True))


def widens(node: fx.Node) -> bool:
    """Whether the node's dtype holds every value of its source's dtype."""
    kinds = dtype(node), dtype(source(node))
    return kinds[0] == kinds[1] or (all(map(_is_fine, kinds)) and torch.promote_types(*kinds) == kinds[0])


def cut(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """A piece of a tensor along one dim, as (tensor, dim, first index); None if the node is none.

    The size of that dim is a number.
    """
    name = op_name(node)
    if name in ("slice", "narrow"):
        of, given = source(node), arguments(node)
        dim, start = given["dim"] % len(shape(of)), given["start"] or 0
        if not isinstance(start, int) or given.get("step", 1) != 1 or not is_number(shape(of)[dim]):
            return None
        return of, dim, start + shape(of)[dim] if start < 0 else start
    several = node.args[0] if name == "getitem" else None
    if not isinstance(several, fx.Node) or op_name(several) not in ("split", "split_with_sizes", "chunk"):
        return None
    dim, index, values = arguments(several)["dim"], node.args[1], several.meta["val"]
    lengths = [value.shape[dim] for value in values]
    if not isinstance(index, int) or not all(isinstance(length, int) for length in lengths):
        return None
    return source(several), dim % values[0].dim(), sum(lengths[:index])


def _unrepeat(dims: Dims, inner: tuple[int, ...]) -> Dims | None:
    """Tiling repeats the fast digits: the source runs over those alone."""
    cuts = [split(dim, size) for dim, size in zip(dims[len(dims) - len(inner) :], inner, strict=True)]
    return None if None in cuts else tuple(cut[1] for cut in cuts if cut)


def _uncopied(node: fx.Node, dims: Dims) -> tuple[fx.Node, Dims] | None:
    """A cat or stack of copies of one tensor. The tensor runs over the fast digits of a cat, and not over a new dim."""
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(set(parts)) != 1 or not isinstance(parts[0], fx.Node):
        return None
    dim = int(arguments(node)["dim"]) % len(dims)
    if op_name(node) == "stack":
        return parts[0], (*dims[:dim], *dims[dim + 1 :])
    cut = split(dims[dim], shape(parts[0])[dim])
    return None if cut is None else (parts[0], (*dims[:dim], cut[1], *dims[dim + 1 :]))


def _unindexed(node: fx.Node, dims: Dims, evaluator: Evaluator) -> Dims | None:
    """An index by constants that repeats each element in place, or the whole tensor."""
    if op_name(node) == "index_select":
        dim, index = int(arguments(node)["dim"]) % len(dims), arguments(node)["index"]
    else:
        given = [(i, index) for i, index in enumerate(arguments(node)["indices"]) if index is not None]
        if len(given) != 1:
            return None
        dim, index = given[0]
    found = evaluator.value(index)
    if not isinstance(found, Tensor) or found.dim() != 1 or found.dtype == torch.bool:
        return None
    size, all_ = shape(source(node))[dim], torch.arange(len(found))
    if len(found) % size:
        return None
    times = len(found) // size
    for low, part, order in ((times, 0, all_ // times), (size, 1, all_ % size)):
        cut = split(dims[dim], low)
        if cut is not None and torch.equal(found, order):
            return (*dims[:dim], cut[part], *dims[dim + 1 :])
    return None


def _uninterleave(node: fx.Node, dims: Dims) -> Dims | None:
    """Interleaving repeats each element in place: the source runs over the slow digits alone."""
    values = arguments(node)
    repeats, dim, inner = values.get("repeats"), values.get("dim"), tensor(source(node))
    if not isinstance(repeats, int) or not isinstance(dim, int) or inner is None:
        return None
    cut = split(dims[dim], repeats)
    if cut is None:
        return None
    undone = list(dims)
    undone[dim] = cut[0]
    return tuple(undone)
