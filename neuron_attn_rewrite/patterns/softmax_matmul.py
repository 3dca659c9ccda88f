"""Attention written as products around a softmax.

Backwards from the softmax `peel` finds the product of query and key; forwards each node is followed to the product with
the value. To teach it what else may happen to the probabilities, extend `_forward`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

from torch import fx

from neuron_attn_rewrite.graph import arguments, module_path, op_name, shape
from neuron_attn_rewrite.masks.tables import Evaluator
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dims, axis_dim, dim_size
from neuron_attn_rewrite.patterns.build import Found, View, build
from neuron_attn_rewrite.patterns.peel import Blocked, Scores, Walk
from neuron_attn_rewrite.patterns.products import Product, as_product
from neuron_attn_rewrite.patterns.site import AttentionSite, UnknownAttention
from neuron_attn_rewrite.reasons import Reason

SOFTMAXES = {"softmax", "_softmax", "_safe_softmax", "special_softmax"}


@dataclass(frozen=True)
class Probabilities:
    """A tensor on the way from the softmax to the product with the value."""

    node: fx.Node
    dims: Dims
    has_sink: bool


def find_softmax_matmul(softmax: fx.Node, evaluator: Evaluator) -> AttentionSite | UnknownAttention | None:
    """The attention around a softmax; None if its probabilities meet no product, so that it is no attention."""
    fresh = count()
    walk = Walk(evaluator, fresh)
    given = tuple(axis_dim(next(fresh), size) for size in shape(softmax))
    key_dim = arguments(softmax)["dim"] % len(given)
    start = Scores(views.source(softmax), given, key_dim, given)
    peeled = walk.peel(start)
    scores = start if isinstance(peeled, Blocked) else peeled[0]

    def unknown(blocked: Blocked) -> UnknownAttention:
        return UnknownAttention(module_path(softmax), _pattern(scores), softmax, blocked.reason)

    followed = _follow(Probabilities(softmax, given, scores.sink is not None), scores)
    if isinstance(peeled, Blocked):
        return unknown(peeled) if _meets_product(softmax) and not _is_router(peeled) else None
    if isinstance(followed, Blocked):
        return unknown(followed)
    first = _query_and_key(walk, scores, peeled[1])
    second = _value_and_output(walk, scores, *followed)
    if isinstance(first, Blocked) or isinstance(second, Blocked):
        return unknown(first if isinstance(first, Blocked) else second)  # type: ignore[arg-type]
    found = Found(
        pattern=_pattern(scores),
        anchor=softmax,
        output=second[1],
        scores=scores.axes,
        key_dim=key_dim,
        query=first[0],
        key=first[1],
        value=second[0],
        scale=scores.multiplier * (scores.softcap or 1.0),
        factors=scores.factors,
        terms=scores.terms,
        softcap=scores.softcap,
        sink=View(*scores.sink) if scores.sink else None,
        safe=op_name(softmax) == "_safe_softmax",
    )
    return build(found, evaluator)


def _pattern(scores: Scores) -> str:
    return " > ".join(("matmul", *scores.trail, "softmax", "matmul"))


def _is_router(blocked: Blocked) -> bool:
    """Scores that come straight from a weight: a gate over experts or a pooling, not an attention."""
    return op_name(blocked.node) in ("linear", "addmm", "conv1d", "conv2d")


def _meets_product(node: fx.Node) -> bool:
    """Whether the probabilities end in a product with something else."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if as_product(node) is not None:
            return True
    return any(as_product(user) is not None for user in node.users)


def _follow(p: Probabilities, scores: Scores) -> tuple[Probabilities, fx.Node] | Blocked:
    """Follow the probabilities to the one product that uses them."""
    while True:
        users = list(p.node.users)
        if len(users) != 1:
            names = ", ".join(user.name for user in users) or "nothing"
            return Blocked(p.node, Reason("weights-used", f"its probabilities go to {names}, not to one product alone"))
        if as_product(users[0]) is not None and not p.has_sink:
            return p, users[0]
        step = _forward(p, users[0], scores)
        if isinstance(step, Blocked):
            return step
        p = step


def _forward(p: Probabilities, user: fx.Node, scores: Scores) -> Probabilities | Blocked:
    """One step on: a view, a cast, an inactive dropout, or the slice that drops a sink's column."""
    dims = views.after(user, p.dims)
    if dims is not None:
        return replace(p, node=user, dims=dims)
    if op_name(user) in views.DROPOUTS:
        return Blocked(user, Reason("dropout-active", "dropout is active"))
    if op_name(user) == "slice" and p.has_sink:
        values = arguments(user)
        keys = dim_size(scores.axes[scores.key_dim])
        on_keys = values["dim"] % len(p.dims) == scores.key_dim
        if on_keys and not values["start"] and values["step"] == 1 and shape(user)[scores.key_dim] == keys:
            return Probabilities(user, scores.axes, has_sink=False)
    return Blocked(user)


def _query_and_key(walk: Walk, scores: Scores, product: Product) -> tuple[View, View] | Blocked:
    """The operands of the first product, told apart by which one has the keys."""
    by_label = dict(zip(product.out_labels, scores.dims, strict=True))
    for size, label in zip(shape(product.left), product.left_labels, strict=True):
        if label in product.summed:
            by_label[label] = axis_dim(next(walk.fresh_axes), size)
    left, right = (
        View(node, tuple(() if size == 1 else by_label[label] for size, label in zip(shape(node), labels, strict=True)))
        for node, labels in ((product.left, product.left_labels), (product.right, product.right_labels))
    )
    key_axes = {atom.axis for atom in scores.axes[scores.key_dim]}
    left_has, right_has = (any(a.axis in key_axes for dim in view.dims for a in dim) for view in (left, right))
    if left_has == right_has:
        return Blocked(scores.node, Reason("axes", "the softmax does not run over the keys alone"))
    return (right, left) if left_has else (left, right)


def _value_and_output(walk: Walk, scores: Scores, p: Probabilities, node: fx.Node) -> tuple[View, View] | Blocked:
    """The other operand of the second product, and the product."""
    product = as_product(node)
    assert product is not None
    if product.left is product.right or product.addend is not None or product.alpha != 1:
        return Blocked(node, Reason("axes", "the product is not one with a value alone"))
    sides = ((product.left, product.left_labels), (product.right, product.right_labels))
    (_, p_labels), (value, v_labels) = sides if product.left is p.node else sides[::-1]
    by_label = dict(zip(p_labels, p.dims, strict=True))
    summed = [by_label[label] for label in product.summed if by_label[label]]
    if [atom for dim in summed for atom in dim] != list(scores.axes[scores.key_dim]):
        return Blocked(node, Reason("axes", "the product does not sum over the keys"))
    for size, label in zip(shape(value), v_labels, strict=True):
        if size > 1 and not by_label.get(label):
            by_label[label] = axis_dim(next(walk.fresh_axes), size)
    dims = tuple(() if size == 1 else by_label[label] for size, label in zip(shape(value), v_labels, strict=True))
    return View(value, dims), View(node, tuple(by_label.get(label, ()) for label in product.out_labels))
