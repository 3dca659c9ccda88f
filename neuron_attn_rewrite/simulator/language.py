"""The simulator's `nki.language`: allocation, indexing, loops, program identity, and the operator tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.core import VirtualRegister, current, register_value, set_register
from neuron_attn_rewrite.simulator.dtypes import DTYPES, Array
from neuron_attn_rewrite.simulator.dtypes import dtype as data_type
from neuron_attn_rewrite.simulator.isa import (
    activation,
    dma_copy,
    memset,
    tensor_reduce,
    tensor_scalar,
    tensor_tensor,
)
from neuron_attn_rewrite.simulator.isa.rules import issue
from neuron_attn_rewrite.simulator.memory import HBM, ON_CHIP, PSUM, SBUF, MemoryRegion, Storage
from neuron_attn_rewrite.simulator.operators import OPERATORS, REDUCTIONS, Operator
from neuron_attn_rewrite.simulator.target import PARTITIONS, PSUM_BANK_BYTES, PSUM_BANKS
from neuron_attn_rewrite.simulator.tensor import DynamicSlice, NkiTensor

# The tokens nl.add, nl.exp, ... and the dtypes nl.float32, ...: dtypes are plain strings.
globals().update(OPERATORS | REDUCTIONS)
globals().update({name: name for name in DTYPES if name != "bool"})
bool_ = "bool"
DType = str

sbuf, psum = SBUF, PSUM
private_hbm, shared_hbm = HBM
hbm = private_hbm


def _is_field(value: object) -> bool:
    return not callable(value) and not isinstance(value, property | staticmethod | classmethod)


class NKIObject:
    """Base of a kernel's own data classes: fields, annotated or not, become keyword arguments as in the frontend."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = dict(vars(cls).get("__annotations__", {}))
        plain = {k: Any for k, v in vars(cls).items() if not k.startswith("__") and k not in own and _is_field(v)}
        cls.__annotations__ = {**own, **plain}

    def __init__(self, **kwargs: Any) -> None:
        fields = {k: v for c in reversed(type(self).__mro__) for k, v in vars(c).get("__annotations__", {}).items()}
        missing = [f for f in fields if f not in kwargs and not hasattr(type(self), f)]
        unknown = [k for k in kwargs if k not in fields and not hasattr(type(self), k)]
        if missing or unknown:
            raise TypeError(f"{type(self).__name__}: fields {missing} are missing, {unknown} are unknown")
        for name in fields:
            if name not in kwargs:
                setattr(self, name, getattr(type(self), name))
        for name, value in kwargs.items():
            setattr(self, name, value)
        post = getattr(self, "__post_init__", None)
        if post is not None:
            post()


class _TileSize:
    """`nl.tile_size`: limits of the target that is running."""

    pmax = PARTITIONS
    psum_bank_fmax = psum_fmax = PSUM_BANK_BYTES // 4
    psum_bank_fmax_bytes = PSUM_BANK_BYTES
    psum_num_banks = PSUM_BANKS
    psum_min_align, sbuf_min_align = 4, 1
    gemm_stationary_fmax = 128
    bn_stats_fmax = 512

    @property
    def gemm_moving_fmax(self) -> int:
        return 512

    @property
    def sbuf_fmax_bytes(self) -> int:
        return current("nl.tile_size").target.sbuf_bytes

    @property
    def sbuf_fmax(self) -> int:
        return self.sbuf_fmax_bytes // 4

    @property
    def sbuf_size_bytes(self) -> int:
        return current("nl.tile_size").target.sbuf_raw_bytes * PARTITIONS

    @property
    def total_available_sbuf_size(self) -> int:
        return self.sbuf_fmax_bytes


tile_size = _TileSize()


def is_hbm(buffer: MemoryRegion) -> bool:
    return buffer in HBM


def is_on_chip(buffer: MemoryRegion) -> bool:
    return buffer in ON_CHIP


