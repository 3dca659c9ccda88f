"""What a model gives for a query row that sees no key: part of every proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph.nodes import dtype, is_tensor, op_name
from neuron_attn_rewrite.masks.spec import EmptyRows
from neuron_attn_rewrite.patterns.site import MASKED, AttentionSite, Term
from neuron_attn_rewrite.values.tables import Evaluator

MOST_HIDING = 6
"""Terms that hide keys of which every combination is looked at."""
ABSORBS = 1e6
"""Scores below this magnitude vanish when they are added to a number whose rounding step is larger."""

LOWERED = -(2.0**100)
"""Hides like every number that is low enough, absorbs all scores, and is absorbed by finfo(float32).min."""

LEARNED = frozenset("matmul bmm mm addmm baddbmm linear einsum embedding conv1d conv2d conv3d layer_norm".split())
"""What gives numbers of the magnitude of scores, whatever it reads."""


@dataclass(frozen=True)
class Effect:
    """What a term does to the score of a key. A bias, which hides none, has a fill of 0."""

    fill: float | None
    """The number by which it hides keys, None for several."""
    replaces: bool = False
    """Whether the number stands in place of the score, instead of being added to it."""
    zeroes_weights: bool = False
    """Whether the weights that it hides are set to zero once more after the softmax."""

    @property
    def hides(self) -> bool:
        return self.fill is None or self.fill <= MASKED


def meaning(effects: Sequence[Effect], site: AttentionSite) -> EmptyRows:
    """What a row gives of which each key is hidden by some of the terms, given in the order in which they act."""
    hiding = [effect for effect in effects if effect.hides]
    if not hiding or len(hiding) > MOST_HIDING:
        return EmptyRows.OTHER
    if any(effect.zeroes_weights for effect in hiding):
        zeros = all(effect.zeroes_weights or effect.fill == -torch.inf for effect in hiding)
        return EmptyRows.ZERO if zeros else EmptyRows.OTHER
    scores = _hidden_scores(effects, site)
    if scores == {-torch.inf}:
        return EmptyRows.ZERO if site.safe else EmptyRows.ANY
    return EmptyRows.MEAN if len(scores) == 1 else EmptyRows.OTHER


def _hidden_scores(effects: Sequence[Effect], site: AttentionSite) -> set[float]:
    """What can become of the score of a hidden key, whichever of the terms hide it, and whatever it was before.

    Every step is monotonic, so that what both ends of the range of scores lead to, all scores between them do.
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


def absorbs(fill: float, kind: torch.dtype) -> bool:
    """Whether any reasonable score vanishes when this number is added to it."""
    step = torch.finfo(kind if kind.is_floating_point else torch.float32).eps
    return -fill * step > ABSORBS


def may_hide(term: Term, evaluator: Evaluator) -> bool:
    """Whether an addend can hold numbers low enough to hide a key: an input, or made with such a number."""
    if abs(term.multiplier) >= -MASKED:
        return True
    seen: set[fx.Node] = set()
    stack = [term.node]
    while stack:
        node = stack.pop()
        if node in seen or op_name(node) in LEARNED:
            continue
        seen.add(node)
        numbers = [v for v in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(v, float)]
        stored = evaluator.value(node) if node.op == "get_attr" else None
        low = isinstance(stored, Tensor) and bool((stored <= MASKED).any())
        if node.op == "placeholder" or low or any(abs(v) >= -MASKED for v in numbers):
            return True
        stack += [n for n in node.all_input_nodes if is_tensor(n) and dtype(n).is_floating_point]
    return False


def as_addends(site: AttentionSite, fills: Sequence[float | None], evaluator: Evaluator) -> tuple[float, ...] | None:
    """What each term has to add to the scores it hides so that float32 gives what the model computes, in rows that see
    no key too; None if that can't be had. `fills` are the numbers by which the terms hide keys, None where not known.

    It can't where the model's own rounding is coarser, or where scores are replaced that a term before may have hidden.
    A number that stands in place of scores and does not absorb them, such as -1e4, is taken as `LOWERED`, which does:
    the row is the same as long as every other term is far below that too.
    """
    for term in site.terms:
        kind = dtype(term.node) if term.kind == "add" else site.dtype
        if kind.is_floating_point and torch.finfo(kind).eps > torch.finfo(torch.float32).eps:
            return None
    if site.is_causal or site.floor > -torch.inf or any(term.zeroes_weights for term in site.terms):
        return None
    hides = [term for term in site.terms if term.kind != "add" or may_hide(term, evaluator)]
    if any(term.kind != "add" for term in hides[1:]):
        return None
    if all(absorbs(term.fill, site.dtype) for term in site.terms):
        return tuple(term.fill for term in site.terms)
    lower = all(fill is not None and float(torch.tensor(fill) + LOWERED) == fill for fill in fills[1:])
    return (LOWERED, *(term.fill for term in site.terms[1:])) if lower else None
