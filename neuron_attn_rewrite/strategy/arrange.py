"""Chooses the order of dims of each operand and of the result, so that the model's transposes become unused.

An operand is followed back to the tensor that it is a view of, and the result forward to its last view. For each order
that the kernel takes, `patterns.axes` gives the steps in between; the order with the fewest permutes is chosen.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from neuron_attn_rewrite.graph.drafts import DRAFT
from neuron_attn_rewrite.graph.nodes import dtype, mutates, op_name
from neuron_attn_rewrite.graph.sizes import is_number
from neuron_attn_rewrite.kernels.orders import ORDERS, PLAIN, Accepted, Orders
from neuron_attn_rewrite.patterns.axes import Dims, Layout, layout_steps, permute
from neuron_attn_rewrite.patterns.site import AttentionSite, Operand
from neuron_attn_rewrite.patterns.sources import Sources
from neuron_attn_rewrite.patterns.views import CASTS, after
from neuron_attn_rewrite.strategy.forms import Form

WORST = 99
"""Counts for a layout that is not possible."""
MOST_READERS = 256
"""A tensor with more nodes that are made of it is read by more than one attention."""


def arranged(form: Form, accepted: Accepted, fixed: frozenset[fx.Node]) -> Form:
    """The form with the orders that need the fewest permutes, for a kernel that takes the orders in `accepted`.

    Args:
        form: as found.
        accepted: the orders that need no permute inside of the call.
        fixed: tensors that change in place: nothing is moved across them.
    """
    site, problem = form.site, form.problem
    query, of_query, more_query = _operand(site.query, accepted.query)
    key, of_key, more_key = _operand(site.key, accepted.key)
    value, of_value, more_value = _operand(site.value, accepted.value)
    node, dims, of_result, more_result = _result(site, accepted.result, fixed)
    sizes = (problem.query_bytes, problem.key_bytes, problem.value_bytes, problem.result_bytes)
    more = (more_query, more_key, more_value, more_result)
    turned_bytes = [size * permutes for size, permutes in zip(sizes, more, strict=True)]
    if form.behind:
        turned_bytes[1:3] = _moved_apart(form, form.behind.sources)
    else:  # keys that only the call joins
        turned_bytes += [size for size, operand in zip(sizes[1:3], (key, value), strict=True) if _is_joined(operand)]
    layout_bytes = 2 * sum(turned_bytes)  # read and written
    orders = Orders(of_query, of_key, of_value, of_result)
    on = {"query": of_query, "value": of_value, "output": of_result}
    scales = tuple(
        replace(scale, operand=replace(scale.operand, target=permute(scale.operand.target, ORDERS[on[scale.on]])))
        for scale in site.operand_scales
    )
    result = permute(site.result, ORDERS[of_result])
    moved = replace(site, query=query, key=key, value=value, operand_scales=scales, output=node, output_dims=dims)
    return replace(form, site=replace(moved, result=result), orders=orders, layout_bytes=layout_bytes)


def permutes(layout: Layout | None) -> int:
    """How many steps of a layout are permutes, which move data."""
    return WORST if layout is None else sum(step.op == "permute" for step in layout)


def _is_open(layout: Layout) -> bool:
    """Whether a step needs a size that is a symbol. The call would have to read it from an input, and a new export of
    the result would then assume that inputs have the same size.
    """
    return any(step.op != "permute" and not all(map(is_number, step.arg)) for step in layout)


def _operand(operand: Operand, accepted: tuple[str, ...]) -> tuple[Operand, str, int]:
    """The operand with the source and order that need the fewest permutes, including the model's own; its order; and
    how many permutes more than in the model that is. The operand is unchanged if nothing is better.
    """
    sources, own = [(operand.node, operand.dims, 0)], 0
    if operand.origin is not None:
        origin, dims = operand.origin
        # With another reader the model's transpose stays, and costs this one nothing.
        own = permutes(layout_steps(dims, operand.dims, full=True)) if len(operand.node.users) == 1 else 0
        sources = [(operand.node, operand.dims, own), (origin, dims, 0)]
    choices = [
        (has + permutes(layout) + (order not in accepted), s, o)
        for s, (_, dims, has) in enumerate(sources)
        for o, order in enumerate(ORDERS)
        if not (
            (layout := layout_steps(dims, permute(operand.target, ORDERS[order]), full=True)) and s and _is_open(layout)
        )
    ]
    least, s, o = min(choices)
    order = list(ORDERS)[o]
    node, dims, _ = sources[s]
    return Operand(node, dims, permute(operand.target, ORDERS[order])), order, least - own


def _is_joined(operand: Operand) -> bool:
    return DRAFT in operand.node.meta and op_name(operand.node) == "cat"


def _moved_apart(form: Form, sources: Sources) -> list[int]:
    """Bytes that a call which reads two sources turns, less those of the model's copy that becomes unused."""
    problem, moved = form.problem, []
    new, prior = problem.q_len, problem.kv_len - problem.q_len
    of_keys, of_values = problem.key_bytes // problem.kv_len, problem.value_bytes // problem.kv_len
    for length, size, operand in zip((new, new, prior, prior), (of_keys, of_values) * 2, sources.operands, strict=True):
        moved.append(length * size * permutes(operand.layout))
    for size, join in zip((of_keys, of_values), sources.joins, strict=True):
        if sources.place is None and DRAFT not in join.meta and _is_only_for(join, form.site.output):
            moved.append(-size * problem.kv_len)
    return moved


def _is_only_for(node: fx.Node, output: fx.Node) -> bool:
    """Whether nothing but this output is made of a node."""
    waiting, reached = [node], {node}
    while waiting and len(reached) < MOST_READERS:
        users = [user for user in waiting.pop().users if user is not output and user not in reached]
        if any(user.op == "output" or mutates(user) for user in users):
            return False
        waiting += users
        reached.update(users)
    return not waiting


def _result(
    site: AttentionSite, accepted: tuple[str, ...], fixed: frozenset[fx.Node]
) -> tuple[fx.Node, Dims, str, int]:
    """The node that the result replaces, its dims, the order with the fewest permutes up to it, and how many
    permutes more than in the model that is.
    """
    node, dims = _last_view(site, fixed)
    models = permutes(layout_steps(site.output_dims, dims))
    plain = permutes(layout_steps(site.result, site.output_dims)) + models
    choices = [
        (permutes(layout_steps(permute(site.result, ORDERS[order]), dims)) + (order not in accepted), o)
        for o, order in enumerate(ORDERS)
    ]
    least, o = min(choices)
    unturned = plain + (PLAIN not in accepted)
    if least >= unturned:
        return site.output, site.output_dims, PLAIN, unturned - models
    return node, dims, list(ORDERS)[o], least - models


def _last_view(site: AttentionSite, fixed: frozenset[fx.Node]) -> tuple[fx.Node, Dims]:
    """The last view of the output and its dims, where each view is the only reader of the one before it."""
    node, dims = site.output, site.output_dims
    if fixed & ({operand.node for operand in site.operands} | {term.node for term in site.terms}):
        return node, dims  # a later call would read the changed tensor
    while len(node.users) == 1:
        (user,) = node.users
        following = after(node, user, dims) if op_name(user) not in CASTS and user not in fixed else None
        if following is None or dtype(user) != dtype(node):
            break
        node, dims = user, following
    return node, dims
