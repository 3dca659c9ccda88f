"""What attention looks like in a graph, and how to teach it something new: see docs/patterns.md."""

from __future__ import annotations

from typing import Any, Literal, overload

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.patterns import scores as _scores  # noqa: F401  fills a table
from neuron_attn_rewrite.patterns.peel import SCORES, Scores, ScoresRule, TensorScale, Walk
from neuron_attn_rewrite.patterns.products import PRODUCTS, Product, ProductRule
from neuron_attn_rewrite.patterns.rules import Blocked, Registration, Rules
from neuron_attn_rewrite.patterns.softmaxes import SOFTMAXES, SoftmaxRule
from neuron_attn_rewrite.patterns.weights import WEIGHTS, Weights, WeightsRule

__all__ = ["Blocked", "Product", "Registration", "Scores", "TensorScale", "Walk", "Weights", "register"]

TABLES: dict[str, Rules[Any]] = {"product": PRODUCTS, "scores": SCORES, "softmax": SOFTMAXES, "weights": WEIGHTS}


@overload
def register(table: Literal["softmax"], op: str, rule: SoftmaxRule) -> Registration: ...
@overload
def register(table: Literal["scores"], op: str, rule: ScoresRule) -> Registration: ...
@overload
def register(table: Literal["weights"], op: str, rule: WeightsRule) -> Registration: ...
@overload
def register(table: Literal["product"], op: str, rule: ProductRule) -> Registration: ...
def register(table: str, op: str, rule: Any) -> Registration:
    """Teach the finder an operator. The rule is asked before all others of that operator. If it returns None, the next
    one is asked.

    Args:
        table: "softmax" if the operator gives the weights, "scores" if it comes before the softmax, "weights" if it
            comes after it, "product" if it is a product of two tensors.
        op: the operator's name without namespace and overload, such as `softmax` for `torch.ops.aten.softmax.int`.
        rule: what the operator means, in the algebra of `Scores`, `Weights` or `Product`.

    Returns:
        A `Registration`: call `undo()`, or use it in a `with` statement.

    Raises:
        InputError: there is no such table, the name is not one of an operator, or the rule can't be called.
    """
    if table not in TABLES:
        raise InputError(f"register: there is no table {table!r}: choose one of {', '.join(map(repr, TABLES))}.")
    if not isinstance(op, str) or not op.isidentifier():
        raise InputError(f"register: op={op!r} is no operator's name: write it without namespace, such as 'softmax'.")
    if not callable(rule):
        raise InputError(f"register: rule must be a function, not {type(rule).__name__}.")
    return TABLES[table].add(op, rule)
