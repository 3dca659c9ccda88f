"""Constants of a model at symbolic indices: a formula for the elements of a stored tensor.

Three kinds of stored tensors have one: all elements are equal, the elements are an arithmetic progression along one dim
(such as a buffer made by `torch.arange(n)`), or there is one value inside of a band and another outside (such as a
causal mask). Element [i, j] of a buffer made by `torch.ones(n, n).tril()` is 1 where `i - j >= 0`, and 0 where
`j - i - 1 >= 0`.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph.held import read_value
from neuron_attn_rewrite.masks.affine import Affine, negated
from neuron_attn_rewrite.masks.cases import INTEGERS, At, Case, Cases, Unknown, exact
from neuron_attn_rewrite.masks.fit import fit_rows, row_intervals
from neuron_attn_rewrite.masks.spec import Band
from neuron_attn_rewrite.values.exact import same


def stored(module: fx.GraphModule, node: fx.Node, at: At) -> Cases:
    """One element of the tensor that a `get_attr` node reads.

    Raises:
        Unknown: it is a parameter, has no values, or follows none of the formulas.
    """
    held = read_value(node)
    if isinstance(held, torch.nn.Parameter) or not isinstance(held, Tensor):
        raise Unknown(f"{node.name} is a parameter")
    if held.is_meta:
        raise Unknown(f"{node.name} has no values")
    if all(i.is_constant for i in at):
        return (Case(frozenset(), exact(held[tuple(i.constant for i in at)])),)
    if held.isnan().any():
        raise Unknown(f"{node.name} holds NaN")
    first = held.reshape(-1)[:1]
    if held.numel() and bool(same(held, first).all()):
        return (Case(frozenset(), exact(first)),)
    wide = [d for d, size in enumerate(held.shape) if size > 1]
    if len(wide) == 1 and held.dtype in INTEGERS:
        line = held.reshape(-1).to(torch.int64)
        step = int(line[1] - line[0])
        if bool((line.diff() == step).all()):
            return (Case(frozenset(), at[wide[0]] * step + int(line[0])),)
    if len(wide) == 2:
        return _banded(held.reshape([held.shape[d] for d in wide]), at[wide[0]], at[wide[1]])
    raise Unknown(f"there is no formula for the values of {node.name}")


def _banded(held: Tensor, i: Affine, j: Affine) -> Cases:
    """Element [i, j] of a matrix with one value inside of a band and one value outside."""
    first = held[0, 0]
    others = held[~same(held, first)]
    for inside, outside in ((first, others[0]), (others[0], first)) if bool(same(others, others[0]).all()) else ():
        rows = row_intervals(same(held, inside))
        claims = () if rows is None else fit_rows(rows, held.shape[1])
        if len(claims) == 1 and isinstance(claims[0], Band):
            within = _within(claims[0], i, j)
            out = [Case(frozenset([negated(g), *within[:n]]), exact(outside)) for n, g in enumerate(within)]
            return (Case(frozenset(within), exact(inside)), *out)
    raise Unknown("a constant is not a band")


def _within(band: Band, i: Affine, j: Affine) -> list[Affine]:
    lower = [] if band.lower is None else [j - i - band.lower]
    upper = [] if band.upper is None else [i - j + band.upper]
    return lower + upper
