"""Attention written as one operator: scaled_dot_product_attention and its variants."""

from __future__ import annotations

import operator
from itertools import count
from math import sqrt

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import WRITTEN, arguments, dtype, module_path, plain_name, shape
from neuron_attn_rewrite.graph.sizes import expression_of, is_number
from neuron_attn_rewrite.patterns.axes import Dims, axis_dim, dim_size, split
from neuron_attn_rewrite.patterns.build import NO_ELEMENTS, Found, build
from neuron_attn_rewrite.patterns.operands import View
from neuron_attn_rewrite.patterns.rules import CHANGED
from neuron_attn_rewrite.patterns.site import AttentionSite, Term, UnknownAttention
from neuron_attn_rewrite.patterns.views import broadcast
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.evaluator import Evaluator

PREFIXES = ("scaled_dot_product_", "_scaled_dot_product_")


def is_sdpa(node: fx.Node) -> bool:
    return plain_name(node).startswith(PREFIXES) and "backward" not in plain_name(node)


def find_sdpa(node: fx.Node, evaluator: Evaluator) -> AttentionSite | UnknownAttention:
    """The attention that an SDPA call computes. Its arguments are read by their names in the schema."""
    values = arguments(node)
    query, key, value = values["query"], values["key"], values["value"]
    output = _output(node)

    def unknown(code: str, words: str) -> UnknownAttention:
        return UnknownAttention(module_path(node), plain_name(node), node, Reason(code, words))

    if any(0 in shape(operand) for operand in (query, key, value)):
        return UnknownAttention(module_path(node), plain_name(node), node, NO_ELEMENTS)
    if WRITTEN in node.meta or (output is not None and WRITTEN in output.meta):
        return UnknownAttention(module_path(node), plain_name(node), node, CHANGED)
    if output is None:
        return unknown("weights-used", "its log-sum-exp is used")
    if values.get("dropout_p"):
        return unknown("dropout-active", "dropout is active")
    mask = values.get("attn_mask", values.get("attn_bias"))
    fresh = count()
    *batch, q_len, head_dim = shape(query)
    kv_len, v_head_dim = shape(value)[-2:]
    kv_batch = [max(sizes) for sizes in zip(shape(key)[:-2], shape(value)[:-2], strict=True)]
    if len(kv_batch) != len(batch):
        return unknown("axes", "query and key have different ranks")
    grouped = values.get("enable_gqa") or False
    lead: Dims = tuple(
        axis_dim(next(fresh), q if grouped and i == len(batch) - 1 else max(q, kv))
        for i, (q, kv) in enumerate(zip(batch, kv_batch, strict=True))
    )
    rows, keys, features, v_features = (axis_dim(next(fresh), n) for n in (q_len, kv_len, head_dim, v_head_dim))
    scores = (*lead, rows, keys)
    sizes = (*map(dim_size, lead), q_len, kv_len)
    if mask is not None and not _broadcasts(shape(mask), sizes):
        is_not = "which is not known to broadcast to that of the scores"
        return unknown("axes", f"its mask has the shape {_in_words(shape(mask))}, {is_not}, {_in_words(sizes)}")
    scale = values.get("scale")
    if scale is None and not is_number(head_dim):
        return unknown("scale-unknown", f"its scale is by the head_dim {expression_of(head_dim)}, which is a symbol")
    found = Found(
        pattern=plain_name(node),
        anchor=node,
        output=View(output, (*lead, rows, v_features)),
        scores=scores,
        key_dim=len(scores) - 1,
        query=View(query, (*_leading(lead, shape(query)[:-2]), rows, features)),
        key=View(key, (*_leading(lead, shape(key)[:-2]), keys, features)),
        value=View(value, (*_leading(lead, shape(value)[:-2]), keys, v_features)),
        scale=1 / sqrt(head_dim) if scale is None else float(scale),
        terms=() if mask is None else (_term(mask, scores),),
        is_causal=bool(values.get("is_causal")),
        safe=True,
    )
    return build(found, evaluator)


def _output(node: fx.Node) -> fx.Node | None:
    """The tensor result. None if the operator also gives a log-sum-exp and something reads it."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return node
    users = list(node.users)
    if len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0:
        return users[0]
    return None


def _leading(lead: Dims, given: tuple[int, ...]) -> Dims:
    """Batch dims of one operand: whole, broadcast, or the slow digits where a group of query heads shares one."""
    dims = []
    for dim, size in zip(lead, given, strict=True):
        cut = split(dim, max(1, dim_size(dim) // size))
        assert cut is not None
        dims.append(cut[0] if size > 1 else ())
    return tuple(dims)


def _in_words(sizes: tuple[int, ...]) -> str:
    return f"[{', '.join(str(expression_of(size)) for size in sizes)}]"


def _broadcasts(sizes: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor broadcasts to `to` and does not make it larger."""
    tail = to[len(to) - len(sizes) :]
    return len(sizes) <= len(to) and all(a in (1, b) for a, b in zip(sizes, tail, strict=True))


def _term(mask: fx.Node, scores: Dims) -> Term:
    return Term("show" if dtype(mask) == torch.bool else "add", mask, broadcast(mask, scores))
