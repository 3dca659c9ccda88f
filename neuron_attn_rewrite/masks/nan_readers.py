"""Whether a model tells NaN from other numbers behind a tensor.

A row that sees no key is NaN in many models, and zeros in a kernel. Nobody minds as long as NaN only spreads: the row
means nothing. But a model can replace it, as `nan_to_num(nan=1.0)` does, or ask for it. Then the row means something.
"""

from __future__ import annotations

from torch import fx

from neuron_attn_rewrite.graph.nodes import dtype, is_tensor, op_name, values_read

READERS = frozenset(
    """
    isnan nan_to_num isfinite isinf isposinf isneginf isclose allclose equal nansum nanmean nanmedian nanquantile
    fmax fmin eq ne lt le gt ge sign sgn heaviside logical_not logical_and logical_or logical_xor any all
    nonzero count_nonzero argmax argmin argsort searchsorted bucketize
    """.split()
)
"""Operators whose result is an ordinary number or bool where an operand is NaN."""


def nan_is_read(start: fx.Node) -> bool:
    """Whether some node behind this one gives an ordinary number for its NaN. It looks at all nodes behind it."""
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        if not is_tensor(node) or dtype(node).is_floating_point:
            for user in (u for u in node.users if u.op != "call_function" or node in values_read(u)):
                if op_name(user).rstrip("_") in READERS or _casts_to_integers(user):
                    return True
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
    return False


def _casts_to_integers(node: fx.Node) -> bool:
    return op_name(node) in ("to", "_to_copy", "type_as") and not dtype(node).is_floating_point
