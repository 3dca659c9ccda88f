"""Masks as dense addends: whether a tensor that is added to the scores may hide keys, and what it must add.

The kernel adds a dense term to the scores. A model may replace the scores instead. The two are equal in a row that sees
no key only if the number absorbs every score: in float32, `score + finfo.min` is `finfo.min`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph.nodes import dtype, is_tensor, op_name
from neuron_attn_rewrite.masks.empty_rows import ABSORBS
from neuron_attn_rewrite.patterns.site import MASKED, AttentionSite, Term
from neuron_attn_rewrite.values.evaluator import Evaluator

LOWERED = -(2.0**100)
"""A number that hides keys and absorbs all scores. `finfo(float32).min` absorbs it in turn."""

LEARNED = frozenset("matmul bmm mm addmm baddbmm linear einsum embedding conv1d conv2d conv3d layer_norm".split())
"""Operators whose results have the magnitude of scores, whatever they read."""


def absorbs(fill: float, kind: torch.dtype) -> bool:
    """Whether `score + fill` is `fill` for every score of a magnitude up to `ABSORBS`."""
    step = torch.finfo(kind if kind.is_floating_point else torch.float32).eps
    return -fill * step > ABSORBS


def may_hide(term: Term, evaluator: Evaluator) -> bool:
    """Whether an added tensor can hold numbers low enough to hide a key: it is an input, or made with such a number."""
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


def fills_of_addends(
    site: AttentionSite, fills: Sequence[float | None], evaluator: Evaluator
) -> tuple[float, ...] | None:
    """What each term must add to the scores that it hides, so that rows that see no key are right too.

    "Right" means that float32 gives what the model computes. `fills` are the numbers by which the terms hide keys, None
    where that is not known. Returns None where it is not possible: the model itself rounds to a coarser dtype than
    float32, or it replaces scores that an earlier term may have hidden.

    A number that replaces scores without absorbing them, such as -1e4, becomes `LOWERED`. All scores of the row are
    then `LOWERED` instead of -1e4, which gives the same softmax, as long as every other term is far below `LOWERED`.
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
