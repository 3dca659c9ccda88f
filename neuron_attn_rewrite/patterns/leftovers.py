"""Softmaxes that no rule has read: each is reported with a reason, so that a report names every one of a graph.

A softmax whose scores come from no product of two activations, such as the gate of a router or a classifier, is no
attention. Neither is one whose weights end in no product. These are not reported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx

from neuron_attn_rewrite.graph.nodes import arguments, attribute, module_path, op_name, plain_name
from neuron_attn_rewrite.patterns.products import is_product
from neuron_attn_rewrite.patterns.sdpa import is_sdpa
from neuron_attn_rewrite.patterns.site import UnknownAttention
from neuron_attn_rewrite.patterns.softmax_matmul import MIXES, is_router, meets_product
from neuron_attn_rewrite.patterns.softmaxes import LOGSUMEXPS, OPERATORS
from neuron_attn_rewrite.reasons import Reason

MOST_FOLLOWED = 48
"""How many nodes behind an exponential are searched for its sum and for a division."""
EXPS = ("exp", "exp2")
LOGARITHMS = LOGSUMEXPS | {"log_softmax", "_log_softmax", "special_log_softmax"}
UNKNOWN = Reason("unknown-node", "its exponentials are normalised in a way that no rule knows")
IN_BRANCH = Reason(
    "unknown-node", "it lies in a graph inside the graph, such as a branch of torch.cond, and stays there"
)


def leftover(node: fx.Node, covered: Collection[fx.Node]) -> Iterator[UnknownAttention]:
    """What must be said of a node that is in no attention that was found."""
    if op_name(node) in EXPS and node not in covered and (_is_normalised(node) or _has_logarithm(node)):
        source = node.args[0]
        if isinstance(source, fx.Node) and not is_router(source) and meets_product(node):
            yield UnknownAttention(module_path(node), "exp > matmul", node, UNKNOWN)
    for inner in _inner(node):
        yield UnknownAttention(module_path(node), f"{plain_name(node)} > {plain_name(inner)}", node, IN_BRANCH)


def _is_normalised(exponential: fx.Node) -> bool:
    """Whether something made of an exponential is divided by something made of a sum of it."""
    made = _ahead(exponential)
    sums = [node for node in made if op_name(node) == "sum" and arguments(node).get("dim") is not None]
    totals = {node for total in sums for node in (total, *_ahead(total))}
    return any(op_name(node) == "reciprocal" and node.args[0] in totals for node in totals) or any(
        op_name(node) == "div" and node.args[1] in totals and (node.args[0] in made or node.args[0] is exponential)
        for node in made
    )


def _has_logarithm(exponential: fx.Node) -> bool:
    """Whether the exponent is made of the logarithm of a sum of exponentials, behind the last product."""
    seen, waiting = {exponential}, [exponential]
    while waiting and len(seen) < MOST_FOLLOWED:
        for node in waiting.pop(0).all_input_nodes:
            sums = op_name(node) == "log" and any(op_name(n) == "sum" for n in node.all_input_nodes)
            if sums or op_name(node) in LOGARITHMS:
                return True
            if node not in seen and not is_product(node) and op_name(node) not in MIXES:
                seen.add(node)
                waiting.append(node)
    return False


def _ahead(start: fx.Node) -> list[fx.Node]:
    """The nearest nodes that are computed from a node, at most `MOST_FOLLOWED`."""
    found: dict[fx.Node, None] = {}
    waiting = [start]
    while waiting and len(found) < MOST_FOLLOWED:
        for user in waiting.pop(0).users:
            if user not in found:
                found[user] = None
                waiting.append(user)
    return list(found)


def _inner(node: fx.Node) -> Iterator[fx.Node]:
    """The attention operators and softmaxes in the graphs that a node calls."""
    if node.op != "call_function":
        return
    for given in node.all_input_nodes:
        body = attribute(given) if given.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            for inner in body.graph.nodes:
                if is_sdpa(inner) or plain_name(inner) in OPERATORS:
                    yield inner
                yield from _inner(inner)
