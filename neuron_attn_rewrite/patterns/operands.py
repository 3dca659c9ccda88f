"""The operands of the two products of an attention, and what their dims run over."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from neuron_attn_rewrite.graph.nodes import op_name, shape
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dim, Dims, atoms, axis_dim, merged, refine
from neuron_attn_rewrite.patterns.peel import Scores, Walk, scaled_by_number
from neuron_attn_rewrite.patterns.products import Product
from neuron_attn_rewrite.patterns.rules import Blocked
from neuron_attn_rewrite.patterns.weights import Weights
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.evaluator import Evaluator
from neuron_attn_rewrite.values.exact import product as product_of


@dataclass(frozen=True)
class View:
    """A tensor of the graph and what its dims run over."""

    node: fx.Node
    dims: Dims


@dataclass(frozen=True)
class Stage:
    """One tensor from which an operand is made. The operand is `scale` times this tensor."""

    view: View
    scale: float


def chain(view: View, evaluator: Evaluator) -> list[Stage]:
    """The operand, and the tensors that it is made from by views, widening casts and scales that are numbers.

    The last one is the deepest.
    """
    stages = [Stage(view, 1.0)]
    while True:
        node, dims, scale = stages[-1].view.node, stages[-1].view.dims, stages[-1].scale
        scaled = scaled_by_number(evaluator, node)
        moved = views.before(node, dims, evaluator)
        joined = None if scaled is None else product_of(scale, scaled[1])
        if scaled is not None and joined is not None:
            stages.append(Stage(View(scaled[0], dims), joined))
        elif moved is not None and (op_name(node) not in views.CASTS or views.widens(node)):
            stages.append(Stage(View(*moved), scale))
        else:
            return stages


def features(a: Dims, b: Dims, scores: Dims) -> Dim:
    """The axes that both tensors run over and the scores do not: the features."""
    known = {atom.axis for atom in atoms(scores)}
    common = {atom.axis for atom in atoms(b)} - known
    return merged(atom for atom in atoms(a) if atom.axis in common)


def query_and_key(walk: Walk, scores: Scores, product: Product, query: View | None = None) -> tuple[View, View]:
    """The query and the key of the first product. The key is the operand that runs over the keys.

    If the product has only one key, `query` tells which of its operands is the query.
    """
    if product.operands is not None:
        (one, one_dims), (two, two_dims) = product.operands
        return View(one, one_dims), View(two, two_dims)
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
        alike = [] if query is None else [view for view in (left, right) if _is_made_alike(walk, view, query)]
        if len(alike) != 1:
            raise Blocked(scores.node, Reason("one-key", "there is only one key"))
        return (left, right) if alike[0] is left else (right, left)
    key_axes = {atom.axis for atom in scores.axes[scores.key_dim]}
    left_has, right_has = (any(a.axis in key_axes for dim in view.dims for a in dim) for view in (left, right))
    if left_has == right_has:
        raise Blocked(scores.node, Reason("axes", "the softmax does not run over the keys alone"))
    return (right, left) if left_has else (left, right)


def _is_made_alike(walk: Walk, one: View, other: View) -> bool:
    """Whether two operands are made of the same tensor."""
    ends = (chain(view, walk.evaluator)[-1].view.node for view in (one, other))
    return walk.made_alike(*ends)


def value_and_output(walk: Walk, weights: Weights, product: Product) -> tuple[View, View]:
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


def divided(output: View, division: fx.Node, exponentials: fx.Node, scores: Scores) -> View:
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
