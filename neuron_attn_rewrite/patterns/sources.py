"""Two sources of keys: an attention whose keys and values are those of a cache and new ones.

A graph puts the two together in one of two ways:

* `cat([prior, new])` along the keys, for keys and values alike;
* an update of the cache: `index_copy`, `index_put`, `slice_scatter` or a copy into a slice, also in place.

A kernel call can read both sources as they lie. What each row sees of them is proven in `masks/behind.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import fx

from neuron_attn_rewrite.graph.drafts import DRAFT
from neuron_attn_rewrite.graph.nodes import arguments, dtype, is_tensor, mutates, op_name, plain_name, shape
from neuron_attn_rewrite.graph.writes import Writes, written
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dim, Dims, atoms, axis_dim, dim_size, layout_steps
from neuron_attn_rewrite.patterns.site import AttentionSite, Operand
from neuron_attn_rewrite.reasons import Reason


@dataclass(frozen=True)
class Index:
    """An integer tensor that indexes a cache, and what its dims run over. New keys have the axis of the queries."""

    node: fx.Node
    dims: Dims


@dataclass(frozen=True)
class Place:
    """Where an update writes the new keys of a cache."""

    start: int | fx.Node | None = None
    """The first position, if it is a number or a size."""
    positions: Index | None = None
    """The position of each new key."""
    rows: Index | None = None
    """The batch element that each position belongs to, if the update has an index for it."""
    wraps: bool = False
    """Whether negative positions count from the end."""


@dataclass(frozen=True)
class Sources:
    """The keys and values of an attention as those of a cache and new ones."""

    key_prior: Operand
    """To [batch, num_kv_heads, prior_len, head_dim]."""
    value_prior: Operand
    """To [batch, num_kv_heads, prior_len, v_head_dim]."""
    key: Operand
    """To [batch, num_kv_heads, new_len, head_dim]."""
    value: Operand
    """To [batch, num_kv_heads, new_len, v_head_dim]."""
    prior_len: int
    """Keys of the cache. Of an update these are all keys of the attention: the new ones are among them."""
    new_len: int
    place: Place | None
    """Where the new keys are written; None if they lie behind the cache."""
    starts: tuple[fx.Node, ...]
    """The tensors from which the keys and values of both sources are made."""
    joins: tuple[fx.Node, ...]
    """The nodes that put the sources together."""

    @property
    def operands(self) -> tuple[Operand, ...]:
        return self.key, self.value, self.key_prior, self.value_prior


@dataclass(frozen=True)
class _Joined:
    """One operand of the attention, taken apart. Dims are those of the tensors."""

    join: fx.Node
    prior: tuple[fx.Node, Dims]
    new: tuple[fx.Node, Dims]
    base: fx.Node
    """The cache before it was joined or updated."""
    place: Place | None = None


def sources(site: AttentionSite, writes: Writes) -> Sources | Reason | None:
    """The two sources of keys and values. None if there is one; a reason if they can't be read apart."""
    found = [_taken_apart(site, operand, writes) for operand in (site.key, site.value)]
    if found == [None, None]:
        return None
    no = next((one for one in found if isinstance(one, Reason)), None)
    if no is not None:
        return no
    key, value = found
    if not isinstance(key, _Joined) or not isinstance(value, _Joined) or key.place != value.place:
        return _no("keys and values are not put together alike")
    new_len, prior_len = (dim_size(_keys(site, end, dims)) for end, (_, dims) in ((NEW, key.new), (PRIOR, key.prior)))
    for one in (key, value):
        lengths = [dim_size(_keys(site, end, dims)) for end, (_, dims) in ((NEW, one.new), (PRIOR, one.prior))]
        if lengths != [new_len, prior_len]:
            return _no("keys and values do not have as many earlier keys")
        for piece in (one.prior[0], one.new[0]):
            if DRAFT not in one.join.meta and writes.between(piece, one.join, site.output):
                return Reason("written", f"{piece.name} is written between {one.join.name} and the attention")
    if new_len != site.q_len:
        return _no(f"there are {new_len} new keys and {site.q_len} queries")
    operands = [
        _operand(site, end, operand, *getattr(one, "new" if end is NEW else "prior"))
        for end in (PRIOR, NEW)
        for operand, one in ((site.key, key), (site.value, value))
    ]
    key_prior, value_prior, key_new, value_new = operands
    if key_prior is None or value_prior is None or key_new is None or value_new is None:
        return _no("a source is not laid out along the axes of the scores")
    return Sources(
        key_prior,
        value_prior,
        key_new,
        value_new,
        prior_len,
        new_len,
        key.place,
        (key.base, key.new[0], value.base, value.new[0]),
        (key.join, value.join),
    )


