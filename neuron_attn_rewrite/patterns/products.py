"""Products of two tensors in one form: labelled dims, as in einsum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import fx

from neuron_attn_rewrite.graph.nodes import WRITTEN, arguments, op_name, plain_name, shape, tensor
from neuron_attn_rewrite.patterns.axes import Dims
from neuron_attn_rewrite.patterns.rules import Rules


@dataclass(frozen=True)
class Product:
    """`node[out] = alpha * sum(left[left_labels] * right[right_labels]) + beta * addend`.

    A label in both operands and not in `out` is summed over. Dims of size 1 broadcast.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: tuple[int, ...]
    right_labels: tuple[int, ...]
    out_labels: tuple[int, ...]
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 1.0
    operands: tuple[tuple[fx.Node, Dims], tuple[fx.Node, Dims]] | None = None
    """The query and the key, with what their dims run over, if they are joined of those of several products."""
    joins: tuple[fx.Node, ...] = ()
    """The products that it takes the place of. Empty for a product of the graph."""

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The products of the graph."""
        return self.joins or (self.node,)

    @property
    def summed(self) -> set[int]:
        return (set(self.left_labels) & set(self.right_labels)) - set(self.out_labels)


ProductRule: TypeAlias = Callable[[fx.Node], "Product | None"]
"""Reads a node as a product of two tensors; None if it is something else."""

PRODUCTS: Rules[ProductRule] = Rules()


def as_product(node: fx.Node) -> Product | None:
    product: Product | None = PRODUCTS.ask(node, node) if tensor(node) is not None else None
    return product


def is_product(node: fx.Node) -> bool:
    """Whether the node is a product. One that is written later is still one, although its value is not known."""
    is_written = WRITTEN in node.meta and plain_name(node) in PRODUCTS.by_op.keys() - {"sum"}
    return is_written or as_product(node) is not None


@PRODUCTS("matmul", "bmm", "mm", "mv")
def _matmul(node: fx.Node) -> Product | None:
    left, right = node.args[:2]
    return _rows_by_columns(node, left, right)


@PRODUCTS("baddbmm", "addmm")
def _with_addend(node: fx.Node) -> Product | None:
    values = arguments(node)
    addend, left, right = [v for v in values.values() if isinstance(v, fx.Node)][:3]
    product = _rows_by_columns(node, left, right)
    alpha, beta = values["alpha"], values["beta"]
    if product is None or not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        return None
    return replace(product, alpha=alpha, addend=addend if beta else None, beta=beta)


def _rows_by_columns(node: fx.Node, left: object, right: object) -> Product | None:
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    m, n = len(shape(left)), len(shape(right))
    if m == 0 or n == 0:
        return None
    rank = max(m, n)
    batch = tuple(range(rank - 2))
    row, col, summed = rank, rank + 1, rank + 2
    return Product(
        node,
        left,
        right,
        (*batch[rank - m :], row, summed) if m > 1 else (summed,),
        (*batch[rank - n :], summed, col) if n > 1 else (summed,),
        (*batch, *([row] if m > 1 else []), *([col] if n > 1 else [])),
    )


@PRODUCTS("linear")
def _linear(node: fx.Node) -> Product | None:
    """linear(query, key) without bias. If the key is a parameter, it is a projection, such as that of a router."""
    left, right = node.args[:2]
    if len(node.args) > 2 and node.args[2] is not None:
        return None
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or right.op != "call_function":
        return None
    batch = tuple(range(len(shape(left)) - 1))
    summed, col = len(batch), len(batch) + 1
    return Product(node, left, right, (*batch, summed), (col, summed), (*batch, col))


@PRODUCTS("sum")
def _sum_of_products(node: fx.Node) -> Product | None:
    """sum(a * b) over dims that both have."""
    inner, dims = node.args[0], arguments(node).get("dim")
    if not isinstance(inner, fx.Node) or op_name(inner) != "mul" or not isinstance(dims, (list, tuple)) or not dims:
        return None
    left, right = inner.args[:2]
    rank = len(shape(inner))
    summed = {int(d) % rank for d in dims}
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None

    def labels(operand: fx.Node) -> tuple[int, ...]:
        return tuple(range(rank - len(shape(operand)), rank))

    for operand in (left, right):
        sizes = dict(zip(labels(operand), shape(operand), strict=True))
        if any(sizes.get(d, 1) != shape(inner)[d] for d in summed):
            return None  # a sum over one operand alone
    ones = iter(range(rank, 2 * rank))
    kept = bool(arguments(node).get("keepdim"))
    out = tuple(next(ones) if d in summed else d for d in range(rank) if kept or d not in summed)
    return Product(node, left, right, labels(left), labels(right), out)


@PRODUCTS("einsum")
def _einsum(node: fx.Node) -> Product | None:
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    left, right = operands
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    first, comma, second = inputs.partition(",")
    if not arrow or not comma:
        return None
    ellipsis_rank = max(
        len(shape(node)) - len(term.replace("...", "")) if "..." in term else 0
        for node, term in ((left, first), (right, second))
    )

    def labels(term: str, rank: int | None) -> tuple[int, ...]:
        head, dots, tail = term.partition("...")
        width = 0 if not dots else ellipsis_rank if rank is None else rank - len(head) - len(tail)
        middle = range(ellipsis_rank - width, ellipsis_rank)
        return (*(ord(c) + 1000 for c in head), *middle, *(ord(c) + 1000 for c in tail))

    product = Product(
        node, left, right, labels(first, len(shape(left))), labels(second, len(shape(right))), labels(out, None)
    )
    for group in (product.left_labels, product.right_labels, product.out_labels):
        if len(set(group)) != len(group):
            return None  # a diagonal
    once = set(product.left_labels) ^ set(product.right_labels)
    return product if once <= set(product.out_labels) else None  # else a sum over one operand alone
