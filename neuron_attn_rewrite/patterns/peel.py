"""The walk back from the softmax to the product of query and key. A rule of `scores.py` undoes each node on the way.

The walk collects the normal form `softmax(softcap(multiplier * product) + terms, sink)`. It ends at a node without a
rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from math import copysign, frexp, inf, isfinite, prod
from typing import TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph.nodes import draws, dtype, is_tensor, op_name, shape, tensor
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dims, axis_dim
from neuron_attn_rewrite.patterns.products import Product, as_product
from neuron_attn_rewrite.patterns.rules import Blocked, Rules
from neuron_attn_rewrite.patterns.site import SoftmaxFacts, Term
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.cells import UNKNOWN, CellTable
from neuron_attn_rewrite.values.evaluator import Evaluator
from neuron_attn_rewrite.values.exact import is_algebraic, largest, number_in, product

MOST_COMPARED = 2**24
"""The most elements of a mask that is compared by value."""


@dataclass(frozen=True)
class TensorScale:
    """A tensor that multiplies or divides the scores or the weights."""

    node: fx.Node
    dims: Dims
    divides: bool = False


@dataclass(frozen=True)
class Scores(SoftmaxFacts):
    """A tensor on the way back from the softmax to the product, and what happens to it until the softmax.

    Every method is one step back: it records an operation that comes before all that are already recorded.
    """

    node: fx.Node
    dims: Dims
    key_dim: int
    """Position in `axes` of the dim that the softmax runs over."""
    axes: Dims
    """What the dims of the softmax' input run over. Without the sink's column, if there is one.

    They stay the same during the walk, and `dims` changes with `node`.
    """
    multiplier: float = 1.0
    """The number that multiplies `node`, inside the softcap and all terms."""
    growth: float = 1.0
    """The largest factor by which `node` has been multiplied at some point on the way, at least 1."""
    limit: float = inf
    """The largest finite number of the dtypes on the way: a score beyond it becomes infinite there."""
    tensor_scales: tuple[TensorScale, ...] = ()
    sink: tuple[fx.Node, Dims] | None = None
    division: fx.Node | None = None
    """The node that divides by the sum of the exponentials behind the second product; None for normalised weights."""
    is_part: bool = False
    """Whether the softmax runs over other scores as well, so that a number added to all of these changes it."""
    trail: tuple[str, ...] = ()
    """The steps so far, in words, from the product to the softmax."""

    def to(self, node: object, dims: Dims | None = None, trail: str = "") -> Scores:
        """Go on at `node`, whose dims are the same unless given."""
        assert isinstance(node, fx.Node)
        limit = min(self.limit, largest(dtype(self.node)))
        said = (trail, *self.trail) if trail else self.trail
        return replace(self, node=node, dims=self.dims if dims is None else dims, trail=said, limit=limit)

    def scaled(self, number: float) -> Scores:
        """The scores were multiplied by a number."""
        both = product(self.multiplier, number)
        if both is None:
            raise Blocked(self.node, Reason("scale-unknown", "its factors can't be joined in the range of its dtype"))
        return replace(self, multiplier=both, growth=max(1.0, self.growth * abs(number)))

    def scaled_by(self, scale: fx.Node, divides: bool = False) -> Scores:
        """The scores were multiplied (or divided) by a tensor that broadcasts to them."""
        if self.softcap is not None:
            raise Blocked(self.node, Reason("order", "a tensor scale inside a softcap"))
        made = TensorScale(scale, views.broadcast(scale, self.dims), divides)
        return replace(self, tensor_scales=(made, *self.tensor_scales))

    def added(self, term: fx.Node, weight: float = 1.0) -> Scores:
        """`weight * term`, which broadcasts to the scores, was added."""
        dims = views.broadcast(term, self._outside().dims)
        multiplier = product(self.multiplier, weight)
        if multiplier is None:
            raise Blocked(self.node, Reason("order", "a mask or bias with a factor that leaves the range of its dtype"))
        limit = min(self.limit, largest(dtype(self.node))) * abs(self.multiplier) / self.growth
        alike = abs(frexp(self.multiplier)[0]) == 0.5
        return replace(self, terms=(Term("add", term, dims, multiplier, limit=limit, rounds_alike=alike), *self.terms))

    def shifted(self) -> Scores:
        """Something that is the same for all scores of a row was added. It changes no softmax, and is left out."""
        return replace(self, terms=tuple(replace(term, rounds_alike=False) for term in self.terms))

    def hidden(self, mask: fx.Node, fill: float, where: bool = True) -> Scores:
        """The scores were replaced by `fill` where the bool `mask` is `where`."""
        dims = views.broadcast(mask, self._outside().dims)
        term = Term("hide" if where else "show", mask, dims, fill=self._filled(fill))
        return replace(self, terms=(term, *self.terms))

    def _filled(self, fill: float) -> float:
        """What a number that replaces scores is at the softmax: in the dtypes on the way, times the multiplier."""
        fill = number_in(dtype(self.node), fill)
        if not isfinite(fill) or abs(fill) * self.growth <= self.limit:
            return fill * self.multiplier
        if self.multiplier == self.growth == 1.0:
            return copysign(inf, fill)
        raise Blocked(self.node, Reason("order", "a fill that leaves the range of its dtype when it is multiplied"))

    def _outside(self) -> Scores:
        if self.tensor_scales or self.softcap is not None:
            raise Blocked(self.node, Reason("order", "a mask or bias inside a softcap or a tensor scale"))
        return self


@dataclass(frozen=True)
class Walk:
    """What every rule may use: constants, values of masks, and new axes."""

    evaluator: Evaluator
    fresh_axes: Iterator[int] = field(default_factory=count)

    def begin(self, softmax: fx.Node, scores: object, dim: int, trail: str = "") -> Scores:
        """The scores of which `softmax` is the softmax along `dim`. Both have the same shape."""
        dims = tuple(axis_dim(next(self.fresh_axes), size) for size in shape(softmax))
        if not isinstance(scores, fx.Node) or shape(scores) != shape(softmax):
            raise Blocked(softmax, Reason("axes", "the softmax is not one of a tensor of its shape"))
        limit = largest(dtype(softmax))
        return Scores(scores, dims, dim % len(dims), dims, limit=limit, trail=(trail,) if trail else ())

    def constant(self, value: object) -> float | None:
        """A number, or the element of a tensor that holds one number and depends on constants alone."""
        return self.evaluator.constant(value)

    def made_alike(self, a: object, b: object) -> bool:
        """See `made_alike`."""
        return made_alike(self.evaluator, a, b)

    def tables(self, *nodes: fx.Node) -> tuple[CellTable, ...] | None:
        """The nodes' values for all inputs, element by element; None if one is not known, or too large to compare."""
        if any(prod(shape(node)) > MOST_COMPARED for node in nodes):
            return None
        found = [self.evaluator.table(node) for node in nodes]
        known = tuple(table for table in found if isinstance(table, CellTable) and not (table.cell == UNKNOWN).any())
        return known if len(known) == len(nodes) else None

    def peel(self, scores: Scores) -> tuple[Scores, Product]:
        """Walk back to the product of query and key.

        Raises:
            Blocked: at a node that no rule knows.
        """
        while True:
            product = as_product(scores.node)
            if product is not None:
                if product.addend is not None:
                    scores = scores.added(product.addend, product.beta)
                return scores.scaled(product.alpha), product
            moved = views.before(scores.node, scores.dims, self.evaluator)
            if moved is not None:
                scores = scores.to(*moved)
                continue
            step = SCORES.ask(scores.node, self, scores)
            if step is None:
                raise Blocked(scores.node)
            if isinstance(step, tuple):
                return step
            scores = step


