"""Masks as dense addends: whether a tensor that is added to the scores may hide keys, and what it must add.

The kernel adds a dense term to the scores. A model may replace the scores instead. The two are equal in a row that sees
no key only if the number absorbs every score: in float32, `score + finfo.min` is `finfo.min`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neuron_attn_rewrite.masks.empty_rows import ABSORBS, sums_as_in_float32
from neuron_attn_rewrite.patterns.site import MASKED, AttentionSite, Term
from neuron_attn_rewrite.values.ranges import Ranges

LOWERED = -(2.0**100)
"""A number that hides keys and absorbs all scores. `finfo(float32).min` absorbs it in turn."""


def absorbs(fill: float, kind: torch.dtype) -> bool:
    """Whether `score + fill` is `fill` for every score of a magnitude up to `ABSORBS`."""
    scores = torch.tensor([-ABSORBS, ABSORBS], dtype=torch.promote_types(kind, torch.float32))
    return bool((scores + fill == fill).all())


def may_hide(term: Term, ranges: Ranges) -> bool:
    """Whether an added tensor can hold numbers low enough to hide a key. True if it has no proven bounds."""
    lowest = (ranges.of(term.node) * ranges.of(term.multiplier)).lowest
    return not lowest > MASKED


def rounds_alike(site: AttentionSite, fills: Sequence[float | None], ranges: Ranges) -> bool:
    """Whether the model rounds the scores of hidden keys as a kernel does, which adds the sum of all dense terms.

    `fills` are the numbers by which the terms hide keys, None where that is not known. A number like -1e9 absorbs the
    last digits of what it is added to. So if a term may hold one, nothing else may be added that is not 0 at the keys
    that are seen and absorbs everything at the others.
    """
    given = zip(site.terms, fills, strict=True)
    loose = [t for t, fill in given if t.kind == "add" and (fill is None or not absorbs(fill, site.dtype))]
    if not any(may_hide(term, ranges) for term in loose):
        return True
    return len(loose) == 1 and loose[0].rounds_alike


def fills_of_addends(
    site: AttentionSite, fills: Sequence[float | None], ranges: Ranges, nan_is_read: bool
) -> tuple[float, ...] | None:
    """What each term must add to the scores that it hides, so that rows that see no key are right too.

    "Right" means that float32 gives what the model computes. `fills` are the numbers by which the terms hide keys, None
    where that is not known. Returns None where it is not possible: the model itself rounds to a coarser dtype than
    float32, it replaces scores that an earlier term may have hidden, or scores of -inf give NaN, which it then reads.

    A number that replaces scores without absorbing them, such as -1e4, becomes `LOWERED`. All scores of the row are
    then `LOWERED` instead of -1e4, which gives the same softmax, as long as every other term is far below `LOWERED`.
    """
    if not sums_as_in_float32(site) or not rounds_alike(site, fills, ranges):
        return None
    if site.sink is not None:  # one that may be as low as the hidden scores
        return None
    if site.is_causal or site.floor > -torch.inf or any(term.zeroes_weights for term in site.terms):
        return None
    if nan_is_read and not site.safe and any(_may_be_infinite(term, ranges) for term in site.terms):
        return None
    hides = [term for term in site.terms if term.kind != "add" or may_hide(term, ranges)]
    if any(term.kind != "add" for term in hides[1:]):
        return None
    if all(absorbs(term.fill, site.dtype) for term in site.terms):
        return tuple(term.fill for term in site.terms)
    lower = all(fill is not None and float(torch.tensor(fill) + LOWERED) == fill for fill in fills[1:])
    return (LOWERED, *(term.fill for term in site.terms[1:])) if lower else None


def _may_be_infinite(term: Term, ranges: Ranges) -> bool:
    if term.kind != "add":
        return term.fill == -torch.inf
    held = ranges.of(term.node)
    return -torch.inf in (term.hiding(held.lowest), term.hiding(held.highest))
