"""Whether a model tells NaN from other numbers behind a tensor.

A row that sees no key is NaN in many models, and zeros in a kernel. Nobody minds as long as NaN only spreads: the row
means nothing. But a model can replace it, as `nan_to_num(nan=1.0)` does, or ask for it. Then the row means something.
"""

from __future__ import annotations

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import dtype, is_tensor, plain_name, values_read
from neuron_attn_rewrite.graph.writes import written

READERS = frozenset(
    """
    nan_to_num nansum nanmean nanmedian nanquantile fmax fmin eq ne lt le gt ge sign sgn heaviside logical_not
    logical_and logical_or logical_xor sort msort topk kthvalue histc _unique2 unique_dim unique_consecutive
    scaled_dot_product_attention mode copysign fake_quantize_per_tensor_affine fake_quantize_per_channel_affine
    """.split()
)
"""Operators with an ordinary floating-point number where an operand is NaN, or that move other numbers because of it.

torch's fused attention gives zeros for a query of NaN on a CPU.
"""


def nan_is_read(start: fx.Node) -> bool:
    """Whether some node behind this one gives an ordinary number for its NaN. It looks at all nodes behind it.

    Integers and bools that are computed from a real number always are such numbers. A call of higher order, such as
    torch.cond, may do anything in its graphs.
    """
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        for user in (u for u in node.users if u.op != "call_function" or node in values_read(u)):
            is_reader = plain_name(user).rstrip("_") in READERS  # also where its result is written later
            behind = [user, *(held for target in written(user) for held in _memory_of(target))]
            if (
                is_reader
                or isinstance(user.target, torch._ops.HigherOrderOperator)
                or any(map(_holds_integers, behind))
            ):
                return True
            stack += [n for n in behind if n not in seen]
            seen.update(behind)
    return False


def _holds_integers(node: fx.Node) -> bool:
    """Also bools."""
    return is_tensor(node) and not (dtype(node).is_floating_point or dtype(node).is_complex)


def _memory_of(written: fx.Node) -> list[fx.Node]:
    """Nodes from which written memory can be read: all that it may be a view of, and buffers also in the next call."""
    found: list[fx.Node] = []
    source: object = written
    while isinstance(source, fx.Node):
        found.append(source)
        source = source.args[0] if source.args else None
    root = found[-1]
    return [*found, *root.graph.find_nodes(op="get_attr", target=root.target)] if root.op == "get_attr" else found
