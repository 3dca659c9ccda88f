"""The value of one element of a tensor, for symbolic indices: a proof for every length and every input.

Asked for the element of a mask at (batch, head, query, key), the evaluator walks back: a view changes the index, an
arange is its index, a comparison splits the value into cases. What is left is a list of cases

    value, wherever all inequalities of the guard hold

in which every index lies in exactly one case. Inequalities are between indices, sizes and elements of integer inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph import (
    PERMUTES,
    arguments,
    changed_in_place,
    dtype,
    is_tensor,
    op_name,
    permutation,
    tensor,
)
from neuron_attn_rewrite.masks.affine import (
    Affine,
    Element,
    Guard,
    Index,
    Size,
    Truth,
    Variable,
    impossible,
    negated,
    variable,
)
from neuron_attn_rewrite.masks.fit import fit_rows, row_intervals
from neuron_attn_rewrite.masks.spec import Band
from neuron_attn_rewrite.masks.tables import ELEMENTWISE, RANDOM
from neuron_attn_rewrite.sizes import LARGEST, expression_of, input_sizes, limits_of

MOST_CASES = 64
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
INDICES = (torch.int64, torch.int32)
At: TypeAlias = tuple[Affine, ...]
Value: TypeAlias = "Affine | float"
"""An exact integer (of any dtype), or a floating number."""

VIEWS = frozenset("view reshape _unsafe_view flatten unflatten unsqueeze squeeze _reshape_alias".split())
SAME = frozenset("clone contiguous alias detach lift_fresh_copy lift_fresh".split())
FILLED = {"ones": 1, "zeros": 0, "ones_like": 1, "zeros_like": 0, "new_ones": 1, "new_zeros": 0}
COMPARISONS: dict[str, Callable[[Affine], list[tuple[list[Affine], int]]]] = {
    "ge": lambda d: [([d], 1), ([-d - 1], 0)],
    "gt": lambda d: [([d - 1], 1), ([-d], 0)],
    "le": lambda d: [([-d], 1), ([d - 1], 0)],
    "lt": lambda d: [([-d - 1], 1), ([d], 0)],
    "eq": lambda d: [([d, -d], 1), ([d - 1], 0), ([-d - 1], 0)],
    "ne": lambda d: [([d, -d], 0), ([d - 1], 1), ([-d - 1], 1)],
}
"""The cases of `left op right`, given `left - right`."""


@dataclass(frozen=True)
class Case:
    """A value where the guard holds."""

    guard: Guard
    value: Value


Cases: TypeAlias = tuple[Case, ...]


class Unknown(Exception):
    """An element of which no rule says what it is."""


@dataclass
class SymbolicEvaluator:
    """Elements of the tensors of one graph at symbolic indices."""

    module: fx.GraphModule
    assumed: set[fx.Node] = field(default_factory=set)
    """Integer inputs whose elements were taken to be 0 or 1 since this was last cleared."""
    _known: dict[tuple[fx.Node, At], tuple[Cases | Unknown, frozenset[fx.Node]]] = field(default_factory=dict)
    _ranges: dict[Variable, tuple[Affine, ...]] = field(default_factory=dict)
    _symbols: dict[Any, Any] = field(default_factory=dict)
    _fresh: Iterator[int] = field(default_factory=lambda: itertools.count(4))

    def __post_init__(self) -> None:
        self._changed = changed_in_place(self.module.graph)
        sizes = [size for _, _, size in input_sizes(self.module.graph) if isinstance(size, torch.SymInt)]
        for size in sizes:
            self._symbols.update(size.node.shape_env.var_to_range)

    # Sizes and ranges

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
        return self._ranges.get(of, ())

    def impossible(self, inequalities: Iterable[Affine]) -> bool:
        return impossible(inequalities, self.limits)

    def always(self, inequality: Affine, given: Iterable[Affine] = ()) -> bool:
        """Whether the sum is at least 0 wherever the given ones are."""
        return self.impossible([negated(inequality), *given])

    # Elements

    def cases(self, node: fx.Node, at: At) -> Cases:
        """The value of one element.

        Raises:
            Unknown: no rule says what it is.
        """
        key = node, at
        if key not in self._known:
            before, self.assumed = self.assumed, set()
            try:
                found: Cases | Unknown = self._element(node, at)
            except Unknown as unknown:
                found = unknown
            self._known[key], self.assumed = (found, frozenset(self.assumed)), before
        found, assumed = self._known[key]
        self.assumed |= assumed
        if isinstance(found, Unknown):
            raise found
        return found

    def _element(self, node: fx.Node, at: At) -> Cases:
        try:
            cases = self._computed(node, at)
        except Unknown:
            if dtype(node) != torch.bool:
                raise
            self.assumed.clear()
            return _truth(node, at)
        if len(cases) > MOST_CASES:
            raise Unknown(f"{node.name} has too many cases")
        return cases

    def _computed(self, node: fx.Node, at: At) -> Cases:
        name = op_name(node)
        if node in self._changed or name in RANDOM:
            raise Unknown(f"{node.name} changes")
        if node.op == "placeholder":
            if dtype(node) in INTEGERS and dtype(node) != torch.bool:
                return (Case(frozenset(), variable(Element(node, at))),)
            raise Unknown(f"{node.name} is an input")
        if node.op == "get_attr":
            return self._stored(node, at)
        if node.op != "call_function" or not is_tensor(node):
            raise Unknown(f"{node.name} is not a tensor of operators")
        rule = RULES.get(name)
        if rule is not None:
            return rule(self, node, at)
        if name in COMPARISONS or name in ("to", "_to_copy", "type_as", "logical_not"):
            return self._arithmetic(node, at, name)
        if name in ELEMENTWISE:
            return self._arithmetic(node, at, name)
        raise Unknown(f"no rule knows {node.name}")

    def _stored(self, node: fx.Node, at: At) -> Cases:
        """An element of a constant: one value, an arithmetic progression, or two values with a band between them."""
        path, _, name = str(node.target).rpartition(".")
        stored = getattr(self.module.get_submodule(path), name)
        if isinstance(stored, torch.nn.Parameter) or not isinstance(stored, Tensor):
            raise Unknown(f"{node.name} is a parameter")
        if stored.is_meta:
            raise Unknown(f"{node.name} has no values")
        if all(i.is_constant for i in at):
            return (Case(frozenset(), _exact(stored[tuple(i.constant for i in at)])),)
        first = stored.reshape(-1)[:1]
        if stored.numel() and bool((stored == first).all()):
            return (Case(frozenset(), _exact(first)),)
        wide = [d for d, size in enumerate(stored.shape) if size > 1]
        if len(wide) == 1 and stored.dtype in INTEGERS:
            line = stored.reshape(-1).to(torch.int64)
            step = int(line[1] - line[0])
            if bool((line.diff() == step).all()):
                return (Case(frozenset(), at[wide[0]] * step + int(line[0])),)
        if len(wide) == 2 and bool(((stored == first) | (stored == stored.max()) | (stored == stored.min())).all()):
            return self._banded(stored.reshape([stored.shape[d] for d in wide]), at[wide[0]], at[wide[1]])
        raise Unknown(f"{node.name} is a constant without a form")

    def _banded(self, stored: Tensor, i: Affine, j: Affine) -> Cases:
        for inside in (stored[0, 0], stored[-1, 0], stored[0, -1]):
            inner = stored == inside
            rows = row_intervals(inner)
            claims = () if rows is None else fit_rows(rows, stored.shape[1])
            if len(claims) == 1 and isinstance(claims[0], Band):
                outside = stored[~inner][0]
                if not bool((stored[~inner] == outside).all()):
                    continue
                within = _within(claims[0], i, j)
                out = [Case(frozenset([negated(g), *within[:n]]), _exact(outside)) for n, g in enumerate(within)]
                return (Case(frozenset(within), _exact(inside)), *out)
        raise Unknown("a constant that is not a band")

    # Elementwise operators

    def _arithmetic(self, node: fx.Node, at: At, name: str) -> Cases:
        """An elementwise operator, for each combination of the cases of its operands."""
        operands = [v for v in _flat(node.args) if is_tensor(v)]
        if name in ("expand_as", "type_as", "copy"):
            raise Unknown(f"no rule knows {node.name}")
        if name in ("to", "_to_copy"):
            operands = operands[:1]
        found = {n: self.cases(n, _aligned(at, n)) for n in dict.fromkeys(operands)}
        if _asks_only_for_zero(node, name):
            found = {n: _split(cases, lambda element: True) for n, cases in found.items()}
        elif name not in ("to", "_to_copy") or dtype(node) != torch.int64:
            found = {n: _split(cases, self._is_contract) for n, cases in found.items()}
        out: list[Case] = []
        stack: list[tuple[Guard, dict[fx.Node, Value], list[fx.Node]]] = [(frozenset(), {}, list(found))]
        while stack:
            guard, values, rest = stack.pop()
            decided = _decided(node, name, values)
            if decided is not None:
                out.append(Case(guard, decided))
            elif not rest:
                out += self._outcomes(node, name, guard, values)
            else:
                for case in found[rest[0]]:
                    both = guard | case.guard
                    if not guard or not case.guard or not self.impossible(both):
                        stack.append((both, {**values, rest[0]: case.value}, rest[1:]))
            if len(out) + len(stack) > MOST_CASES:
                raise Unknown(f"{node.name} has too many cases")
        return tuple(out)

    def _is_contract(self, element: Element) -> bool:
        """By the contract of integer inputs with `mask` in their name, they hold only 0 and 1."""
        if "mask" in element.node.name:
            self.assumed.add(element.node)
        return "mask" in element.node.name

    def _outcomes(self, node: fx.Node, name: str, guard: Guard, values: dict[fx.Node, Value]) -> list[Case]:
        if not any(_varies(v) for v in values.values()):
            return [Case(guard, _run(node, values))]
        args = [values[a] if isinstance(a, fx.Node) and a in values else a for a in node.args]
        if name in COMPARISONS:
            left, right = (self._integer(a) for a in args[:2])
            split = COMPARISONS[name](left - right)
            found = [Case(guard.union(more), Affine(value)) for more, value in split]
            return [case for case in found if not self.impossible(case.guard)]
        if dtype(node) not in (torch.int64, torch.int32):
            raise Unknown(f"{node.name} makes numbers that vary inexact")
        if name in ("to", "_to_copy"):
            (value,) = values.values()
            assert isinstance(value, Affine)
            wide = [v for v, _ in value.terms if isinstance(v, Element) and dtype(v.node) == torch.int64]
            if wide and dtype(node) != torch.int64:
                raise Unknown(f"{node.name} may cut off digits")
            return [Case(guard, value)]
        if name in ("add", "sub", "rsub") and node.kwargs.get("alpha", 1) == 1:
            left, right = (self._integer(a) for a in args[:2])
            return [Case(guard, left + right if name == "add" else left - right if name == "sub" else right - left)]
        if name in ("where", "masked_fill"):
            flag, yes, no = (args[0], args[1], args[2]) if name == "where" else (args[1], args[2], args[0])
            picked = no if flag == Affine() else yes
            return [
                Case(guard, picked if isinstance(picked, Affine) else _exact(torch.as_tensor(picked).to(dtype(node))))
            ]
        if name == "neg":
            return [Case(guard, -self._integer(args[0]))]
        if name == "mul":
            left, right = (self._integer(a) for a in args[:2])
            if left.is_constant or right.is_constant:
                return [Case(guard, left * right.constant if right.is_constant else right * left.constant)]
        if name in ("minimum", "maximum", "clamp", "clamp_min", "abs"):
            return self._limited(node, name, guard, args)
        raise Unknown(f"{node.name} of numbers that vary")

    def _limited(self, node: fx.Node, name: str, guard: Guard, args: list[Any]) -> list[Case]:
        left = self._integer(args[0])
        if name == "abs":
            right, pick_larger = -left, True
        elif name == "clamp":
            low, high = ([*args[1:], None, None])[:2]
            if low is None or high is not None:
                raise Unknown(f"{node.name} has two limits")
            right, pick_larger = self._integer(low), True
        else:
            right, pick_larger = self._integer(args[1]), name != "minimum"
        larger = frozenset([left - right])
        smaller = frozenset([right - left - 1])
        first, second = (left, right) if pick_larger else (right, left)
        return [Case(guard | larger, first), Case(guard | smaller, second)]

    def _integer(self, value: Any) -> Affine:
        if isinstance(value, Affine):
            return value
        if isinstance(value, fx.Node) and not is_tensor(value):
            return self.size(value)
        if isinstance(value, (int, torch.SymInt)):
            return self.size(value)
        raise Unknown("numbers that vary, with a fraction")

    def bind(self, size: Affine) -> Affine:
        """An index of its own, for a rule that looks at a whole dim."""
        return variable(Index(next(self._fresh), size))


def _flat(args: Any) -> list[Any]:
    return [v for a in args for v in (a if isinstance(a, (list, tuple)) else (a,))]


def _truth(node: fx.Node, at: At) -> Cases:
    bit = variable(Truth(node, at))
    return Case(frozenset([bit - 1]), Affine(1)), Case(frozenset([-bit]), Affine())


def _varies(value: Value) -> bool:
    return isinstance(value, Affine) and not value.is_constant


def _exact(value: Tensor) -> Value:
    return float(value) if value.is_floating_point() else Affine(int(value))


def _within(band: Band, i: Affine, j: Affine) -> list[Affine]:
    lower = [] if band.lower is None else [j - i - band.lower]
    upper = [] if band.upper is None else [i - j + band.upper]
    return lower + upper


def _aligned(at: At, node: fx.Node) -> At:
    """The index into an operand that broadcasts to a result at `at`."""
    value = tensor(node)
    assert value is not None
    tail = at[len(at) - value.dim() :]
    return tuple(Affine() if _is_one(size) else i for size, i in zip(value.shape, tail, strict=True))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _asks_only_for_zero(node: fx.Node, name: str) -> bool:
    """Whether the operator asks of a number only if it is zero."""
    if name in ("to", "_to_copy"):
        return dtype(node) == torch.bool
    if name in ("eq", "ne"):
        return type(node.args[1]) in (int, float) and not node.args[1]
    return name == "logical_not"


def _split(cases: Cases, holds: Callable[[Element], bool]) -> Cases:
    """The elements of inputs for which it holds, as 0 or 1."""
    out: list[Case] = []
    for case in cases:
        value = case.value
        elements = [v for v, _ in value.terms if isinstance(v, Element)] if isinstance(value, Affine) else []
        if len(elements) == 1 and value == variable(elements[0]) and holds(elements[0]):
            out += [Case(case.guard | c.guard, c.value) for c in _truth(elements[0].node, elements[0].index)]
        else:
            out.append(case)
    return tuple(out)


def _decided(node: fx.Node, name: str, values: dict[fx.Node, Value]) -> Value | None:
    """The result where one bool operand decides it."""
    if dtype(node) != torch.bool or name not in DECIDES:
        return None
    decisive = Affine(DECIDES[name])
    return decisive if any(v == decisive and dtype(n) == torch.bool for n, v in values.items()) else None


DECIDES = {
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__", "mul"), 0),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), 1),
}


def _run(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    """The operator itself, on tensors of one element."""

    def one(n: fx.Node) -> Any:
        value = tensor(n)
        if n in values:
            found = values[n]
            assert value is not None
            number = found.constant if isinstance(found, Affine) else found
            return torch.full([1] * min(1, value.dim()), number, dtype=value.dtype)
        if value is not None:
            return torch.empty([1] * min(1, value.dim()), dtype=value.dtype)
        if isinstance(n.meta.get("val"), (int, float)):
            return n.meta["val"]
        if op_name(n) == "getattr":
            return torch.device("cpu")
        raise Unknown(f"{n.name} is not a number")

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), one)
    with torch.no_grad():
        return _exact(node.target(*args, **kwargs))  # type: ignore[operator]


# Data movement and construction: each rule gives the element at an index


def _view(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    """A reshape that only adds or drops dims of size 1."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    inner, outer = (tensor(n) for n in (source, node))
    assert inner is not None and outer is not None
    kept = [(e.size(size), i) for size, i in zip(outer.shape, at, strict=True) if not _is_one(size)]
    wide = [e.size(size) for size in inner.shape if not _is_one(size)]
    if [size for size, _ in kept] != wide:
        raise Unknown(f"{node.name} splits or joins dims")
    indices = iter(i for _, i in kept)
    return e.cases(source, tuple(Affine() if _is_one(size) else next(indices) for size in inner.shape))