def _no(words: str) -> Reason:
    return Reason("two-sources", f"flash_prior: {words}")


# The axes. The keys of both sources get axes of their own, which no other tensor of the site has.

PRIOR, NEW = 1, 2


def _axis(site: AttentionSite, end: int) -> int:
    used = (*site.dims, *site.output_dims, *(dim for o in site.operands for dim in (*o.dims, *o.target)))
    return max(atom.axis for atom in atoms(used)) + end


def _keys(site: AttentionSite, end: int, dims: Dims) -> Dim:
    """What the keys of one source run over: () for one key. The keys of an updated cache are those of the site."""
    axis = _axis(site, end)
    return next((dim for dim in dims if dim and dim[0].axis == axis), site.dims[3] if site.dims[3] in dims else ())


def _operand(site: AttentionSite, end: int, like: Operand, node: fx.Node, dims: Dims) -> Operand | None:
    batch, heads, _, feature = like.target
    target = (batch, heads, _keys(site, end, dims), feature)
    return Operand(node, dims, target) if layout_steps(dims, target, full=True) is not None else None


# How keys are put together


def _taken_apart(site: AttentionSite, operand: Operand, writes: Writes) -> _Joined | Reason | None:
    """The operand as two sources, behind views and widening casts."""
    node, dims, keys, is_cut = operand.node, operand.dims, site.dims[3], False
    while dims.count(keys) == 1:
        at = dims.index(keys)
        found = _update_of(site, operand, writes, node, dims, at)
        if isinstance(found, _Joined) and is_cut and found.place and found.place.positions:
            return _no(f"{found.join.name} may write behind the keys that the attention reads")
        found = found or (None if is_cut else _cat(site, node, dims, at))
        if found is not None:
            return found
        piece = views.cut(node)
        if piece is not None and piece[1:] == (at, 0):  # the first keys of a cache
            node, is_cut = piece[0], True
            continue
        moved = None if op_name(node) in views.CASTS and not views.widens(node) else views.before(node, dims)
        if moved is None:
            return None
        node, dims = moved
    return None


def _cat(site: AttentionSite, node: fx.Node, dims: Dims, at: int) -> _Joined | Reason | None:
    if op_name(node) != "cat" or int(arguments(node)["dim"]) % len(dims) != at:
        return None
    parts = [part for part in arguments(node)["tensors"] if len(shape(part)) == len(dims) and shape(part)[at]]
    if len(parts) != 2:
        return _no(f"{node.name} puts {len(parts)} tensors together") if len(parts) > 2 else None
    prior, new = (
        (part, (*dims[:at], axis_dim(_axis(site, end), shape(part)[at]), *dims[at + 1 :]))
        for end, part in zip((PRIOR, NEW), parts, strict=True)
    )
    return _Joined(node, prior, new, parts[0])


def _update_of(
    site: AttentionSite, operand: Operand, writes: Writes, node: fx.Node, dims: Dims, at: int
) -> _Joined | Reason | None:
    """A cache after new keys were written into it, in place or as a new tensor."""
    is_changed = node in writes.changed
    if is_changed and writes.memory.is_view(node):
        return None
    update = _last_write(site, node, writes) if is_changed else node
    if not isinstance(update, fx.Node):
        return update
    read = _UPDATES.get(plain_name(update).removesuffix("_"))
    if read is None:
        return None
    found = read(site, update, dims, at)
    if found is None:
        return _no(f"{update.name} writes into the cache in another way")
    new, place, base = found
    # The attention reads the cache after the update. The earlier keys are the same as before.
    return _Joined(update, (operand.node, operand.dims), new, base, place)


def _last_write(site: AttentionSite, node: fx.Node, writes: Writes) -> fx.Node | Reason | None:
    """The last write into a tensor before the attention, if it is a write into this very tensor."""
    last = writes.last(node, site.output)
    if last is None:
        return None
    target = _base(next(written(last)))
    while mutates(node) and is_tensor(node.args[0]):  # the result of a write
        node = node.args[0]
    return last if target is node else _no(f"{last.name} writes into memory that {node.name} shares")


