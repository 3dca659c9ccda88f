"""Instructions of the GpSimd engine: affine patterns of the partition and the free indices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from neuron_attn_rewrite.simulator.machine.dtypes import Array, dtype
from neuron_attn_rewrite.simulator.machine.operators import OPERATORS, Operator
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.isa.rules import Issue, free_elements, issue, require_tensor

Pattern = Sequence[Sequence[int]]


def _affine(i: Issue, pattern: Pattern, offset: int, channel_multiplier: int) -> Array:
    """int32 [partitions, elements per partition]: offset + partition * multiplier + the steps of the pattern."""
    dst = i.operands["dst"]
    for key, value in (("offset", offset), ("channel_multiplier", channel_multiplier)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            i.fail(f"{key} must be an int known at compile time, not {value!r}")
    if not 1 <= len(pattern) <= 4 or any(len(p) != 2 for p in pattern):
        i.fail(f"pattern must be one to four pairs [step, count], not {pattern}")
    count = math.prod(int(n) for _, n in pattern)
    if count != free_elements(dst):
        i.fail(
            f"pattern {pattern} has {count} values, but dst {list(dst.shape)} has {free_elements(dst)} per partition"
        )
    values = np.array([[offset]], np.int64) + np.arange(dst.shape[0], dtype=np.int64)[:, None] * channel_multiplier
    for step, n in pattern:
        values = (values[..., None] + np.arange(n, dtype=np.int64) * step).reshape(dst.shape[0], -1)
    return values.astype(np.int32)


def iota(
    dst: NkiTensor, pattern: Pattern, offset: int = 0, channel_multiplier: int = 0, name: str | None = None
) -> None:
    """dst[p, w, z, y, x] = offset + p * channel_multiplier + the steps of `pattern`, in int32, cast to dst."""
    i = issue("iota", name, dst=dst)
    require_tensor(i, dst=dst)
    kind, values = dtype(i.operands["dst"].dtype), _affine(i, pattern, offset, channel_multiplier)
    if kind.itemsize == 4 and kind.kind == "int":
        i.write_raw("dst", values.view(kind.storage).reshape(i.operands["dst"].shape))
    else:
        i.write("dst", values.astype(np.float32))
    i.record()


def affine_select(
    dst: NkiTensor,
    pattern: Pattern,
    channel_multiplier: int,
    on_true_tile: NkiTensor,
    on_false_value: float,
    cmp_op: Operator = OPERATORS["equal"],
    offset: int = 0,
    name: str | None = None,
) -> None:
    """dst = on_true where `cmp_op(affine value, 0)`, else on_false. The affine value is that of `iota`."""
    i = issue("affine_select", name, dst=dst, on_true_tile=on_true_tile)
    require_tensor(i, dst=dst, on_true_tile=on_true_tile)
    if not isinstance(cmp_op, Operator) or not cmp_op.compares:
        i.fail(f"cmp_op must be a comparison such as nl.greater_equal, not {cmp_op!r}")
    assert cmp_op.binary is not None
    chosen = cmp_op.binary(_affine(i, pattern, offset, channel_multiplier), 0) != 0
    i.write("dst", np.where(chosen, i.read("on_true_tile"), i.scalar("on_false_value", on_false_value, "dst")))
    i.record()
