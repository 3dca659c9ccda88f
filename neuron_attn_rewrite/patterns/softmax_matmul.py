"""Attention written as products around a softmax.

Backwards from the softmax `peel` finds the product of query and key; forwards `follow` finds the products with a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from torch import fx

from neuron_attn_rewrite.graph.drafts import DRAFT, without_drafts
from neuron_attn_rewrite.graph.nodes import is_tensor, module_path, op_name, tensor, values_read
from neuron_attn_rewrite.patterns.build import Found, build
from neuron_attn_rewrite.patterns.features import peel_and_join
from neuron_attn_rewrite.patterns.join import joined_deeper
from neuron_attn_rewrite.patterns.operands import View, divided, query_and_key, value_and_output
from neuron_attn_rewrite.patterns.peel import Scores, Walk
from neuron_attn_rewrite.patterns.products import Product, as_product, is_product
from neuron_attn_rewrite.patterns.rules import Blocked
from neuron_attn_rewrite.patterns.site import AttentionSite, Reader, UnknownAttention
from neuron_attn_rewrite.patterns.weights import Weights, follow
from neuron_attn_rewrite.reasons import Reason

MOST_FOLLOWED = 24
"""How many nodes before or after a softmax are searched for a product."""


def unknown_softmax(softmax: fx.Node, reason: Reason) -> list[UnknownAttention]:
    """A softmax that can't be followed back to its scores, if its weights end in a product."""
    return (
        [UnknownAttention(module_path(softmax), "softmax > matmul", softmax, reason)] if meets_product(softmax) else []
    )


def find_softmax_matmul(softmax: fx.Node, start: Scores, walk: Walk) -> list[AttentionSite | UnknownAttention]:
    """The attentions whose weights `softmax` holds, one for each product; none if there is no product."""
    scores, ends = start, []
    try:
        scores, first = peel_and_join(walk, start)
        weights = Weights(softmax, start.dims, scores, start.node, scores.sink is not None)
        ends = _products(walk, weights)
        last = [start.division or product.node for _, product in ends]
        inside = between(first.nodes, last)
        made = made_of(first.nodes, inside) - set(last)
        given = [node for end in ends for node in _operands_of(*end)]
        readers = (*readers_of(inside, set(last), softmax), *operands_made(made, given, softmax))
        return [_build(walk, softmax, start, first, *end, readers) for end in ends]
    except Blocked as blocked:
        if not ends and (is_router(blocked.node) or not meets_product(softmax)):
            return []
        return [UnknownAttention(module_path(softmax), _pattern(scores), softmax, blocked.reason)]


def _build(
    walk: Walk,
    softmax: fx.Node,
    start: Scores,
    first: Product,
    weights: Weights,
    second: Product,
    readers: tuple[Reader, ...],
) -> AttentionSite | UnknownAttention:
    scores = weights.scores
    query, key = query_and_key(walk, scores, first)
    value, output = value_and_output(walk, weights, second)
    value = joined_deeper(walk, value, scores.axes[start.key_dim])
    if scores.division is not None:
        output = divided(output, scores.division, softmax, scores)
    zero_filled = weights.zero_filled_terms
    terms = tuple(replace(term, zeroes_weights=i in zero_filled) for i, term in enumerate(scores.terms))
    found = Found(
        pattern=_pattern(scores),
        anchor=softmax,
        output=output,
        scores=scores.axes,
        key_dim=start.key_dim,
        query=query,
        key=key,
        value=value,
        scale=scores.multiplier * (scores.softcap or 1.0),
        tensor_scales=scores.tensor_scales,
        weight_scale=weights.multiplier * second.alpha,
        weight_scales=weights.tensor_scales,
        sink=View(*scores.sink) if scores.sink else None,
        readers=readers,
        **scores.facts() | {"terms": terms},
    )
    return build(found, walk.evaluator)


def _pattern(scores: Scores) -> str:
    return " > ".join(("matmul", *scores.trail, "softmax", "matmul"))


MIXES = frozenset("linear mm addmm conv1d conv2d convolution layer_norm embedding topk argmax sort argsort".split())
"""Operators whose result is not made element by element.

Scores that come from one of them are a gate over experts or a pooling. Weights that end in one are not summed over
keys.
"""


