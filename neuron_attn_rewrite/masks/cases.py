"""The cases of one element at symbolic indices, and what is known of the sizes and inputs on which they depend.

An element is a list of cases

    value, wherever all inequalities of the guard hold

in which every index lies in exactly one case. Inequalities are between indices, sizes and elements of integer inputs.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph.nodes import tensor
from neuron_attn_rewrite.graph.sizes import LARGEST, expression_of, input_sizes, limits_of
from neuron_attn_rewrite.masks.affine import (
    Affine,
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

MOST_CASES = 64
INDICES = (torch.int64, torch.int32)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
At: TypeAlias = tuple[Affine, ...]
Value: TypeAlias = "Affine | float"
"""An exact integer (of any dtype), or a floating number."""


@dataclass(frozen=True)
class Case:
    """A value where the guard holds."""

    guard: Guard
    value: Value


Cases: TypeAlias = tuple[Case, ...]


class Unknown(Exception):
    """An element of which no rule says what it is."""


@dataclass
class Facts:
    """What is known of the sizes of one graph, and of every variable."""

    module: fx.GraphModule
    _ranges: dict[Variable, tuple[Affine, ...]] = field(default_factory=dict)
    _symbols: dict[Any, Any] = field(default_factory=dict)
    _fresh: Iterator[int] = field(default_factory=lambda: itertools.count(4))

    def __post_init__(self) -> None:
        sizes = [size for _, _, size in input_sizes(self.module.graph) if isinstance(size, torch.SymInt)]
        for size in sizes:
            self._symbols.update(size.node.shape_env.var_to_range)

    def size(self, value: Any) -> Affine:
        """A number (also one that stands for symbols), a SymInt or a node that gives one, as a sum of sizes."""
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

    def limits(self, of: Variable) -> tuple[Affine, ...]:
        """What always holds of a variable, as sums of at least 0."""
        if isinstance(of, Truth):
            return variable(of), -variable(of) + 1
        if isinstance(of, Index):
            return variable(of), of.size - 1 - variable(of)
        if isinstance(of, Floor):
            rest = of.of - variable(of) * of.by
            return rest, -rest + (of.by - 1)
        return self._ranges.get(of, ())

    def impossible(self, inequalities: Iterable[Affine]) -> bool:
        return impossible(inequalities, self.limits)

    def always(self, inequality: Affine, given: Iterable[Affine] = ()) -> bool:
        """Whether the sum is at least 0 wherever the given ones are."""
        return self.impossible([negated(inequality), *given])

    def bind(self, size: Affine) -> Affine:
        """An index of its own, for a rule that looks at a whole dim."""
        return variable(Index(next(self._fresh), size))


@dataclass
class Elements(Facts, ABC):
    """Where the rules of operators find the elements of their inputs."""

    assumed: set[fx.Node] = field(default_factory=set)
    """Integer inputs whose elements were taken to be 0 or 1 since this was last cleared."""

    @abstractmethod
    def cases(self, node: fx.Node, at: At) -> Cases:
        """The value of one element.

        Raises:
            Unknown: no rule says what it is.
        """


def truth(node: fx.Node, at: At) -> Cases:
    """An element of which only counts whether it is zero, as 0 or 1."""
    bit = variable(Truth(node, at))
    return Case(frozenset([bit - 1]), Affine(1)), Case(frozenset([-bit]), Affine())


def exact(value: Tensor) -> Value:
    """The number that a tensor of one element holds."""
    return float(value) if value.is_floating_point() else Affine(int(value))


def aligned(at: At, node: fx.Node) -> At:
    """The index into an operand that broadcasts to a result at `at`."""
    value = tensor(node)
    assert value is not None
    tail = at[len(at) - value.dim() :]
    return tuple(Affine() if is_one(size) else i for size, i in zip(value.shape, tail, strict=True))


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
