"""New rows behind a cache: what each row sees of two sources of keys (`patterns/sources.py`).

`flash_prior` computes one mask: a row sees the first keys of the cache, up to a length, and the new keys up to its own;
with a window only the last ones of these; of both only those that key padding does not hide. Here the masks of a site
are shown to be this one.

If the new keys lie behind the cache (`cat`), each term is evaluated at the keys of one source alone. So a term may say
something else about each. If they are written into the cache, the positions must be consecutive, and the keys that
query i sees must end at position i: what was in the cache before is then the first source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from neuron_attn_rewrite.graph.sizes import is_number
from neuron_attn_rewrite.masks.affine import Affine, Below, Element, Truth, Variable, variable
from neuron_attn_rewrite.masks.affine import Index as Axis
from neuron_attn_rewrite.masks.bounds import BATCH, QUERY, KeyBound
from neuron_attn_rewrite.masks.cases import Unknown
from neuron_attn_rewrite.masks.conditions import Conditions, conditions
from neuron_attn_rewrite.masks.empty_rows import Effect
from neuron_attn_rewrite.masks.proof import Padding, Proof
from neuron_attn_rewrite.masks.prove import Prover, assumption
from neuron_attn_rewrite.masks.spec import Band, Claim, EmptyRows, KeyPadding, Limited, MaskSpec, Unproven
from neuron_attn_rewrite.patterns.axes import dim_size
from neuron_attn_rewrite.patterns.site import AttentionSite, Term
from neuron_attn_rewrite.patterns.sources import Index, Place, Sources, sources
from neuron_attn_rewrite.reasons import Reason


@dataclass(frozen=True)
class Behind:
    """What each row sees of the keys of a cache and of new keys."""

    sources: Sources
    length: Affine
    """How many keys of the cache are used: a sum of sizes and of elements that may differ along the batch."""
    in_range: bool
    """Whether the length is always in [0, prior_len]. If not, the nearest length in it is meant, and new keys at
    negative positions are not seen."""
    mask: MaskSpec
    """The claims, as the report shows them."""
    window: int | None = None
    """Positions that a row sees, its own included. None for all."""
    prior_paddings: tuple[Padding, ...] = ()
    """Key padding of the cache. In an updated cache it also hides new keys: those that it hides where they are."""
    new_paddings: tuple[Padding, ...] = ()
    """Key padding of new keys that lie behind the cache."""
    empty_rows: EmptyRows = EmptyRows.NEVER
    reasons: tuple[Reason, ...] = ()

    @property
    def is_shared(self) -> bool:
        """Whether all batch elements use as many keys of the cache."""
        return not _depends_on(self.length, BATCH)

    @property
    def proof(self) -> Proof:
        """The same as the proof of a site."""
        return Proof(self.mask, empty_rows=self.empty_rows, reasons=self.reasons)


class _No(Exception):
    """The masks are not those of `flash_prior`. The message says why."""


def behind(site: AttentionSite, prover: Prover) -> Behind | Reason | None:
    """What each row of the site sees of two sources. None if it has one; a reason if that is not proven."""
    found = sources(site, prover.writes)
    if not isinstance(found, Sources):
        return found
    try:
        if site.is_causal:
            raise _No("the rows are causal from the first key of the cache on")
        if any(scale.on == "value" for scale in site.operand_scales):
            raise _No("a tensor scales the values")
        return _appended(site, found, prover) if found.place is None else _updated(site, found, found.place, prover)
    except _No as no:
        return Reason("two-sources", f"flash_prior: {no}")


def _query(site: AttentionSite, prover: Prover) -> Affine:
    """The index of a query: 0 if there is one."""
    return _along(site, QUERY, prover)


def _along(site: AttentionSite, axis: int, prover: Prover) -> Affine:
    dim = site.dims[axis]
    return variable(Axis(axis, prover.symbolic.size(dim_size(dim)))) if dim else Affine()


def _depends_on(of: Affine, axis: int) -> bool:
    """Whether a sum contains the index along an axis, also in the indices of elements."""
    return any(
        (isinstance(v, Axis) and v.axis == axis) or any(_depends_on(i, axis) for i in _inside(v))
        for v in of.variables()
    )


def _inside(of: Variable) -> tuple[Affine, ...]:
    return of.index if isinstance(of, (Element, Truth)) else of.row if isinstance(of, Below) else ()


# New keys behind the cache


@dataclass(frozen=True)
class _Seen:
    """What the terms together let each row see of one source."""

    band: Band = field(default_factory=Band)
    bounds: tuple[KeyBound, ...] = ()
    paddings: tuple[Padding, ...] = ()

    def and_(self, more: Conditions) -> _Seen:
        band = MaskSpec((self.band, more.band)).band
        paddings = (*self.paddings, *(Padding(*padding) for padding in more.paddings))
        return _Seen(band, tuple(dict.fromkeys((*self.bounds, *more.key_bounds))), tuple(dict.fromkeys(paddings)))


def _appended(site: AttentionSite, found: Sources, prover: Prover) -> Behind:
    try:
        return _by_source(site, found, prover)
    except _No:
        if prover.is_dynamic:
            raise
        by_rows = _by_rows(site, prover.claims(site), found, Affine(found.prior_len))
        if by_rows is None:
            raise
        paddings = tuple(replace(padding, start=padding.start + found.prior_len) for padding in by_rows.prior_paddings)
        return replace(by_rows, new_paddings=paddings)


def _by_source(site: AttentionSite, found: Sources, prover: Prover) -> Behind:
    """Each term at the keys of each source."""
    size = prover.symbolic.size
    ends = (Affine(), size(found.prior_len)), (size(found.prior_len), size(found.new_len))
    seen = [_Seen(), _Seen()]
    effects: list[Effect] = []
    assumed: list[Reason] = []
    for term, both, is_part in _read(site.terms, site, ends, prover):
        seen = [one.and_(more) for one, more in zip(seen, both, strict=True)]
        fills = {one.fill for one in both if replace(one, fill=None, assumed=()) != Conditions()}
        if fills:
            fill = fills.pop() if len(fills) == 1 else None
            effects.append(Effect(fill, term.kind != "add" and not is_part, zeroes_weights=term.zeroes_weights))
        assumed += [assumption(node) for one in both for node in one.assumed]
    prior, new = seen
    length = _length(prior, size(found.prior_len))
    window = _window(prior, new, length, found.new_len, _query(site, prover))
    e = prover.symbolic
    in_range = e.always(length) and e.always(size(found.prior_len) - length)
    if window is not None and not in_range:
        raise _No("the window starts from a length that may lie outside of the cache")
    return Behind(
        found,
        length,
        in_range,
        _spec(prior, new, length, window, found, prover),
        window,
        prior.paddings,
        new.paddings,
        prover.empty_row(site, effects) if new.paddings else EmptyRows.NEVER,
        tuple(dict.fromkeys(assumed)),
    )


def _read(
    terms: Sequence[Term],
    site: AttentionSite,
    ends: Sequence[tuple[Affine, Affine]],
    prover: Prover,
    are_parts: bool = False,
) -> Iterator[tuple[Term, list[Conditions], bool]]:
    """Each term, what it says about each source, and whether the term is a part of an added tensor."""
    for term in terms:
        both = [_conditions(term, site, start, count, prover) for start, count in ends]
        known = [one for one in both if isinstance(one, Conditions)]
        parts = prover.parts(term, site.dims) if len(known) < len(both) else ()
        if parts:
            yield from _read(parts, site, ends, prover, are_parts=True)
        elif len(known) < len(both):
            no = next(one for one in both if isinstance(one, Unproven))
            raise _No(f"{term.node.name}: {no.reason}")
        else:
            yield term, known, are_parts


def _conditions(term: Term, site: AttentionSite, start: Affine, count: Affine, prover: Prover) -> Conditions | Unproven:
    sizes = (*(prover.symbolic.size(dim_size(dim)) for dim in site.dims[:3]), count)
    found = conditions(term, site.dims, sizes, prover.symbolic, start)
    return conditions(term, site.dims, sizes, prover.named, start) if isinstance(found, Unproven) else found


def _length(prior: _Seen, capacity: Affine) -> Affine:
    """How many keys of the cache are used."""
    uppers = [bound.end + 1 for bound in prior.bounds if not bound.is_lower]
    if prior.band.upper is not None or len(uppers) > 1:
        raise _No("the queries see different keys of the cache")
    length = uppers[0] if uppers else capacity
    if _depends_on(length, QUERY):
        raise _No("the queries see different keys of the cache")
    return length


def _window(prior: _Seen, new: _Seen, length: Affine, new_len: int, query: Affine) -> int | None:
    """How many positions a row sees. None for all.

    Raises:
        _No: what the rows see is no window, or the new keys are not causal.
    """
    if new.bounds or new.band.upper != (0 if new_len > 1 else None):
        raise _No("the new keys are not causal")
    firsts = [bound.end for bound in prior.bounds if bound.is_lower]
    firsts += [] if prior.band.lower is None else [query + prior.band.lower]
    windows = {length + query - first + 1 for first in firsts}
    if not windows and new.band.lower is None:
        return None
    window = windows.pop() if len(windows) == 1 else None
    lower = None if window is None or window.constant >= new_len else 1 - window.constant
    if window is None or not window.is_constant or window.constant < 1 or new.band.lower != lower:
        raise _No("the cache and the new keys do not have the same window")
    return window.constant


def _spec(prior: _Seen, new: _Seen, length: Affine, window: int | None, found: Sources, prover: Prover) -> MaskSpec:
    """The claims in the numbers of the keys of both sources together."""
    claims: list[Claim] = []
    if length == prover.symbolic.size(found.prior_len) and is_number(found.prior_len):
        claims.append(Band(None if window is None else found.prior_len + 1 - window, found.prior_len))
    else:
        claims += [Limited(f"prior {bound}") for bound in prior.bounds]
        claims += [Band(upper=found.prior_len)] if is_number(found.prior_len) else [Limited("new keys causal")]
    claims += [KeyPadding(padding.node.name) for padding in (*prior.paddings, *new.paddings)]
    return MaskSpec(tuple(dict.fromkeys(claims)))


# New keys that are written into the cache


def _updated(site: AttentionSite, found: Sources, place: Place, prover: Prover) -> Behind:
    first, may_wrap = _first_position(site, found, place, prover)
    proof = prover.claims(site)
    by_rows = _by_rows(site, proof, found, first)
    if by_rows is None:
        by_rows = _by_bounds(site, proof, found, first, prover)
    assert isinstance(proof, Proof)
    in_range = not may_wrap
    rows = proof.empty_rows if may_wrap or by_rows.prior_paddings else EmptyRows.NEVER
    return replace(by_rows, in_range=in_range, empty_rows=rows)


def _first_position(site: AttentionSite, found: Sources, place: Place, prover: Prover) -> tuple[Affine, bool]:
    """The position of the first new key, and whether it may be negative.

    The model raises an error if a position lies behind the cache.

    Raises:
        _No: the new keys are not written one behind the other, each into its own batch element.
    """
    e, count = prover.named, prover.symbolic.size(found.new_len)
    if place.positions is None:
        try:
            start = e.size(place.start)
        except Unknown as unknown:
            raise _No(str(unknown)) from None
        if not e.always(start) or not e.always(e.size(found.prior_len) - count - start):
            raise _No("the new keys may be written outside of the keys that the attention reads")
        return start, False
    if place.rows is not None and _element(site, place.rows, prover) != _along(site, BATCH, prover):
        raise _No(f"{place.rows.node.name} does not number the batch elements")
    position, query = _element(site, place.positions, prover), _query(site, prover)
    first = position - query
    if _depends_on(first, QUERY):
        raise _No(f"{place.positions.node.name} is not shown to hold consecutive positions")
    return first, place.wraps and not e.always(first)


def _element(site: AttentionSite, index: Index, prover: Prover) -> Affine:
    """An element of an index tensor, for a batch element and a query."""
    names = {site.dims[axis]: _along(site, axis, prover) for axis in (BATCH, QUERY)} | {(): Affine()}
    try:
        cases = prover.named.cases(index.node, tuple(names[dim] for dim in index.dims))
    except Unknown as unknown:
        raise _No(str(unknown)) from None
    value = cases[0].value
    if len(cases) != 1 or not isinstance(value, Affine):
        raise _No(f"{index.node.name} has several cases")
    return value


def _by_bounds(site: AttentionSite, proof: Proof | Unproven, found: Sources, first: Affine, prover: Prover) -> Behind:
    """The keys that query i sees end at its own position, by the bounds of the proof."""
    claims = () if isinstance(proof, Unproven) else proof.mask.claims
    if isinstance(proof, Unproven) or proof.dense or not all(isinstance(c, (Limited, KeyPadding)) for c in claims):
        raise _No(f"the mask of the cache is {proof.mask if isinstance(proof, Proof) else proof}")
    own = first + _query(site, prover)
    uppers, lowers = ([b for b in proof.key_bounds if b.is_lower == side] for side in (False, True))
    if [bound.end for bound in uppers] != [own]:
        raise _No(f"the keys that a query sees do not end at its own position, and the mask is {proof.mask}")
    windows = [own - bound.end + 1 for bound in lowers]
    if len(windows) > 1 or not all(window.is_constant and window.constant > 0 for window in windows):
        raise _No(f"the mask is no window, but {proof.mask}")
    window = windows[0].constant if windows else None
    return Behind(found, first, True, proof.mask, window, proof.paddings, reasons=proof.reasons)


# Claims that hold a number for each row


def _by_rows(site: AttentionSite, proof: Proof | Unproven, found: Sources, first: Affine) -> Behind | None:
    """The same with known numbers: the interval of keys that each row sees. None if they are others, or not known."""
    if isinstance(proof, Unproven) or proof.dense or proof.key_bounds or not first.is_constant:
        return None
    if not is_number(site.q_len) or not is_number(site.kv_len):
        return None
    own = first.constant + torch.arange(site.q_len)
    rows = proof.mask.rows(site.q_len, site.kv_len)
    seen = int(own[-1]) + 1 - int(rows[-1, 0])
    window = seen if rows[-1, 0] > 0 else None
    start = torch.zeros_like(own) if window is None else (own + 1 - seen).clamp_min(0)
    if not torch.equal(rows, torch.stack([start, own + 1], 1)):
        return None
    return Behind(found, first, True, proof.mask, window, proof.paddings, empty_rows=proof.empty_rows)
