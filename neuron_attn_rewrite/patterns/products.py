"""Products of two tensors in one form: labelled dims, as in einsum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from neuron_attn_rewrite.graph import arguments, op_name, shape


@dataclass(frozen=True)
class Product:
    """`out[labels] = alpha * sum(left[labels] * right[labels]) + beta * addend`.

    A label in both operands and not in `out` is summed over. Dims of size 1 broadcast.
    """

    left: fx.Node
    right: fx.Node
    left_labels: tuple[int, ...]
    right_labels: tuple[int, ...]
    out_labels: tuple[int, ...]
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 1.0

    @property
    def summed(self) -> set[int]:
        return (set(self.left_labels) & set(self.right_labels)) - set(self.out_labels)


def as_product(node: fx.Node) -> Product | None:
    """Read matmul, bmm, mm, baddbmm, addmm or a two-operand einsum; None for anything else."""
    name = op_name(node)
    if name in ("matmul", "bmm", "mm"):
        left, right = node.args[:2]
        return _matmul(left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None
    if name in ("baddbmm", "addmm"):
        values = arguments(node)
        left, right = [v for k, v in values.items() if isinstance(v, fx.Node)][1:3]
        product = _matmul(left, right)
        addend = next(iter(values.values()))
        alpha, beta = values["alpha"], values["beta"]
        if product is None or not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
            return None
        return Product(
            left,
            right,
            product.left_labels,
            product.right_labels,
            product.out_labels,
            alpha,
            addend if beta else None,
            beta,
        )
    if name == "einsum":
        equation, operands = node.args[:2]
        if isinstance(equation, str) and isinstance(operands, (list, tuple)) and len(operands) == 2:
            return _einsum(equation, *operands)
    return None


def _matmul(left: fx.Node, right: fx.Node) -> Product | None:
    m, n = len(shape(left)), len(shape(right))
    if m < 2 or n < 2:
        return None
    rank = max(m, n)
    batch = tuple(range(rank - 2))
    row, col, summed = rank, rank + 1, rank + 2
    return Product(
        left,
        right,
        (*batch[rank - m :], row, summed),
        (*batch[rank - n :], summed, col),
        (*batch, row, col),
    )


def _einsum(equation: str, left: fx.Node, right: fx.Node) -> Product | None:
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
        left, right, labels(first, len(shape(left))), labels(second, len(shape(right))), labels(out, None)
    )
    for group in (product.left_labels, product.right_labels, product.out_labels):
        if len(set(group)) != len(group):
            return None  # a diagonal
    once = set(product.left_labels) ^ set(product.right_labels)
    return product if once <= set(product.out_labels) else None  # else a sum over one operand alone