ScoresRule: TypeAlias = Callable[[Walk, Scores], "Scores | tuple[Scores, Product] | None"]
"""Undoes the operator at `scores.node`: one step back, or the whole way to the product; None if it is another's."""

SCORES: Rules[ScoresRule] = Rules()


def scaled_by_number(evaluator: Evaluator, node: fx.Node) -> tuple[fx.Node, float] | None:
    """`x * c`, `c * x`, `x / c` or `-x` as (x, factor). None in dtypes in which this wraps."""
    name = op_name(node)
    if tensor(node) is None or not is_algebraic(dtype(node)):
        return None
    if name == "neg" and isinstance(node.args[0], fx.Node):
        return node.args[0], -1.0
    if name not in ("mul", "div"):
        return None
    left, right = node.args[:2]
    for scaled, factor in ((left, right), (right, left))[: 1 if name == "div" else 2]:
        number = evaluator.constant(factor)
        if is_tensor(scaled) and number and shape(scaled) == shape(node):
            joined = product(1.0, 1 / number if name == "div" else number)
            return None if joined is None else (scaled, joined)
    return None


def made_alike(evaluator: Evaluator, a: object, b: object) -> bool:
    """Whether two arguments are made by the same operators from the same inputs, and so have the same value."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and a == b
    if {a, b} & evaluator.changed:
        return False  # what they hold when they are read may differ
    if a is b:
        return True
    if a.op != b.op or a.op not in ("call_function", "get_attr"):
        return False
    if a.op == "get_attr":
        return a.target == b.target or _equal(evaluator.value(a), evaluator.value(b))
    if a.target != b.target or draws(a):
        return False
    (given, like), (other, unlike) = (pytree.tree_flatten((n.args, n.kwargs)) for n in (a, b))
    return like == unlike and all(map(partial(made_alike, evaluator), given, other))


def _equal(one: object, two: object) -> bool:
    """Whether two stored values are known, and the same."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.is_meta or one.numel() > MOST_COMPARED:
        return False
    return one.dtype == two.dtype and not two.is_meta and torch.equal(one, two)
