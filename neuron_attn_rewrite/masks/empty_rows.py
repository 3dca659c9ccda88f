"""What a model gives for a query row that sees no key: part of every proof."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph import dtype, is_tensor, op_name
from neuron_attn_rewrite.masks.spec import MASKED
from neuron_attn_rewrite.masks.tables import Evaluator
from neuron_attn_rewrite.patterns.site import AttentionSite, Term
from neuron_attn_rewrite.problem import EmptyRows

ABSORBS = 1e6
"""Scores below this magnitude vanish when they are added to a number whose rounding step is larger."""

LEARNED = frozenset("matmul bmm mm addmm baddbmm linear einsum embedding conv1d conv2d conv3d layer_norm".split())
"""What gives numbers of the magnitude of scores, whatever it reads."""


def meaning(term: Term, fill: float | None, alone: bool, site: AttentionSite) -> EmptyRows:
    """What a row gives in which this term hides every key by `fill` (None: by several numbers)."""
    if term.zeroed:
        return EmptyRows.ZERO
    if fill is None:
        return EmptyRows.OTHER
    fill = max(fill, site.floor)
    if fill == -torch.inf:
        return EmptyRows.ZERO if site.safe else EmptyRows.ANY
    replaces_all = term.kind != "add" and alone
    return EmptyRows.MEAN if replaces_all or absorbs(fill, dtype(term.node)) else EmptyRows.OTHER


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


def are_addends(site: AttentionSite, evaluator: Evaluator) -> bool:
    """Whether adding each term in float32 is what the model computes, in rows that see no key too.

    Not where the model's own rounding is coarser, or where scores are replaced that a term before may have hidden.
    """
    replaces = [term for term in site.terms if term.kind != "add"]
    for term in site.terms:
        kind = dtype(term.node) if term.kind == "add" else site.dtype
        if kind.is_floating_point and torch.finfo(kind).eps > torch.finfo(torch.float32).eps:
            return False
    if not all(absorbs(term.fill, site.dtype) for term in replaces):
        return False
    if site.is_causal or site.floor > -torch.inf or any(term.zeroed for term in site.terms):
        return False
    hides = [term for term in site.terms if term.kind != "add" or may_hide(term, evaluator)]
    return not any(term.kind != "add" for term in hides[1:])