def is_psum(buffer: MemoryRegion) -> bool:
    return buffer is PSUM


def is_sbuf(buffer: MemoryRegion) -> bool:
    return buffer is SBUF


def ds(start: int | VirtualRegister, size: int) -> DynamicSlice:
    """`size` elements from `start`, which may be a register."""
    return DynamicSlice(start, size)


def ndarray(
    shape: Sequence[int],
    dtype: str,
    buffer: MemoryRegion = SBUF,
    name: str = "",
    address: tuple[int, int] | None = None,
) -> NkiTensor:
    """An uninitialized tensor. `address` is (partition, byte in the partition) of an on-chip tensor."""
    core = current("nl.ndarray")
    if not isinstance(buffer, MemoryRegion):
        raise SimulatorError(f"nl.ndarray: buffer is nl.sbuf, nl.psum or one of nl.*_hbm, not {buffer!r}")
    sizes = tuple(shape)
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1 for n in sizes):
        raise SimulatorError(f"nl.ndarray: shape {sizes} is a tuple of positive integers")
    if buffer.on_chip and len(sizes) < 2:
        raise SimulatorError(f"nl.ndarray: shape {sizes} of {buffer.value}: partitions and at least one free dimension")
    storage = Storage(tuple(int(n) for n in sizes), data_type(dtype).name, buffer, name or "")
    if buffer.on_chip:
        return NkiTensor.whole(core.allocator.allocate(storage, address))
    if address is not None:
        raise SimulatorError("nl.ndarray: address= is for tensors in sbuf and psum")
    storage.own()
    return NkiTensor.whole(core.link.shared(core.id, storage) if buffer is shared_hbm else storage)


def full(shape: Sequence[int], fill_value: float, dtype: str, buffer: MemoryRegion = SBUF, name: str = "") -> NkiTensor:
    """An on-chip tensor filled by `nisa.memset`."""
    tensor = ndarray(shape, dtype, buffer, name)
    memset(tensor, fill_value if data_type(dtype).kind == "float" else int(fill_value))
    return tensor


def zeros(shape: Sequence[int], dtype: str, buffer: MemoryRegion = SBUF, name: str = "") -> NkiTensor:
    return full(shape, 0, dtype, buffer, name)


def ones(shape: Sequence[int], dtype: str, buffer: MemoryRegion = SBUF, name: str = "") -> NkiTensor:
    return full(shape, 1, dtype, buffer, name)


