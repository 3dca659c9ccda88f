"""Attention written as products around a softmax.

Backwards from the softmax `peel` finds the product of query and key; forwards `follow` finds the products with a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import fx

from neuron_attn_rewrite.graph.nodes import is_tensor, module_path, op_name, shape, tensor, values_read
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dims, atoms, axis_dim, refine
from neuron_attn_rewrite.patterns.build import Found, View, build
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
        [UnknownAttention(module_path(softmax), "softmax > matmul", softmax, reason)] if _meets_product(softmax) else []
    )


def find_softmax_matmul(
    softmax: fx.Node, start: Scores, walk: Walk, order: Mapping[fx.Node, int]
) -> list[AttentionSite | UnknownAttention]:
    """The attentions whose weights `softmax` holds, one for each product; none if there is no product."""
    scores, ends = start, []
    try:
        scores, first = walk.peel(start)
        weights = Weights(softmax, start.dims, scores, start.node, scores.sink is not None)
        ends = _products(walk, weights)
        last = [start.division or product.node for _, product in ends]
        inside = between(first.node, last, order)
        made = _made_of(first.node, inside) - set(last)
        readers = (*_readers(inside, set(last), softmax, order), *_operands_made(made, ends, softmax, order))
        return [_build(walk, softmax, start, first, *end, readers) for end in ends]
    except Blocked as blocked:
        if not ends and (_is_router(blocked.node) or not _meets_product(softmax)):
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
    query, key = _query_and_key(walk, scores, first)
    value, output = _value_and_output(walk, weights, second)
    if scores.division is not None:
        output = _divided(output, scores.division, softmax, scores)
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


def _is_router(node: fx.Node) -> bool:
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


def _meets_product(softmax: fx.Node) -> bool:
    """Whether the weights, or something made of them element by element, end in a product with something else."""
    open_ends, seen = [softmax], {softmax}
    while open_ends and len(seen) < MOST_FOLLOWED:
        for user in open_ends.pop(0).users:
            if is_product(user):
                return True
            if user not in seen and op_name(user) not in MIXES and tensor(user) is not None:
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


def between(first: fx.Node, ends: list[fx.Node], order: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Every node on a path from the first node to one of the last ones, both included."""
    last = max(order[end] for end in ends)
    after = _closure([first], lambda node: (u for u in node.users if order[u] <= last))
    return _closure(ends, lambda node: (n for n in node.all_input_nodes if n in after))