def _expand(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    assert isinstance(node.args[0], fx.Node)
    return e.cases(node.args[0], _aligned(at, node.args[0]))


def _same(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    assert isinstance(node.args[0], fx.Node)
    return e.cases(node.args[0], at)


def _permute(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    assert isinstance(node.args[0], fx.Node)
    order = permutation(node)
    return e.cases(node.args[0], tuple(at[order.index(d)] for d in range(len(order))))


def _slice(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    values = arguments(node)
    source, dim = values["self"], values["dim"] % len(at)
    size = e.size(tensor(source).shape[dim])  # type: ignore[union-attr]
    start = Affine() if values["start"] is None else e.size(values["start"])
    if not e.always(start):
        start = start + size
        if not e.always(start) or e.always(start - size):
            raise Unknown(f"{node.name} starts before its tensor")
    if not e.always(size - start):
        raise Unknown(f"{node.name} may start behind its tensor")
    if not isinstance(values["step"], int):
        raise Unknown(f"{node.name} has a step that is not a number")
    return e.cases(source, _at(at, dim, at[dim] * values["step"] + start))


def _select(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    values = arguments(node)
    source, dim = values["self"], values["dim"] % (len(at) + 1)
    place = e.size(values["index"])
    if not e.always(place):
        place = place + e.size(tensor(source).shape[dim])  # type: ignore[union-attr]
        if not e.always(place):
            raise Unknown(f"{node.name} selects what may not be there")
    return e.cases(source, (*at[:dim], place, *at[dim:]))


def _index(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    """`x[:, i, j, ...]` with integer indices for dims that are neighbours."""
    source, indices = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    inner = tensor(source)
    assert inner is not None
    given = [i for i in indices if isinstance(i, fx.Node)]
    lead = next(d for d, i in enumerate(indices) if i is not None)
    if given != list(indices[lead : lead + len(given)]) or any(dtype(i) not in INDICES for i in given):
        raise Unknown(f"{node.name} skips a dim")
    end = lead + max(tensor(i).dim() for i in given)  # type: ignore[union-attr]
    places = [e.cases(i, _aligned(at[lead:end], i)) for i in given]
    if any(len(cases) != 1 for cases in places):
        raise Unknown(f"{node.name} looks up by cases")
    found = []
    for (case,), size in zip(places, inner.shape[lead:], strict=False):
        assert isinstance(case.value, Affine)
        if not e.always(case.value) or not e.always(e.size(size) - 1 - case.value):
            raise Unknown(f"{node.name} looks up what may not be there")
        found.append(case.value)
    return e.cases(source, (*at[:lead], *found, *at[end:]))


def _arange(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    if dtype(node) not in (torch.int64, torch.int32):
        raise Unknown(f"{node.name} is not one of integers")
    values = arguments(node)
    start, step = (e.size(values.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    if not step.is_constant:
        raise Unknown(f"{node.name} has a step that is not a number")
    return (Case(frozenset(), start + at[0] * step.constant),)


def _full(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    name = op_name(node)
    value = FILLED.get(name)
    if value is None:
        value = node.args[0 if name == "scalar_tensor" else 1 if name in ("full", "full_like") else 2]  # type: ignore[assignment]
    if not isinstance(value, (int, float)):
        raise Unknown(f"{node.name} is filled with what is not a number")
    return (Case(frozenset(), _exact(torch.tensor(value).to(dtype(node)))),)


def _pieces(e: SymbolicEvaluator, pieces: Sequence[tuple[fx.Node | Value, Affine]], at: At, dim: int) -> Cases:
    """One after another along a dim: tensors, or numbers, with their sizes."""
    out: list[Case] = []
    end = Affine()
    for piece, size in pieces:
        start, end = end, end + size
        guard = frozenset([at[dim] - start, end - 1 - at[dim]])
        if e.impossible(guard):
            continue
        if not isinstance(piece, fx.Node):
            out.append(Case(guard, piece))
            continue
        cases = e.cases(piece, _at(at, dim, at[dim] - start))
        out += [Case(guard | c.guard, c.value) for c in cases if not e.impossible(guard | c.guard)]
    return tuple(out)


def _cat(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    parts, dim = node.args[0], arguments(node)["dim"] % len(at)
    assert isinstance(parts, (list, tuple))
    return _pieces(e, [(p, e.size(tensor(p).shape[dim])) for p in parts], at, dim)  # type: ignore


def _pad(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    source, pads = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(pads, (list, tuple))
    if any(p for p in pads[2:]) or any(not isinstance(p, int) or p < 0 for p in pads[:2]):
        raise Unknown(f"{node.name} pads more than the last dim")
    fill = _exact(torch.tensor(arguments(node)["value"] or 0).to(dtype(node)))
    size = e.size(tensor(source).shape[-1])  # type: ignore[union-attr]
    pieces: list[tuple[fx.Node | Value, Affine]] = [(fill, Affine(pads[0])), (source, size), (fill, Affine(pads[1]))]  # type: ignore[arg-type]
    return _pieces(e, pieces, at, len(at) - 1)


def _triangle(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    """tril keeps `column - row <= diagonal`, triu `column - row >= diagonal`; the rest is 0."""
    assert isinstance(node.args[0], fx.Node)
    beyond = at[-1] - at[-2] - e.size(arguments(node)["diagonal"])
    keeps = -beyond if op_name(node) == "tril" else beyond
    zero: Value = 0.0 if dtype(node).is_floating_point else Affine()
    inside = [Case(c.guard | {keeps}, c.value) for c in e.cases(node.args[0], at)]
    return (*(c for c in inside if not e.impossible(c.guard)), Case(frozenset([negated(keeps)]), zero))


def _flip(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    values = arguments(node)
    for dim in values["dims"]:
        at = _at(at, dim % len(at), e.size(tensor(values["self"]).shape[dim]) - 1 - at[dim % len(at)])  # type: ignore[union-attr]
    return e.cases(values["self"], at)


def _diff(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    """The difference to the element before."""
    values = arguments(node)
    source, dim = values["self"], values["dim"] % len(at)
    if values["n"] != 1 or values["append"] is not None:
        raise Unknown(f"no rule knows {node.name}")
    parts = [p for p in (values["prepend"], source) if p is not None]
    pieces = [(p, e.size(tensor(p).shape[dim])) for p in parts]  # type: ignore[union-attr]
    here, there = (_pieces(e, pieces, _at(at, dim, at[dim] + step), dim) for step in (1, 0))
    out = []
    for a, b in itertools.product(here, there):
        guard = a.guard | b.guard
        if not e.impossible(guard):
            if not isinstance(a.value, Affine) or not isinstance(b.value, Affine) or dtype(node) == torch.bool:
                raise Unknown(f"{node.name} is one of fractions")
            out.append(Case(guard, a.value - b.value))
    return tuple(out)


def _cumsum(e: SymbolicEvaluator, node: fx.Node, at: At) -> Cases:
    """The running sum of one number."""
    values = arguments(node)
    source, dim = values["self"], values["dim"] % len(at)
    anywhere = e.bind(e.size(tensor(source).shape[dim]))  # type: ignore[union-attr]
    cases = e.cases(source, _at(at, dim, anywhere))
    numbers = {case.value for case in cases}
    if len(numbers) != 1 or dtype(node) != torch.int64:
        raise Unknown(f"{node.name} sums up what varies")
    (number,) = numbers
    if not isinstance(number, Affine) or not number.is_constant:
        raise Unknown(f"{node.name} sums up what varies")
    return (Case(frozenset(), (at[dim] + 1) * number.constant),)


def _at(at: At, dim: int, index: Affine) -> At:
    return (*at[:dim], index, *at[dim + 1 :])


RULES: dict[str, Callable[[SymbolicEvaluator, fx.Node, At], Cases]] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(PERMUTES, _permute),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys((*FILLED, "full", "full_like", "new_full", "scalar_tensor"), _full),
    **dict.fromkeys(("tril", "triu"), _triangle),
    "slice": _slice,
    "select": _select,
    "index": _index,
    "arange": _arange,
    "cat": _cat,
    "constant_pad_nd": _pad,
    "flip": _flip,
    "diff": _diff,
    "cumsum": _cumsum,
}
"""What knows the element of an operator's result at an index."""