def empty_like(x: NkiTensor, dtype: str | None = None, buffer: MemoryRegion | None = None, name: str = "") -> NkiTensor:
    return ndarray(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def zeros_like(x: NkiTensor, dtype: str | None = None, buffer: MemoryRegion | None = None, name: str = "") -> NkiTensor:
    return zeros(x.shape, dtype or x.dtype, buffer or x.buffer, name)


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
    """A tile in SBUF with the dimensions of size 1 repeated, partitions too; by DMA."""
    if len(shape) != x.ndim or any(old not in (1, n) for old, n in zip(x.shape, shape, strict=True)):
        raise SimulatorError(f"nl.broadcast_to: {x!r} to {tuple(shape)}: dimensions of size 1 grow, no other")
    strides = tuple(0 if old != n else k for old, n, k in zip(x.shape, shape, x.strides, strict=True))
    tile = ndarray(shape, dtype or x.dtype)
    dma_copy(tile, NkiTensor(x.storage, x.dtype, tuple(shape), strides, x.offset, x.indirect_by))
    return tile


def apply(
    op: Operator, x: Any, y: Any = None, dtype: str | None = None, axis: Any = None, keepdims: bool = False
) -> NkiTensor:
    """`op` on one tile, on two, on a tile and a number, or along the last free dimensions, into a new tile."""
    data = x if isinstance(x, NkiTensor) else y
    if not isinstance(data, NkiTensor):
        raise SimulatorError(f"{op!r}(...): one argument at least is a tile, not {x!r} and {y!r}")
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


def shared_constant(constant: Array) -> NkiTensor:
    """A constant of the compiled kernel, in HBM shared by both cores."""
    core = current("nl.shared_constant")
    data = np.ascontiguousarray(constant)
    storage = Storage(data.shape, data_type(data.dtype).name, shared_hbm)
    storage.own(data.reshape(-1).view(np.uint8).copy())
    return NkiTensor.whole(core.link.shared(core.id, storage))


def shared_identity_matrix(n: int, dtype: str = "uint8", dst: NkiTensor | None = None) -> NkiTensor:
    """The identity matrix [n, n] in SBUF."""
    tile = ndarray((n, n), dtype, SBUF) if dst is None else dst
    i = issue("shared_identity_matrix", None, dst=tile)
    kind = data_type(tile.dtype)
    i.write_raw("dst", np.eye(n).astype(np.float32).astype(kind.storage).reshape(tile.shape))
    size = n * n * kind.itemsize
    i.record(bytes=size, run=n * kind.itemsize, hbm_read=size)
    return tile


def program_id(axis: int = 0) -> int:
    """Which core of the logical NeuronCore runs."""
    return current("nl.program_id").id


def num_programs(axes: int | Sequence[int] = 0) -> int:
    """Cores of the launch: 1 or 2."""
    return current("nl.num_programs").lnc


def program_ndim() -> int:
    """Axes of the launch grid: 0 for one core."""
    return 0 if current("nl.program_ndim").lnc == 1 else 1


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Python's range: the loop is unrolled."""
    for bound in (start, stop, step):
        if isinstance(bound, VirtualRegister):
            raise SimulatorError("a register bounds nl.fori_loop, not an unrolled loop")
    return range(start) if stop is None else range(start, stop, step)


affine_range = sequential_range = static_range


def _bound(x: int | VirtualRegister) -> int:
    return register_value(x, "nl.fori_loop") if isinstance(x, VirtualRegister) else int(x)


def fori_loop(
    lower: int | VirtualRegister,
    upper: int | VirtualRegister,
    body_fun: Callable[[VirtualRegister], None],
    step: int = 1,
) -> None:
    """A loop of the hardware; the body gets its index in a register."""
    if isinstance(step, VirtualRegister) or step < 1:
        raise SimulatorError(f"nl.fori_loop: step is a positive integer known at compile time, not {step!r}")
    first = _bound(lower)
    for index in range(first, _bound(upper), step):
        if _iterate(body_fun, VirtualRegister(index), repeated=index > first) is not None:
            raise SimulatorError("nl.fori_loop: the body returns nothing")


def while_loop(init: VirtualRegister, body_fun: Callable[[VirtualRegister], VirtualRegister]) -> None:
    """A loop of the hardware, run while the register is not zero; the body returns the next register."""
    condition, repeated = VirtualRegister(register_value(init, "nl.while_loop")), False
    while register_value(condition, "nl.while_loop"):
        following = _iterate(body_fun, condition, repeated=repeated)
        if not isinstance(following, VirtualRegister):
            raise SimulatorError("nl.while_loop: the body returns the register of the next condition")
        condition = VirtualRegister()
        set_register(condition, register_value(following, "nl.while_loop"))
        repeated = True


def _iterate(body: Callable[[VirtualRegister], Any], register: VirtualRegister, *, repeated: bool) -> Any:
    """One iteration: its instructions are those of the first, so their names may come again."""
    core = current("a loop")
    before, core.repeated = core.repeated, core.repeated or repeated
    core.loops += 1
    try:
        return body(register)
    finally:
        core.loops -= 1
        core.repeated = before


def no_reorder() -> nullcontext[None]:
    """Keeps the order of instructions; the simulator keeps it anyway."""
    return nullcontext()


def device_print(print_prefix: str, tensor: NkiTensor) -> None:
    print(print_prefix, tensor.array())


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise SimulatorError(f"nl.{name} is not modelled by the simulator")
