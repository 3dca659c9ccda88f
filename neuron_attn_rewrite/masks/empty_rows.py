"""What a model computes for a query row that sees no key.

Such a row has no softmax of its own, and models differ: scores of -inf give zeros or NaN, scores that are all replaced
by `finfo.min` give the mean of all values. A kernel is used only if it gives the same. We compute what becomes of a
hidden score, for every combination of terms that can hide it. If only one number can come out, all scores of the row
are equal, and the row is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from neuron_attn_rewrite.graph.nodes import dtype, is_tensor
from neuron_attn_rewrite.masks.spec import EmptyRows
from neuron_attn_rewrite.patterns.site import AttentionSite, Term, hides
from neuron_attn_rewrite.values.exact import sums_are_fine

MOST_HIDING = 6
"""With more terms that hide keys, their combinations are not computed."""
ABSORBS = 1e6
"""The largest magnitude of a score. A number absorbs all scores if its rounding step is larger than this."""


@dataclass(frozen=True)
class Effect:
    """What a term does to the score of a key."""

    fill: float | None
    """The number by which it hides keys, None for several, 0 for a bias, which hides none."""
    replaces: bool = False
    """Whether the number replaces the score. If not, it is added to it."""
    is_dense: bool = False
    """Whether the kernel adds the same tensor, so that its depth need not be known."""
    zeroes_weights: bool = False
    """Whether the model sets the weights of the hidden keys to zero again after the softmax."""

    @property
    def hides(self) -> bool:
        return self.fill is None or hides(self.fill)


def empty_row_value(effects: Sequence[Effect], site: AttentionSite) -> EmptyRows:
    """What the model computes for a row in which every key is hidden by at least one term.

    `effects` are those of the terms, in the order in which the model applies them.
    """
    hiding = [effect for effect in effects if effect.hides]
    if not hiding or len(hiding) > MOST_HIDING:
        return EmptyRows.OTHER
    if any(effect.is_dense and effect.fill is None for effect in hiding):
        others = [effect for effect in hiding if not (effect.is_dense and effect.fill is None)]
        is_exact = sums_as_in_float32(site) and site.floor == -torch.inf
        if not is_exact or any(effect.fill != -torch.inf or effect.zeroes_weights for effect in others):
            return EmptyRows.OTHER
        return EmptyRows.ZERO if site.safe else EmptyRows.ANY
    if any(effect.zeroes_weights for effect in hiding):
        zeros = all(effect.zeroes_weights or effect.fill == -torch.inf for effect in hiding)
        return EmptyRows.ZERO if zeros else EmptyRows.OTHER
    scores = _hidden_scores(effects, site)
    if scores == {-torch.inf}:
        return EmptyRows.ZERO if site.safe else EmptyRows.ANY
    return EmptyRows.MEAN if len(scores) == 1 else EmptyRows.OTHER


def may_be_nan(effects: Sequence[Effect], site: AttentionSite) -> bool:
    """Whether a row may be NaN that is zeros by `empty_row_value`: hidden by -inf, and not all set to zero again.

    A term alone sets all weights to zero that it hides. Of several, one may hide keys that another sets to zero.
    """
    hiding = [effect for effect in effects if effect.hides]
    return not site.safe and len(hiding) > 1 and any(effect.fill in (None, -torch.inf) for effect in hiding)


def sums_as_in_float32(site: AttentionSite) -> bool:
    """Whether the model adds to the scores in float32 or finer, as scaled_dot_product_attention does in any dtype."""
    if "scaled_dot_product" in site.pattern:
        return True
    kinds = [dtype(term.node) if term.kind == "add" else site.dtype for term in site.terms]
    return all(sums_are_fine(kind) for kind in kinds if kind.is_floating_point)


def _hidden_scores(effects: Sequence[Effect], site: AttentionSite) -> set[float]:
    """The values that a hidden score can have, whichever terms hide it, and whatever the score was before.

    Every step is monotonic in the score. So it is enough to compute the smallest and the largest score: if both give
    the same value, all scores between them do. Empty if a term hides by several numbers.
    """
    softmax = site.anchor if is_tensor(site.anchor) else site.output  # an operator may give more than one tensor
    kind = reduce(torch.promote_types, (site.dtype, dtype(softmax), *map(_kind, site.terms)), torch.float32)
    ends = torch.tensor([-ABSORBS, ABSORBS], dtype=kind)
    which = torch.arange(1, 2 ** sum(effect.hides for effect in effects))[:, None]
    scores = ends.expand(len(which), 2)
    for effect in effects:
        if effect.fill is None:
            return set()
        if not effect.hides:
            scores = scores + ends
            continue
        fill = torch.tensor(effect.fill, dtype=kind)
        scores = torch.where(which % 2 == 1, fill if effect.replaces else scores + fill, scores)
        which = which // 2
    return set(scores.clamp_min(site.floor).flatten().tolist())


def _kind(term: Term) -> torch.dtype:
    kind = dtype(term.node)
    return kind if kind.is_floating_point else torch.float32