def is_router(node: fx.Node) -> bool:
    """Whether scores from this node are made without a product, as by the gate of a router or of a pooling."""
    seen, stack = {node}, [node]
    if is_product(node):
        return False
    while stack and len(seen) < MOST_FOLLOWED:
        node = stack.pop()
        if op_name(node) in MIXES:
            continue
        given = [n for n in node.all_input_nodes if is_tensor(n) and n not in seen]
        if any(map(is_product, given)):
            return False
        seen.update(given)
        stack += given
    return not stack


def meets_product(softmax: fx.Node) -> bool:
    """Whether the weights, or something made of them element by element, end in a product with something else."""
    open_ends, seen = [softmax], {softmax}
    while open_ends and len(seen) < MOST_FOLLOWED:
        for user in open_ends.pop(0).users:
            if is_product(user):
                return True
            holds_tensors = tensor(user) is not None or isinstance(user.meta.get("val"), (list, tuple))
            if user not in seen and op_name(user) not in MIXES and holds_tensors:
                seen.add(user)
                open_ends.append(user)
    return False


def _products(walk: Walk, start: Weights) -> list[tuple[Weights, Product]]:
    """Follow the weights to every product that uses them. Other readers do not matter here.

    Raises:
        Blocked: there is none.
    """
    found, open_ends, blocked = [], [start], Blocked(start.node, Reason("no-product", "its weights meet no product"))
    while open_ends:
        weights = open_ends.pop()
        for user in weights.node.users:
            product = _used_in(user)
            if product is not None and not weights.includes_sink_column:
                found.append((weights, product))
                continue
            try:
                open_ends.append(follow(walk, weights, user))
            except Blocked as error:
                blocked = error
    products = [product.node for _, product in found]
    twice = next((node for node in products if products.count(node) > 1), None)
    if twice:
        raise Blocked(twice, Reason("axes", "the product is not one with a value alone"))
    if not found:
        raise blocked
    return found


def _used_in(user: fx.Node) -> Product | None:
    """The product that `user` is, or that sums what `user` multiplies."""
    summed = next(iter(user.users), user) if op_name(user) == "mul" and len(user.users) == 1 else user
    return as_product(summed if op_name(summed) == "sum" else user)


def between(firsts: Iterable[fx.Node], ends: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node on a path from one of the first nodes to one of the last ones, both included."""
    last = max(ends)
    after = _closure(firsts, lambda node: (u for u in node.users if not last < u))
    return _closure(ends, lambda node: (n for n in node.all_input_nodes if n in after))


def made_of(firsts: Iterable[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on values of the first nodes, and not on their shapes alone."""
    return _closure(firsts, lambda node: (u for u in node.users if u in inside and node in values_read(u)))


def _closure(start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    reached, stack = set(start), list(start)
    while stack:
        for node in step(stack.pop()):
            if node not in reached:
                reached.add(node)
                stack.append(node)
    return reached


def readers_of(inside: set[fx.Node], ends: set[fx.Node], softmax: fx.Node) -> Iterable[Reader]:
    """The nodes that read a tensor which a kernel would not compute."""
    sums = {"sum", "amax", "max", "logsumexp"}
    for node in sorted(inside - ends):
        for user in node.users:
            if user in inside or DRAFT in user.meta:
                continue
            made = node.args[0] if op_name(node) == "getitem" else node
            of_sums = (isinstance(made, fx.Node) and op_name(made) in sums) or op_name(user) in (
                "logsumexp",
                "log_softmax",
                "special_logsumexp",
            )
            what = "log-sum-exp" if of_sums else "weights" if not node < softmax else "scores"
            yield Reader(what, user)


def _operands_of(weights: Weights, product: Product) -> Iterator[fx.Node]:
    """The masks, scales, sinks and values of an attention."""
    yield from operands_of(weights.scores)
    yield from (scale.node for scale in weights.tensor_scales)
    yield from {product.left, product.right} - {weights.node}


def operands_of(scores: Scores) -> Iterator[fx.Node]:
    """What else than query and key the scores are made of."""
    yield from (term.node for term in scores.terms)
    yield from (scale.node for scale in scores.tensor_scales)
    yield from [scores.sink[0]] if scores.sink else []


def operands_made(inside: set[fx.Node], operands: Iterable[fx.Node], softmax: fx.Node) -> Iterable[Reader]:
    """Operands that depend on the scores or weights themselves."""
    for node in sorted(without_drafts(operands)):
        if node in inside:
            yield Reader("scores" if node < softmax else "weights", node)
