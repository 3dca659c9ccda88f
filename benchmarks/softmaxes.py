"""Every softmax of a graph, found without the finder, and those that a report does not explain.

Counted is each of these nodes if its scores come from a product of two activations, and its weights go into another:

* the operators softmax, _softmax and _safe_softmax
* an exponential of which something is divided by a sum, along an axis, of the same exponentials
* an exponential of a log_softmax, or of something minus a log-sum-exp
* each scaled_dot_product_attention and flex_attention, also in the branches of torch.cond; these need no products

Not counted are the others: the gates of routers and poolings, whose scores come from a linear layer; classifiers,
whose weights end in no product; a log_softmax by itself, whose result is no weight. Data is followed up to an operator
that mixes features or chooses, as in `benchmarks/zoo/count.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

from neuron_attn_rewrite import RewriteReport

SOFTMAXES = {"softmax", "_softmax", "_safe_softmax", "special_softmax"}
FUSED = ("scaled_dot_product", "_scaled_dot_product", "flex_attention")
PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "mm", "mv", "linear"}
MIXES = {"addmm", "convolution", "conv1d", "conv2d", "layer_norm", "embedding", "topk", "argmax", "sort", "argsort"}
LOGARITHMS = {"log_softmax", "_log_softmax", "special_log_softmax", "logsumexp", "special_logsumexp"}
MOST = 200


def name_of(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", ""))


def softmaxes(graph: fx.Graph) -> list[fx.Node]:
    """The counted nodes, in the order of the graph. A node with a branch counts once for each of its attentions."""
    found: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = name_of(node)
        if name.startswith(FUSED) and "backward" not in name:
            found.append(node)
        elif name in SOFTMAXES or (name in ("exp", "exp2") and _is_normalised(node)):
            found += [node] if _is_between_products(node) else []
        found += [node for _ in _in_branches(node)]
    return found


def unexplained(names: Iterable[str], report: RewriteReport) -> list[str]:
    """Those of the nodes, by name, that are in no site of a report."""
    said = {node.name for site in report.sites for node in site.before}
    return [name for name in names if name not in said]


def _is_normalised(exponential: fx.Node) -> bool:
    exponent = exponential.args[0]
    inside = [exponent, *exponent.args[1:]] if isinstance(exponent, fx.Node) else []
    if any(isinstance(node, fx.Node) and name_of(node) in LOGARITHMS for node in inside):
        return True
    made = set(_walk(exponential, lambda node: node.users, lambda node: False))
    for total in made:
        if name_of(total) == "sum" and len(total.args) > 1:
            below = {total, *_walk(total, lambda node: node.users, lambda node: False)}
            for node in below:
                if name_of(node) == "reciprocal":
                    return True
                if name_of(node) == "div" and node.args[1] in below and node.args[0] in {exponential, *made}:
                    return True
    return False


def _is_between_products(node: fx.Node) -> bool:
    behind = _walk(node, lambda n: n.all_input_nodes, _ends)
    ahead = _walk(node, lambda n: n.users, _ends)
    return any(map(_is_product, behind)) and any(map(_is_product, ahead))


def _ends(node: fx.Node) -> bool:
    return node.op != "call_function" or name_of(node) in MIXES or name_of(node) in PRODUCTS or _is_product(node)


def _is_product(node: fx.Node) -> bool:
    """Whether this is a product of two activations. One with a parameter as its second operand is a layer."""
    name = name_of(node)
    if name == "sum":
        node = node.args[0]  # type: ignore[assignment]
        return name_of(node) == "mul" and len(node.all_input_nodes) == 2 and not any(map(_is_parameter, node.args))
    if name == "linear":
        return isinstance(node.args[1], fx.Node) and node.args[1].op == "call_function"
    return name in PRODUCTS and not _is_parameter(node.all_input_nodes[-1])


def _is_parameter(node: object) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _walk(
    start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]], ends: Callable[[fx.Node], bool]
) -> Iterator[fx.Node]:
    seen, waiting = {start}, [start]
    while waiting and len(seen) < MOST:
        for node in step(waiting.pop(0)):
            if node not in seen:
                seen.add(node)
                yield node
                if not ends(node):
                    waiting.append(node)


def _in_branches(node: fx.Node) -> Iterator[fx.Node]:
    for given in node.all_input_nodes:
        if given.op == "get_attr" and given.graph.owning_module is not None:
            body = getattr(given.graph.owning_module, str(given.target), None)
            if isinstance(body, fx.GraphModule):
                yield from softmaxes(body.graph)
