"""Which regions of its inputs an operator needs to compute one region of its result.

A mask of 32,768 x 32,768 elements is too large to hold. It is evaluated for some query rows at a time, and each
operator reads only the matching region of its inputs. To compute rows 64 to 127 of `positions[:, None] >= keys[None]`,
for example, elements 64 to 127 of `positions` are needed, and all of `keys`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import PERMUTES, arguments, op_name, permutation, shape, tensor


class Region(NamedTuple):
    """The indices `start` to `start + length - 1` of one dim, and all indices of the other dims."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True)
class Restricted:
    """An operator call that computes one region of the result."""

    args: tuple[Any, ...]
    """The arguments, with the sizes of the region."""
    regions: dict[fx.Node, Region] = field(default_factory=dict)
    """The region of each input that is read. An input that is not listed is read as a whole."""
    stand_ins: tuple[fx.Node, ...] = ()
    """Inputs of which only the shape or dtype is read."""


POINTWISE = frozenset(
    """
    add sub mul div neg eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or
    bitwise_not bitwise_xor __and__ __or__ __xor__ where masked_fill to _to_copy clone contiguous alias detach abs
    lift_fresh_copy minimum maximum rsub
    """.split()
)
FILLED = frozenset("full zeros ones".split())
FILLED_LIKE = frozenset("new_ones new_zeros new_full".split())


def restrict(node: fx.Node, region: Region) -> Restricted | None:
    """The call that computes only the region; None if there is no rule for the operator."""
    name = op_name(node)
    out = shape(node)
    if name in POINTWISE:
        return Restricted(node.args, _broadcast_regions(node.all_input_nodes, len(out), region))
    if name in FILLED and isinstance(node.args[0], (list, tuple)):
        return Restricted((_resized(node.args[0], region), *node.args[1:]), stand_ins=tuple(node.all_input_nodes))
    if name in FILLED_LIKE and isinstance(node.args[1], (list, tuple)):
        sizes = _resized(node.args[1], region)
        return Restricted((node.args[0], sizes, *node.args[2:]), stand_ins=tuple(node.all_input_nodes))
    if not node.args or not isinstance(node.args[0], fx.Node) or tensor(node.args[0]) is None:
        return None
    source = node.args[0]
    inner = shape(source)
    rank = len(inner)
    if name == "expand":
        sizes = _resized(node.args[1], region)  # type: ignore[arg-type]
        return Restricted((source, sizes), _broadcast_regions([source], len(out), region))
    if name == "unsqueeze":
        at = arguments(node)["dim"] % (rank + 1)
        return None if region.dim == at else Restricted(node.args, {source: _moved(region, -(region.dim > at))})
    if name == "select":
        at = arguments(node)["dim"] % rank
        return Restricted(node.args, {source: _moved(region, region.dim >= at)})
    if name in PERMUTES:
        return Restricted(node.args, {source: region._replace(dim=permutation(node)[region.dim])})
    if name in ("view", "reshape", "_unsafe_view"):
        if isinstance(node.args[1], torch.dtype):
            return None
        for dim, size in enumerate(inner):
            if size == out[region.dim] and prod(inner[:dim]) == prod(out[: region.dim]):
                return Restricted((source, _resized(out, region)), {source: region._replace(dim=dim)})
        return None
    if name == "slice":
        values = arguments(node)
        if values["dim"] % rank != region.dim:
            return Restricted(node.args, {source: region})
        return None
    if name == "index":
        return _index(node, source, region)
    return None


def _index(node: fx.Node, source: fx.Node, region: Region) -> Restricted | None:
    """`x[i, j]` with an index tensor for every dim. The index tensors broadcast to the result."""
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    given = [i for i in indices if isinstance(i, fx.Node)]
    if len(given) != len(indices) or len(given) != len(shape(source)) or source in given:
        return None
    return Restricted(node.args, _broadcast_regions(given, len(shape(node)), region))


def _broadcast_regions(inputs: Sequence[fx.Node], rank: int, region: Region) -> dict[fx.Node, Region]:
    regions = {}
    for n in inputs:
        if tensor(n) is None:
            continue
        dim = region.dim - (rank - len(shape(n)))
        if dim >= 0 and shape(n)[dim] > 1:
            regions[n] = region._replace(dim=dim)
    return regions


def _moved(region: Region, by: int) -> Region:
    return region._replace(dim=region.dim + by)


def _resized(sizes: Sequence[Any], region: Region) -> list[Any]:
    out = list(sizes)
    if out[region.dim] != -1:
        out[region.dim] = region.length
    return out
