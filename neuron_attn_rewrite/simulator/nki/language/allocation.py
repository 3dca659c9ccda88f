"""How a kernel allocates tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.core import VirtualRegister, current
from neuron_attn_rewrite.simulator.machine.dtypes import Array
from neuron_attn_rewrite.simulator.machine.dtypes import dtype as data_type
from neuron_attn_rewrite.simulator.machine.indexing import DynamicSlice
from neuron_attn_rewrite.simulator.machine.memory import HBM, ON_CHIP, PSUM, SBUF, MemoryRegion, Storage
from neuron_attn_rewrite.simulator.machine.target import PARTITIONS, PSUM_BANK_BYTES, PSUM_BANKS
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.isa import memset
from neuron_attn_rewrite.simulator.nki.isa.rules import issue

sbuf, psum = SBUF, PSUM
private_hbm, shared_hbm = HBM
hbm = private_hbm


class _TileSize:
    """`nl.tile_size`: the limits of the target."""

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
        raise SimulatorError(f"nl.ndarray: buffer must be nl.sbuf, nl.psum or one of nl.*_hbm, not {buffer!r}")
    sizes = tuple(shape)
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1 for n in sizes):
        raise SimulatorError(f"nl.ndarray: shape must be a tuple of positive integers, not {sizes}")
    if buffer.on_chip and len(sizes) < 2:
        raise SimulatorError(
            f"nl.ndarray: shape {sizes} of {buffer.value} must have partitions and at least one free dimension"
        )
    storage = Storage(tuple(int(n) for n in sizes), data_type(dtype).name, buffer, name or "")
    if buffer.on_chip:
        return NkiTensor.whole(core.allocator.allocate(storage, address))
    if address is not None:
        raise SimulatorError("nl.ndarray: address= is for tensors in sbuf and psum")
    storage.own()
    return NkiTensor.whole(core.link.shared(core.id, storage) if buffer is shared_hbm else storage)


def full(shape: Sequence[int], fill_value: float, dtype: str, buffer: MemoryRegion = SBUF, name: str = "") -> NkiTensor:
    """An on-chip tensor that `nisa.memset` fills."""
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
