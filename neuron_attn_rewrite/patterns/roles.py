"""From axes to roles: which atoms are the batch, heads, kv heads, query rows and keys of the kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from neuron_attn_rewrite.patterns.axes import Atom, Dim, Dims, atoms, dim_size, merged, refine
from neuron_attn_rewrite.reasons import Reason


@dataclass(frozen=True)
class Roles:
    """The kernel's dims in the axes of the scores; query head = kv head * group size + member of the group."""

    batch: Dim
    kv_heads: Dim
    group: Dim
    rows: Dim
    keys: Dim

    @property
    def heads(self) -> Dim:
        return merged((*self.kv_heads, *self.group))

    @property
    def scores(self) -> Dims:
        """(batch, heads, query, key)."""
        return (self.batch, self.heads, self.rows, self.keys)

    @property
    def kv(self) -> Dims:
        """(batch, kv heads, key)."""
        return (self.batch, self.kv_heads, self.keys)


def assign_roles(
    scores: Dims, key_dim: int, query: Dims, key: Dims, value: Dims, masks: Iterable[Dims] = (), sink: Dims = ()
) -> Roles | Reason:
    """The roles of the axes, found from what each operand runs over; a reason if the product is not an attention.

    The keys are the dim that the softmax runs over: key and value run over all of it, and the query over none. The
    query rows are the last other dim that key and value do not run over. Of the remaining atoms, those that key and
    value do not have are the group of a kv head.

    If all heads share one key, the heads may be the last dim. Then masks run over the rows, and a sink over the heads.
    """
    keys = scores[key_dim]
    if not keys:
        return Reason("one-key", "there is only one key")
    everything = [*atoms(scores), *atoms(query), *atoms(key), *atoms(value)]

    def fine(dims: Iterable[Dim]) -> set[Atom]:
        return set(refine(atoms(dims), everything))

    of_query, of_key, of_value, key_atoms = fine(query), fine(key), fine(value), set(refine(keys, everything))
    if of_query & key_atoms:
        return Reason("axes", "the softmax does not run over the keys alone")
    for name, of in (("key", of_key), ("value", of_value)):
        if not key_atoms <= of:
            return Reason("axes", f"the {name} has copies of its elements along the keys, and no kernel makes these")
    shared = of_key | of_value
    others = [refine(dim, everything) for i, dim in enumerate(scores) if i != key_dim]
    row_dims = [i for i, dim in enumerate(others) if not set(dim) & shared]
    if row_dims and others[row_dims[-1]]:
        row_dims = [i for i in row_dims if not set(others[i]) & fine(sink)] or row_dims
        masked = fine(dim for dims in masks for dim in dims)
        row_dims = [i for i in row_dims if set(others[i]) & masked] or row_dims
    rows = others.pop(row_dims[-1]) if row_dims else ()
    batch, heads = _batch_and_heads(others, shared)
    return Roles(
        merged(batch),
        merged(a for a in heads if a in shared),
        merged(a for a in heads if a not in shared),
        merged(rows),
        keys,
    )


def _batch_and_heads(others: list[Dim], shared: set[Atom]) -> tuple[Dim, Dim]:
    """The last dim is the heads, together with the one before if it is only a group. A single folded dim is cut."""
    if len(others) > 2 and others[-1] and not set(others[-1]) & shared:
        others = [*others[:-2], (*others[-2], *others[-1])]
    if len(others) > 1:
        return tuple(a for dim in others[:-1] for a in dim), others[-1]
    folded = others[0] if others else ()
    kv = [a for a in folded if a in shared]
    if len(kv) > 1 and dim_size(kv[:-1]) > 1:
        return tuple(kv[:-1]), tuple(a for a in folded if a not in kv[:-1])
    return tuple(kv), tuple(a for a in folded if a not in kv)
