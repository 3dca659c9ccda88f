"""From what was found in the graph to a site: names the axes and lays out the operands for the kernel."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import dtype, module_path, op_name, shape
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dim, Dims, dim_size, layout_steps
from neuron_attn_rewrite.patterns.operands import Stage, View, chain, features
from neuron_attn_rewrite.patterns.peel import TensorScale
from neuron_attn_rewrite.patterns.roles import assign_roles
from neuron_attn_rewrite.patterns.site import (
    AttentionSite,
    Operand,
    OperandScale,
    Reader,
    SoftmaxFacts,
    Term,
    UnknownAttention,
)
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.evaluator import Evaluator
from neuron_attn_rewrite.values.exact import product, sums_are_fine

NO_ELEMENTS = Reason("empty", "an operand has no elements")


@dataclass(frozen=True)
class Found(SoftmaxFacts):
    """An attention as `sdpa.py` or `softmax_matmul.py` found it. Its axes have no names yet."""

    pattern: str
    anchor: fx.Node
    output: View
    scores: Dims
    """The dims of what the softmax runs over, without a sink."""
    key_dim: int
    """The position in `scores` of the dim that the softmax runs over."""
    query: View
    key: View
    value: View
    scale: float
    tensor_scales: tuple[TensorScale, ...] = ()
    """Tensors that multiply or divide the scores."""
    weight_scale: float = 1.0
    weight_scales: tuple[TensorScale, ...] = ()
    """Tensors that multiply or divide the weights after the softmax."""
    sink: View | None = None
    readers: tuple[Reader, ...] = ()


def _operand(stages: list[Stage], target: Dims, fixed: Collection[fx.Node]) -> Operand | None:
    """The deepest tensor of the chain that already has the target's layout.

    If there is none: the deepest tensor of all, with the steps to that layout. None if there are no such steps. The
    tensors in `fixed` change in place, so a kernel call must not read them at another time than the model does.
    """
    last = stages[-1]
    possible = layout_steps(last.view.dims, target, full=True) is not None
    for stage in reversed(stages):
        if stage.scale == last.scale and stage.view.dims == target:
            origin = (last.view.node, last.view.dims) if possible and last.view.node not in fixed else None
            return Operand(stage.view.node, target, target, origin=origin)
    return Operand(last.view.node, last.view.dims, target) if possible else None


def build(found: Found, evaluator: Evaluator) -> AttentionSite | UnknownAttention:
    """Name the axes and lay out the operands; `UnknownAttention` if that can't be done exactly."""
    name = module_path(found.anchor)

    def unknown(reason: Reason) -> UnknownAttention:
        return UnknownAttention(name, found.pattern, found.anchor, reason)

    if any(0 in shape(view.node) for view in (found.query, found.key, found.value)):
        return unknown(NO_ELEMENTS)
    query, key, value = (chain(view, evaluator) for view in (found.query, found.key, found.value))
    terms = tuple(_narrowed(term, evaluator) for term in found.terms)
    of_query, of_key, of_value = (stages[-1].view.dims for stages in (query, key, value))
    masks = [term.dims for term in terms if _may_be_mask(term, evaluator)]
    of_sink = found.sink.dims if found.sink else ()
    roles = assign_roles(found.scores, found.key_dim, of_query, of_key, of_value, masks, of_sink)
    if isinstance(roles, Reason):
        return unknown(roles)
    feature = features(found.query.dims, found.key.dims, found.scores)
    v_feature = features(found.output.dims, found.value.dims, found.scores)
    dims = roles.scores
    operands = (
        _operand(query, (roles.batch, roles.heads, roles.rows, feature), evaluator.changed),
        _operand(key, (*roles.kv, feature), evaluator.changed),
        _operand(value, (*roles.kv, v_feature), evaluator.changed),
    )
    result = (roles.batch, roles.heads, roles.rows, v_feature)
    of_rows, of_keys = ("query", (*dims[:3], ())), ("value", (*roles.kv, ()))
    scales = [_placed(scale, (of_rows,)) for scale in found.tensor_scales]
    scales += [_placed(scale, (("output", of_rows[1]), of_keys)) for scale in found.weight_scales]
    sink = _sink(found.sink, roles.heads, evaluator)
    if None in operands or layout_steps(result, found.output.dims) is None:
        return unknown(Reason("axes", "an operand is not laid out along the axes of the scores"))
    if None in scales[: len(found.tensor_scales)]:
        return unknown(Reason("scale-unknown", "a tensor scale differs from key to key"))
    if None in scales:
        return unknown(Reason("scale-unknown", "the weights are multiplied by something that differs by query and key"))
    if found.sink is not None and sink is None:
        return unknown(Reason("sink-shape", "the sink is not one number a head"))
    q, k, v = operands
    assert q and k and v
    return AttentionSite(
        name=name,
        pattern=found.pattern,
        anchor=found.anchor,
        output=found.output.node,
        output_dims=found.output.dims,
        result=result,
        query=q,
        key=k,
        value=v,
        dims=dims,
        batch=dim_size(roles.batch),
        num_heads=dim_size(roles.heads),
        num_kv_heads=dim_size(roles.kv_heads),
        q_len=dim_size(roles.rows),
        kv_len=dim_size(roles.keys),
        head_dim=dim_size(feature),
        v_head_dim=dim_size(v_feature),
        dtype=reduce(torch.promote_types, (dtype(o.node) for o in (q, k, v))),
        scale=found.scale * query[-1].scale * key[-1].scale,
        value_scale=value[-1].scale * found.weight_scale,
        operand_scales=tuple(s for s in scales if s),
        sink=sink,
        readers=found.readers,
        **found.facts() | {"terms": terms},
    )


def _placed(scale: TensorScale, places: tuple[tuple[str, Dims], ...]) -> OperandScale | None:
    """The scale on the first of these operands that runs over everything that the scale runs over."""
    for on, dims in places:
        if layout_steps(scale.dims, dims) is not None:
            return OperandScale(on, Operand(scale.node, scale.dims, dims, broadcasts=True), scale.divides)
    return None


def _sink(view: View | None, heads: Dim, evaluator: Evaluator) -> Operand | None:
    if view is None:
        return None
    stages = [stage for stage in chain(view, evaluator) if stage.scale == 1.0]
    return _operand(stages, (heads,), evaluator.changed)


def _may_be_mask(term: Term, evaluator: Evaluator) -> bool:
    """Whether the term hides scores, or is made of constants and 0/1 tensors alone."""
    return term.kind != "add" or not evaluator.is_opaque(term.node)


def _narrowed(term: Term, evaluator: Evaluator) -> Term:
    """The term before it was expanded: the smallest tensor that says the same."""
    if term.kind == "add":
        last = Stage(View(term.node, term.dims), 1.0)
        for stage in chain(last.view, evaluator):
            is_rounded = stage.scale != last.scale and not sums_are_fine(dtype(last.view.node))
            if is_rounded or product(term.multiplier, stage.scale) is None:
                break
            last = stage
        multiplier = term.multiplier * last.scale
        return replace(term, node=last.view.node, dims=last.view.dims, multiplier=multiplier)
    node, dims = term.node, term.dims
    while (moved := views.before(node, dims)) is not None and op_name(node) not in views.CASTS:
        node, dims = moved
    return replace(term, node=node, dims=dims)
