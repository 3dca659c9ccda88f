"""Functions that compute a new tile in SBUF with one instruction: `nl.load`, `nl.add(x, y)`, `nl.sum` and the like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.memory import SBUF
from neuron_attn_rewrite.simulator.machine.operators import OPERATORS, Operator
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.isa import activation, dma_copy, tensor_reduce, tensor_scalar, tensor_tensor
from neuron_attn_rewrite.simulator.nki.language.allocation import ndarray


class Function(Operator):
    """An operator that is also a function of tiles: `nl.add` is an argument of instructions, `nl.add(x, y)` a tile."""

    def __call__(self, *tiles: Any, **options: Any) -> NkiTensor:
        return apply(self, *tiles, **options)


class Reduction(Operator):
    """`nl.max` and `nl.min`: an operator that is also a function of a tile and the axes to reduce."""

    def __call__(self, x: Any, axis: Any, dtype: str | None = None, keepdims: bool = False) -> NkiTensor:
        return apply(self, x, dtype=dtype, axis=axis, keepdims=keepdims)


def load(src: NkiTensor, dtype: str | None = None) -> NkiTensor:
    """A tile in SBUF with the values of a tensor in HBM."""
    shape = src.shape if src.ndim > 1 else (1, *src.shape)
    tile = ndarray(shape, dtype or src.dtype, SBUF)
    dma_copy(tile, src)
    return tile


def store(dst: NkiTensor, value: NkiTensor) -> None:
    """Write a tile of SBUF to HBM."""
    dma_copy(dst, value)


def broadcast_to(x: NkiTensor, shape: Sequence[int], dtype: str | None = None) -> NkiTensor:
    """A tile in SBUF, copied by DMA, with dimensions of size 1 repeated. These may be the partitions."""
    if len(shape) != x.ndim or any(old not in (1, n) for old, n in zip(x.shape, shape, strict=True)):
        raise SimulatorError(f"nl.broadcast_to: {x!r} to {tuple(shape)}: only dimensions of size 1 can grow")
    strides = tuple(0 if old != n else k for old, n, k in zip(x.shape, shape, x.strides, strict=True))
    tile = ndarray(shape, dtype or x.dtype)
    dma_copy(tile, NkiTensor(x.storage, x.dtype, tuple(shape), strides, x.offset, x.indirect_by))
    return tile


def apply(
    op: Operator, x: Any, y: Any = None, dtype: str | None = None, axis: Any = None, keepdims: bool = False
) -> NkiTensor:
    """A new tile: `op` of one tile, of two, of a tile and a number, or of a tile along `axis`, its last dimensions."""
    data = x if isinstance(x, NkiTensor) else y
    if not isinstance(data, NkiTensor):
        raise SimulatorError(f"{op!r}(...): at least one argument must be a tile, not {x!r} and {y!r}")
    if axis is not None:
        kept = data.shape[: axis if isinstance(axis, int) else sorted(axis)[0]]
        gone = (1,) * (data.ndim - len(kept))
        tile = ndarray((*kept, *gone) if keepdims or len(kept) == 1 else kept, dtype or data.dtype)
        tensor_reduce(tile, op, data, axis)
        return tile
    tile = ndarray(data.shape, dtype or data.dtype)
    if y is None and op.activation is not None:
        activation(tile, op, data)
    elif y is None:
        tensor_scalar(tile, data, op, None)
    elif isinstance(x, NkiTensor) and isinstance(y, NkiTensor):
        tensor_tensor(tile, x, y, op)
    else:
        tensor_scalar(tile, data, op, x if data is y else y, reverse0=data is y)
    return tile


def sum(x: NkiTensor, axis: Any, dtype: str | None = None, keepdims: bool = False) -> NkiTensor:
    return apply(OPERATORS["add"], x, dtype=dtype, axis=axis, keepdims=keepdims)


FUNCTIONS: dict[str, Operator] = {
    **{name: Function(**vars(operator)) for name, operator in OPERATORS.items()},
    "max": Reduction(**vars(OPERATORS["maximum"])),
    "min": Reduction(**vars(OPERATORS["minimum"])),
}
"""`nl.add`, `nl.exp`, ..., `nl.max`, `nl.min`."""
