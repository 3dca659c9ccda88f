"""The walk back from the softmax: each node is undone by the rule that knows its algebra.

What is collected is the normal form `softmax(softcap(multiplier * product) + terms, sink)`. A node without a rule stops
the walk. To teach it a new spelling, add one function to `BACKWARD`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import fx

from neuron_attn_rewrite.graph import arguments, is_tensor, op_name, shape
from neuron_attn_rewrite.masks.tables import Evaluator
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dims, axis_dim
from neuron_attn_rewrite.patterns.products import Product, as_product
from neuron_attn_rewrite.patterns.site import Term
from neuron_attn_rewrite.reasons import Reason

NO_RULE = Reason("unknown-node", "no rule knows it")


@dataclass(frozen=True)
class Blocked:
    """Where a walk stopped."""

    node: fx.Node
    why: Reason = NO_RULE

    @property
    def reason(self) -> Reason:
        return self.why.behind(f"not understood at {self.node.name} ({op_name(self.node) or self.node.op}): ")


@dataclass(frozen=True)
class Factor:
    """A tensor that multiplies the scores."""

    node: fx.Node
    dims: Dims
    divides: bool


@dataclass(frozen=True)
class Scores:
    """A tensor on the way from the product to the softmax, and everything that was peeled after it."""

    node: fx.Node
    dims: Dims
    key_dim: int
    """Position of the keys in the softmax' input."""
    axes: Dims
    """The dims of the softmax' input, without a sink."""
    multiplier: float = 1.0
    factors: tuple[Factor, ...] = ()
    terms: tuple[Term, ...] = ()
    softcap: float | None = None
    sink: tuple[fx.Node, Dims] | None = None
    trail: tuple[str, ...] = ()

    def to(self, node: fx.Node, dims: Dims | None = None, trail: str = "", **changes: object) -> Scores:
        """One step back, to `node`."""
        said = (trail, *self.trail) if trail else self.trail
        return replace(self, node=node, dims=self.dims if dims is None else dims, trail=said, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Walk:
    """What every rule may use."""

    evaluator: Evaluator
    fresh_axes: Iterator[int]

    def peel(self, scores: Scores) -> tuple[Scores, Product] | Blocked:
        """Walk back to the product of query and key."""
        while True:
            product = as_product(scores.node)
            if product is not None:
                return _enter(scores, product)
            moved = views.before(scores.node, scores.dims)
            if moved is not None:
                scores = scores.to(*moved)
                continue
            rule = BACKWARD.get(op_name(scores.node))
            step = rule(self, scores) if rule else Blocked(scores.node)
            if not isinstance(step, Scores):
                return step
            scores = step


def _enter(scores: Scores, product: Product) -> tuple[Scores, Product] | Blocked:
    """The product itself may scale and add (baddbmm)."""
    if product.addend is not None:
        if scores.factors or scores.softcap is not None:
            return Blocked(scores.node, Reason("order", "a term is added before a tensor scale or a softcap"))
        dims = views.broadcast(product.addend, scores.dims)
        term = Term("add", product.addend, dims, scores.multiplier * product.beta)
        scores = replace(scores, terms=(term, *scores.terms))
    return replace(scores, multiplier=scores.multiplier * product.alpha), product


def scaled_by_number(evaluator: Evaluator, node: fx.Node) -> tuple[fx.Node, float] | None:
    """`x * c`, `c * x` or `x / c` as (x, c)."""
    name = op_name(node)
    if name not in ("mul", "div") or (name == "div" and node.kwargs.get("rounding_mode")):
        return None
    left, right = node.args[:2]
    for tensor, factor in ((left, right), (right, left))[: 1 if name == "div" else 2]:
        number = evaluator.constant(factor)
        if is_tensor(tensor) and number and shape(tensor) == shape(node):  # type: ignore[arg-type]
            assert isinstance(tensor, fx.Node)
            return tensor, 1 / number if name == "div" else number
    return None


# Rules of the walk back


def _scale(walk: Walk, scores: Scores) -> Scores | Blocked:
    """A scale: a number is folded, a tensor is kept as a factor."""
    node = scores.node
    scaled = scaled_by_number(walk.evaluator, node)
    if scaled is not None:
        return scores.to(scaled[0], trail="scale", multiplier=scores.multiplier * scaled[1])
    left, right = node.args[:2]
    divides = op_name(node) == "div"
    if scores.softcap is not None or not is_tensor(left) or not is_tensor(right) or node.kwargs.get("rounding_mode"):
        return Blocked(node, Reason("scale-unknown", "the scale is not a number"))
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if shape(left) != shape(node):
        left, right = right, left
    if shape(left) != shape(node) or (divides and left is not node.args[0]):
        return Blocked(node, Reason("scale-unknown", "the scale broadcasts the scores"))
    factor = Factor(right, views.broadcast(right, scores.dims), divides)
    return scores.to(left, trail="tensor scale", factors=(factor, *scores.factors))


def _add(walk: Walk, scores: Scores) -> Scores | Blocked | tuple[Scores, Product]:
    """A sum: a number shifts all scores alike and vanishes; of two tensors one leads on to the product."""
    node = scores.node
    subtracts = op_name(node) == "sub"
    if arguments(node)["alpha"] != 1 or scores.factors or scores.softcap is not None:
        return Blocked(node, Reason("order", "a sum with alpha, or before a tensor scale or a softcap"))
    left, right = node.args[:2]
    pairs = [(left, right)] if subtracts else [(left, right), (right, left)]
    sides = [(a, b) for a, b in pairs if isinstance(a, fx.Node) and shape(a) == shape(node)]
    for inner, other in sides:
        if walk.evaluator.constant(other) is not None:
            return scores.to(inner, trail="shift")
        if subtracts and isinstance(other, fx.Node) and _is_row_maximum(other, scores):
            return scores.to(inner, trail="row maximum")
    blocked = Blocked(node, Reason("no-product", "neither side leads to a product"))
    for inner, other in sides:
        if not isinstance(other, fx.Node):
            continue
        weight = -scores.multiplier if subtracts else scores.multiplier
        term = Term("add", other, views.broadcast(other, scores.dims), weight)
        result = walk.peel(scores.to(inner, trail="add", terms=(term, *scores.terms)))
        if not isinstance(result, Blocked):
            return result
        blocked = result
    return blocked


def _is_row_maximum(node: fx.Node, scores: Scores) -> bool:
    """The maximum over the keys of the very scores from which it is subtracted: it does not change the softmax."""
    while views.keeps_values(node) or op_name(node) == "getitem":
        node = views.source(node)
    if op_name(node) not in ("amax", "max"):
        return False
    dims = node.args[1] if len(node.args) > 1 else None
    over = [dims] if isinstance(dims, int) else dims
    rank = len(scores.dims)
    if views.source(node) is not scores.node.args[0] or not isinstance(over, (list, tuple)) or len(over) != 1:
        return False
    return scores.dims[int(over[0]) % rank] == scores.axes[scores.key_dim]  # type: ignore[arg-type]


def _masked_fill(walk: Walk, scores: Scores) -> Scores | Blocked:
    node = scores.node
    inner, mask, value = node.args[:3]
    fill = walk.evaluator.constant(value)
    return _filled(scores, "hide", inner, mask, fill)


def _where(walk: Walk, scores: Scores) -> Scores | Blocked:
    node = scores.node
    if len(node.args) != 3:
        return Blocked(node, Reason("fill-unknown", "it has no replacement value"))
    mask, yes, no = node.args
    for kind, inner, other in (("show", yes, no), ("hide", no, yes)):
        fill = walk.evaluator.constant(other)
        if fill is None and isinstance(other, fx.Node):
            fill = _uniform(walk.evaluator, other)
        if fill is not None:
            return _filled(scores, kind, inner, mask, fill)
    return Blocked(node, Reason("fill-unknown", "neither side is a number"))


def _uniform(evaluator: Evaluator, node: fx.Node) -> float | None:
    """The number that fills a constant tensor, such as full_like(scores, finfo.min)."""
    if op_name(node) in ("full_like", "full"):
        return evaluator.constant(node.args[1])
    return None


def _filled(scores: Scores, kind: str, inner: object, mask: object, fill: float | None) -> Scores | Blocked:
    node = scores.node
    if fill is None or not isinstance(inner, fx.Node) or not isinstance(mask, fx.Node) or shape(inner) != shape(node):
        return Blocked(node, Reason("fill-unknown", "the filled value is not a number"))
    if scores.softcap is not None or scores.factors:
        return Blocked(node, Reason("order", "a mask before a softcap or a tensor scale"))
    term = Term(kind, mask, views.broadcast(mask, scores.dims), fill=fill * scores.multiplier)
    return scores.to(inner, trail="where" if kind == "show" else "masked_fill", terms=(term, *scores.terms))


def _clamp(walk: Walk, scores: Scores) -> Scores | Blocked:
    """A lower limit so low that it hides nothing: `max(scores, finfo.min)`."""
    node = scores.node
    lower = next((walk.evaluator.constant(a) for a in node.args[1:2]), None)
    upper = node.args[2] if op_name(node) == "clamp" and len(node.args) > 2 else None
    if lower is None or lower > -1e30 or upper is not None or not is_tensor(node.args[0]):
        return Blocked(node, Reason("limit", "a limit that could change scores"))
    return scores.to(node.args[0], trail="clamp")  # type: ignore[arg-type]


def _tanh(walk: Walk, scores: Scores) -> Scores | Blocked:
    """`c * tanh(x / c)`: everything outside so far is c, everything inside is the scale."""
    if scores.softcap is not None or scores.factors or scores.multiplier <= 0:
        return Blocked(scores.node, Reason("order", "a second softcap, or one with a tensor scale"))
    return scores.to(views.source(scores.node), trail="softcap", softcap=scores.multiplier, multiplier=1.0)


def _concatenated_sink(walk: Walk, scores: Scores) -> Scores | Blocked:
    """One more column that is not a key: a learned sink."""
    node = scores.node
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not isinstance(dim, int):
        return Blocked(node)
    inner, sink = parts
    assert isinstance(inner, fx.Node) and isinstance(sink, fx.Node)
    rank = len(scores.dims)
    on_keys = scores.dims[dim % rank] == scores.axes[scores.key_dim]
    first = scores.sink is None and not scores.terms and scores.multiplier == 1.0 and not scores.factors
    if not on_keys or not first or shape(sink)[dim] != 1 or scores.softcap is not None:
        return Blocked(node, Reason("sink-shape", "not one column of sinks beside the keys"))
    dims = list(scores.dims)
    dims[dim % rank] = axis_dim(next(walk.fresh_axes), shape(inner)[dim])
    sink_dims = views.broadcast(sink, tuple(dims))
    axes = list(scores.axes)
    axes[scores.key_dim] = dims[dim % rank]
    return scores.to(inner, tuple(dims), trail="sink", axes=tuple(axes), sink=(sink, sink_dims))


BACKWARD: dict[str, Callable[[Walk, Scores], Scores | Blocked | tuple[Scores, Product]]] = {
    "mul": _scale,
    "div": _scale,
    "add": _add,
    "sub": _add,
    "masked_fill": _masked_fill,
    "where": _where,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "maximum": _clamp,
    "tanh": _tanh,
    "cat": _concatenated_sink,
}