def _made_of(first: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on values of the first node, and not on its shape alone."""
    return _closure([first], lambda node: (u for u in node.users if u in inside and node in values_read(u)))


def _closure(start: list[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    reached, stack = set(start), list(start)
    while stack:
        for node in step(stack.pop()):
            if node not in reached:
                reached.add(node)
                stack.append(node)
    return reached


def _readers(
    inside: set[fx.Node], ends: set[fx.Node], softmax: fx.Node, order: Mapping[fx.Node, int]
) -> Iterable[Reader]:
    """The nodes that read a tensor which a kernel would not compute."""
    sums = {"sum", "amax", "max", "logsumexp", "getitem"}
    for node in sorted(inside - ends, key=order.__getitem__):
        for user in node.users:
            if user in inside:
                continue
            of_sums = op_name(node) in sums or op_name(user) in ("logsumexp", "log_softmax", "special_logsumexp")
            what = "log-sum-exp" if of_sums else "weights" if order[node] >= order[softmax] else "scores"
            yield Reader(what, user)


def _operands_made(
    inside: set[fx.Node], ends: list[tuple[Weights, Product]], softmax: fx.Node, order: Mapping[fx.Node, int]
) -> Iterable[Reader]:
    """Masks, scales, sinks and values that depend on the scores or weights themselves."""
    operands: dict[fx.Node, None] = {}
    for weights, product in ends:
        scores = weights.scores
        given = [term.node for term in scores.terms]
        given += [scale.node for scale in (*scores.tensor_scales, *weights.tensor_scales)]
        given += [scores.sink[0]] if scores.sink else []
        operands |= dict.fromkeys([*given, *({product.left, product.right} - {weights.node})])
    for node in operands:
        if node in inside:
            yield Reader("weights" if order[node] >= order[softmax] else "scores", node)


def _query_and_key(walk: Walk, scores: Scores, product: Product) -> tuple[View, View]:
    """The query and the key of the first product. The key is the operand that runs over the keys."""
    by_label = dict(zip(product.out_labels, scores.dims, strict=True))
    other = dict(zip(product.right_labels, shape(product.right), strict=True))
    for size, label in zip(shape(product.left), product.left_labels, strict=True):
        if label in product.summed and size != other[label]:
            raise Blocked(product.node, Reason("axes", "one operand has a single feature, which is repeated"))
        if label in product.summed:
            by_label[label] = axis_dim(next(walk.fresh_axes), size)
    left, right = (
        View(node, tuple(() if size == 1 else by_label[label] for size, label in zip(shape(node), labels, strict=True)))
        for node, labels in ((product.left, product.left_labels), (product.right, product.right_labels))
    )
    if not scores.axes[scores.key_dim]:
        raise Blocked(scores.node, Reason("one-key", "there is only one key"))
    key_axes = {atom.axis for atom in scores.axes[scores.key_dim]}
    left_has, right_has = (any(a.axis in key_axes for dim in view.dims for a in dim) for view in (left, right))
    if left_has == right_has:
        raise Blocked(scores.node, Reason("axes", "the softmax does not run over the keys alone"))
    return (right, left) if left_has else (left, right)


def _value_and_output(walk: Walk, weights: Weights, product: Product) -> tuple[View, View]:
    """The other operand of the second product, and the product."""
    if product.left is product.right or product.addend is not None:
        raise Blocked(product.node, Reason("axes", "the product is not one with a value alone"))
    sides = ((product.left, product.left_labels), (product.right, product.right_labels))
    (_, p_labels), (value, v_labels) = sides if product.left is weights.node else sides[::-1]
    by_label = dict(zip(p_labels, weights.dims, strict=True))
    summed = [by_label[label] for label in product.summed if by_label[label]]
    keys = weights.scores.axes[weights.scores.key_dim]
    if sorted(refine(atoms(summed), keys)) != sorted(refine(keys, atoms(summed))):
        raise Blocked(product.node, Reason("axes", "the product does not sum over the keys"))
    for size, label in zip(shape(value), v_labels, strict=True):
        if size > 1 and not by_label.get(label):
            by_label[label] = axis_dim(next(walk.fresh_axes), size)
    dims = tuple(() if size == 1 else by_label[label] for size, label in zip(shape(value), v_labels, strict=True))
    return View(value, dims), View(product.node, tuple(by_label.get(label, ()) for label in product.out_labels))


def _divided(output: View, division: fx.Node, exponentials: fx.Node, scores: Scores) -> View:
    """The product with the value, divided by the sum of its own weights over the keys."""
    blocked = Blocked(division, Reason("axes", "it does not divide by the sum of the weights over the keys"))
    steps, node = [], division.args[0]
    while node is not output.node:
        if not isinstance(node, fx.Node) or not node.args:
            raise blocked
        steps.append(node)
        node = node.args[0]
    dims: Dims | None = output.dims
    for step in reversed(steps):
        dims = None if dims is None else views.after(views.source(step), step, dims)
    total = division.args[1]
    if dims is None or not isinstance(total, fx.Node):
        raise blocked
    rows = views.broadcast(total, dims)
    while (moved := views.before(total, rows)) is not None:
        total, rows = moved
    kept = len(rows) == len(scores.axes)
    wanted = [() if i == scores.key_dim else dim for i, dim in enumerate(scores.axes) if kept or i != scores.key_dim]
    if op_name(total) != "sum" or total.args[0] is not exponentials or list(rows) != wanted:
        raise blocked
    return View(division, dims)
