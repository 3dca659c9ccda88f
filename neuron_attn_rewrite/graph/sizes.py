"""Sizes that are symbols of torch, such as a batch or length that torch.export left open.

The analysis works on numbers. Each symbol, and each expression that is not a product, is represented by its own prime.
The primes are larger than any size of a tensor. So two numbers are equal, or one divides the other, exactly if this is
true of the expressions for all values of the symbols.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:  # sympy takes 0.2 s to import, and only sizes that are symbols need it
    import sympy  # type: ignore[import-untyped]

LARGEST = 2**31
"""Larger than any dim of a tensor that is a number."""

_numbers: dict[sympy.Expr, int] = {}
_expressions: dict[int, sympy.Expr] = {}


def number_of(size: int | torch.SymInt) -> int:
    """The number that stands for a size in the analysis."""
    if isinstance(size, int):
        return size
    import sympy

    result = 1
    for base, power in sympy.expand(size.node.expr).as_powers_dict().items():
        if base.is_Integer and power.is_Integer and power > 0:
            result *= int(base) ** int(power)
        elif power.is_Integer and power > 0:
            result *= _prime_of(base) ** int(power)
        else:
            return _prime_of(size.node.expr)
    return result


def _prime_of(expression: sympy.Expr) -> int:
    import sympy

    if expression not in _numbers:
        _numbers[expression] = int(sympy.nextprime(max(_expressions, default=LARGEST)))
        _expressions[_numbers[expression]] = expression
    return _numbers[expression]


def parts_of(number: int) -> tuple[int, list[sympy.Expr]]:
    """A size of the analysis as a product: its factor that is a number, and its factors that are expressions."""
    found = []
    if number > LARGEST:
        for prime, expression in _expressions.items():
            while number % prime == 0:
                number //= prime
                found.append(expression)
    return number, found


def terms_of(expression: sympy.Expr) -> dict[str, int] | None:
    """A size as a sum: its terms by name, with their factors. A number is named "1". None if a factor is no integer."""
    terms = expression.expand().as_coefficients_dict()
    if not all(factor.is_Integer for factor in terms.values()):
        return None
    return {str(term): int(factor) for term, factor in terms.items()}


def is_number(size: int) -> bool:
    """Whether a size of the analysis is a plain number, without a symbol."""
    return not parts_of(size)[1]


def expression_of(number: int) -> sympy.Expr:
    """The size for which a number of the analysis stands."""
    import sympy

    factor, expressions = parts_of(number)
    return sympy.Mul(factor, *expressions)


def has_symbols(graph: fx.Graph) -> bool:
    """Whether some input is, or has, a size that is a symbol."""
    return any(isinstance(size, torch.SymInt) for _, _, size in input_sizes(graph))


def input_sizes(graph: fx.Graph) -> list[tuple[fx.Node, int | None, int | torch.SymInt]]:
    """The sizes of all inputs, as (placeholder, dim, size). An input that is a number itself has the dim None."""
    inputs = [(n, n.meta.get("val")) for n in graph.find_nodes(op="placeholder")]
    numbers = [(n, None, v) for n, v in inputs if isinstance(v, torch.SymInt)]
    return [*numbers, *((n, d, s) for n, v in inputs if isinstance(v, torch.Tensor) for d, s in enumerate(v.shape))]


def examples(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """The value of each symbol at capture."""
    sizes = [size for _, _, size in input_sizes(graph) if isinstance(size, torch.SymInt)]
    return {size.node.expr: int(size.node.hint or 2) for size in sizes if size.node.expr.is_Symbol}


def at(number: int, values: Mapping[sympy.Symbol, int]) -> int:
    """A size of the analysis for values of the symbols."""
    return number if is_number(number) else int(expression_of(number).subs(dict(values)))


def limits_of(limits: Any) -> tuple[int, int | None]:
    """The smallest and the largest value of a symbol, given torch's range; None if there is no largest.

    torch starts its ranges at 2 while it traces, although 1 is allowed.
    """
    lower = int(limits.lower) if limits is not None and limits.lower.is_Integer else 0
    upper = int(limits.upper) if limits is not None and limits.upper.is_Integer else None
    return (lower if lower > 2 else 1), upper


def _solved(expression: Any, given: int) -> tuple[Any, int | None]:
    """The one symbol of a linear expression, and its integer value for which the expression is `given`.

    The symbol is None if the expression has none. The value is None if there is none.
    """
    if expression.is_Symbol:
        return expression, given
    symbols = list(expression.free_symbols)
    if not symbols:
        return None, None
    symbol = symbols[0]
    factor = expression.coeff(symbol)
    rest = expression - factor * symbol
    if len(symbols) > 1 or not factor.is_Integer or not factor or not rest.is_Integer:
        return symbol, None
    value, remainder = divmod(given - int(rest), int(factor))
    return symbol, None if remainder else value


def bind(
    expected: Iterable[int | torch.SymInt],
    found: Iterable[int],
    values: dict[sympy.Symbol, int],
    later: list[tuple[torch.SymInt, int]] | None = None,
) -> str | None:
    """Solve expected = found for the symbols, and add them to `values`; return an error if that fails.

    A sum of several symbols without a value is added to `later`, with the size that is found, if there is such a list.
    """
    for size, given in zip(expected, found, strict=True):
        if isinstance(size, int):
            if size != given:
                return f"{given} is not {size}"
            continue
        expression: Any = size.node.expr
        known = expression.subs(values)
        if later is not None and len(known.free_symbols) > 1:
            later.append((size, given))
            continue
        symbol, solution = _solved(known, given)
        if symbol is not None:
            lower, upper = limits_of(size.node.shape_env.var_to_range.get(symbol))
            if solution is None or solution < lower or (upper is not None and solution > upper):
                of = "" if symbol == expression else f"{given} is not {expression}, where "
                return f"{of}{symbol} is at least {lower}" + ("" if upper is None else f" and at most {upper}")
            values[symbol] = solution
        wanted = expression.subs(values)
        if wanted != given:
            return f"{given} is not {wanted}"
    return None