def _base(target: fx.Node) -> fx.Node:
    """The tensor of which the target of a copy is a slice."""
    return views.source(target) if plain_name(target) in ("slice", "narrow") else target


_Read = tuple[tuple[fx.Node, Dims], Place, fx.Node]


def _index_copy(site: AttentionSite, node: fx.Node, dims: Dims, at: int) -> _Read | None:
    values = arguments(node)
    if values["dim"] % len(dims) != at:
        return None
    new = _like(site, dims, at, values["source"])
    index = Index(values["index"], (site.dims[2],) if len(shape(values["index"])) else ())
    return new and (new, Place(positions=index), values["self"])


def _slice_scatter(site: AttentionSite, node: fx.Node, dims: Dims, at: int) -> _Read | None:
    values = arguments(node)
    if values["dim"] % len(dims) != at or values["step"] != 1:
        return None
    new = _like(site, dims, at, values["src"])
    return new and (new, Place(start=values["start"] or 0), values["self"])


def _copy(site: AttentionSite, node: fx.Node, dims: Dims, at: int) -> _Read | None:
    """A copy into a slice of the cache."""
    target, source = node.args[:2]
    assert isinstance(target, fx.Node)
    if plain_name(target) != "slice" or not is_tensor(source) or shape(source) != shape(target):
        return None
    values = arguments(target)
    if values["dim"] % len(dims) != at or values["step"] != 1:
        return None
    new = _like(site, dims, at, source)
    return new and (new, Place(start=values["start"] or 0), values["self"])


def _index_put(site: AttentionSite, node: fx.Node, dims: Dims, at: int) -> _Read | None:
    """`cache[:, :, positions] = new`, or with an index for the batch elements too."""
    values = arguments(node)
    given = [(i, index) for i, index in enumerate(values["indices"]) if index is not None]
    batch, _, queries, _ = site.dims
    by_dim = dict(given)
    others = [i for i in by_dim if i != at]
    if values["accumulate"] or at not in by_dim or any(dtype(index) not in views.INDICES for index in by_dim.values()):
        return None
    if len(others) > 1 or any(dims[i] != batch or not batch for i in others):
        return None
    rank = max(len(shape(index)) for index in by_dim.values())
    along = {0: (), 1: (queries,), 2: (batch, queries)}.get(rank)
    if others and rank == 1:
        along = (batch,)
    if along is None or (not others and rank > 1):
        return None
    new_keys = axis_dim(_axis(site, NEW), dim_size(queries))
    if others and rank == 1 and dim_size(queries) != 1:
        return None
    written_dims = [new_keys if dim == queries else dim for dim in along] if rank else []
    left = [(i, dim) for i, dim in enumerate(dims) if i not in by_dim]
    first = given[0][0] if len(given) == 1 or given[1][0] == given[0][0] + 1 else 0
    before = [dim for i, dim in left if i < first]
    result = (*before, *written_dims, *(dim for _, dim in left[len(before) :]))
    source = values["values"]
    if [dim_size(dim) for dim in result] != list(shape(source)):
        return None

    def index(node: fx.Node) -> Index:
        return Index(node, views.broadcast(node, along))

    rows = index(by_dim[others[0]]) if others else None
    return (source, result), Place(positions=index(by_dim[at]), rows=rows, wraps=True), values["self"]


_UPDATES: Mapping[str, Callable[[AttentionSite, fx.Node, Dims, int], _Read | None]] = MappingProxyType(
    {
        "index_copy": _index_copy,
        "slice_scatter": _slice_scatter,
        "copy": _copy,
        "index_put": _index_put,
        "_unsafe_index_put": _index_put,
    }
)
"""By the operator, without the mark of a write in place."""


def _like(site: AttentionSite, dims: Dims, at: int, new: fx.Node) -> tuple[fx.Node, Dims] | None:
    """The new keys, whose dims are those of the cache except for that of the keys."""
    if not is_tensor(new) or len(shape(new)) != len(dims):
        return None
    keys = axis_dim(_axis(site, NEW), shape(new)[at])
    result = (*dims[:at], keys, *dims[at + 1 :])
    return (new, result) if [dim_size(dim) for dim in result] == list(shape(new)) else None
