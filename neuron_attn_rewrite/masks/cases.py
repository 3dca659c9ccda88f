"""One element of a tensor as a list of cases, and what is known of the variables in them.

At symbolic indices, an element has no single value. It is a list of cases: a value, and a guard. The guard is a set of
inequalities between indices, sizes and elements of integer inputs; the element has the value where all of them hold.
For every index exactly one guard holds. The element [i, j] of `torch.ones(4, 4).tril()`, for example, is

    1  where  i - j >= 0
    0  where  j - i - 1 >= 0

`Facts` knows the range of each variable, and uses it to decide whether a guard is possible.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph.nodes import dtype, tensor
from neuron_attn_rewrite.graph.sizes import LARGEST, expression_of, input_sizes, limits_of
from neuron_attn_rewrite.masks.affine import (
    Affine,
    Element,
    Floor,
    Guard,
    Index,
    Size,
    Truth,
    Variable,
    impossible,
    negated,
    variable,
)
from neuron_attn_rewrite.values.exact import holds

MOST_CASES = 64
"""An element with more cases is not followed."""
INDICES = (torch.int64, torch.int32)
LARGEST_INTEGER = 2**29
"""No size, and no number in an int64 or int32 tensor, is larger than this, apart from its sign.

Positions, lengths and numbers of segments are far smaller. So sums of a few of them don't leave int32.
"""
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
At: TypeAlias = tuple[Affine, ...]
"""The indices of one element, one for each dim."""
Value: TypeAlias = "Affine | float"
"""An exact integer (of any dtype), or a floating number."""


@dataclass(frozen=True)
class Case:
    """The value of an element where all inequalities of the guard hold."""

    guard: Guard
    value: Value


Cases: TypeAlias = tuple[Case, ...]


class Unknown(Exception):
    """There is no rule for an element. The message says why."""


@dataclass
class Facts:
    """The sizes of one graph as sums, and the range of each variable."""

    module: fx.GraphModule
    _ranges: dict[Variable, tuple[Affine, ...]] = field(default_factory=dict)
    _symbols: dict[Any, Any] = field(default_factory=dict)
    _fresh: Iterator[int] = field(default_factory=lambda: itertools.count(4))

    def __post_init__(self) -> None:
        sizes = [size for _, _, size in input_sizes(self.module.graph) if isinstance(size, torch.SymInt)]
        for size in sizes:
            self._symbols.update(size.node.shape_env.var_to_range)

    def size(self, value: Any) -> Affine:
        """A size as a sum.

        `value` is an int (also one that stands for symbols, see `graph/sizes.py`), a SymInt, or a node of either.
        """
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, int):
            return self._expression(expression_of(value)) if value > LARGEST else Affine(value)
        if not isinstance(value, torch.SymInt):
            raise Unknown(f"{value} is not a size")
        return self._expression(value.node.expr)

    def _expression(self, expression: Any) -> Affine:
        total = Affine()
        for term, coefficient in expression.expand().as_coefficients_dict().items():
            if not coefficient.is_Integer:
                raise Unknown(f"{expression} is not a sum of sizes")
            if term.is_Integer:
                total += int(term) * int(coefficient)
                continue
            of = Size(str(term))
            total += variable(of) * int(coefficient)
            lower, upper = limits_of(self._symbols.get(term))
            ends = [variable(of) - lower] + ([] if upper is None else [-variable(of) + upper])
            self._ranges.setdefault(of, tuple(ends) if term.is_Symbol else ())
        return total

    def ranges(self, of: Variable) -> tuple[Affine, ...]:
        """The inequalities that always hold of a variable, as sums of at least 0."""
        if isinstance(of, Truth):
            return variable(of), -variable(of) + 1
        if isinstance(of, Index):
            return variable(of), of.size - 1 - variable(of)
        if isinstance(of, Floor):
            rest = of.of - variable(of) * of.by
            return rest, -rest + (of.by - 1)
        return self._ranges.get(of, ())

    def impossible(self, inequalities: Iterable[Affine]) -> bool:
        """Whether the inequalities can't hold together. False if this can't be shown."""
        return impossible(inequalities, self.ranges)

    def always(self, inequality: Affine, given: Iterable[Affine] = ()) -> bool:
        """Whether an inequality follows from the given ones. False if this can't be shown."""
        return self.impossible([negated(inequality), *given])

    def inside(self, node: fx.Node, at: At) -> bool:
        """Whether a tensor always has an element at these indices."""
        value = tensor(node)
        assert value is not None
        ends = zip(at, value.shape, strict=True)
        return all(self.always(i) and self.always(self.size(size) - 1 - i) for i, size in ends)

    def limits(self, value: Affine) -> tuple[int, int]:
        """The smallest and the largest number that a sum can be."""
        lowest = highest = value.constant
        for of, coefficient in value.terms:
            ends = [end * coefficient for end in self._limits(of)]
            lowest, highest = lowest + min(ends), highest + max(ends)
        return lowest, highest

    def _limits(self, of: Variable) -> tuple[int, int]:
        if isinstance(of, Truth):
            return 0, 1
        if isinstance(of, Index):
            return 0, max(0, self.limits(of.size)[1] - 1)
        if isinstance(of, Floor):
            lowest, highest = self.limits(of.of)
            return lowest // of.by, highest // of.by
        if isinstance(of, Element) and dtype(of.node) not in INDICES:
            info = torch.iinfo(dtype(of.node))
            return info.min, info.max
        return (-LARGEST_INTEGER if isinstance(of, Element) else 0), LARGEST_INTEGER

    def fresh_index(self, size: Affine) -> Affine:
        """A new index, for a rule that looks at all elements along a dim."""
        return variable(Index(next(self._fresh), size))


@dataclass
class Elements(Facts, ABC):
    """What the rules of operators see of the evaluator: they ask it for elements of their inputs."""

    assumed: set[fx.Node] = field(default_factory=set)
    """Integer inputs that were assumed to hold only 0 and 1, since this was last cleared."""

    @abstractmethod
    def cases(self, node: fx.Node, at: At) -> Cases:
        """One element of a node's tensor.

        Raises:
            Unknown: there is no rule for it.
        """


def truth(node: fx.Node, at: At) -> Cases:
    """An element as a bool: 1 where it is not zero, 0 where it is."""
    bit = variable(Truth(node, at))
    return Case(frozenset([bit - 1]), Affine(1)), Case(frozenset([-bit]), Affine())


def in_range(e: Facts, node: fx.Node, value: Affine, kind: torch.dtype | None = None) -> Affine:
    """A sum in the integer dtype in which a node computes (that of its result unless given). It must not wrap there.

    Raises:
        Unknown: it may be a number that the dtype doesn't hold.
    """
    if not holds(kind or dtype(node), *e.limits(value)):
        raise Unknown(f"{node.name} may leave the range of {kind or dtype(node)}")
    return value


def exact(value: Tensor) -> Value:
    """The number that a tensor of one element holds."""
    return float(value) if value.is_floating_point() else Affine(int(value))


def aligned(at: At, node: fx.Node) -> At:
    """The indices in an operand, which broadcasts to the result, of the element that is read at `at`."""
    value = tensor(node)
    assert value is not None
    tail = at[len(at) - value.dim() :]
    return tuple(Affine() if is_one(size) else i for size, i in zip(value.shape, tail, strict=True))


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
