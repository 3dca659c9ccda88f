"""The memory of one simulated NeuronCore: allocations, their bytes, and which bytes were written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.dtypes import Array, dtype
from neuron_attn_rewrite.simulator.machine.target import PARTITIONS, PSUM_BANK_BYTES, PSUM_BANKS, PSUM_BYTES, Target


class MemoryRegion(Enum):
    """Where a tensor lives (`nl.MemoryRegion`)."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"

    @property
    def on_chip(self) -> bool:
        return self in ON_CHIP


SBUF, PSUM = MemoryRegion.sbuf, MemoryRegion.psum
ON_CHIP = (SBUF, PSUM)
HBM = (MemoryRegion.private_hbm, MemoryRegion.shared_hbm)


class Bytes:
    """Bytes, and a mark for each byte that was written. `written` is None if all were.

    New bytes are 0xFF, which is NaN in every float dtype and -1 in every signed integer dtype.
    """

    __slots__ = ("data", "written")

    def __init__(self, data: Array | int, *, written: bool = False) -> None:
        self.data: Array = np.full(data, 0xFF, np.uint8) if isinstance(data, int) else data
        self.written: Array | None = None if written else np.zeros(self.data.nbytes, np.bool_)


class Storage:
    """One allocation: `partitions` rows of `free_bytes` each, `pitch` bytes apart, from byte `base` of `bytes` on.

    A tensor in HBM is one row. `complete`: every byte was written, so the marks are not read any more. The mark of an
    element is that of its first byte, until a view with another element size makes the marks `bytewise`. `begun` marks
    the elements of a PSUM tile that a matmul has written, onto which the next matmul may accumulate.
    """

    __slots__ = (
        "base",
        "begun",
        "bytes",
        "bytewise",
        "complete",
        "dtype",
        "exclusive",
        "free_bytes",
        "missing",
        "name",
        "on_chip",
        "partitions",
        "pitch",
        "region",
        "release",
        "shape",
        "start_partition",
        "where",
    )

    def __init__(self, shape: tuple[int, ...], dtype_name: str, region: MemoryRegion, name: str = "") -> None:
        item = dtype(dtype_name).itemsize
        self.shape, self.dtype, self.region, self.name = shape, dtype_name, region, name
        self.on_chip, self.where = region in ON_CHIP, region.value
        self.partitions = shape[0] if self.on_chip else 1
        self.free_bytes = math.prod(shape[1:] if self.on_chip else shape) * item
        self.base, self.pitch, self.start_partition = 0, self.free_bytes, 0
        self.complete, self.bytewise, self.exclusive = False, False, True
        self.missing = self.partitions * self.free_bytes
        self.begun: Array | None = None
        self.release: Reservation | None = None
        self.bytes: Bytes

    def own(self, data: Array | None = None) -> Storage:
        """Give it bytes of its own, or those of `data`, which count as written."""
        self.bytes = Bytes(self.missing if data is None else data, written=data is not None)
        self.complete = data is not None
        return self

    def place(self, memory: Bytes, pitch: int, partition: int, offset: int) -> Storage:
        """Give it bytes of a memory that tensors share: `offset` bytes into each partition, from `partition` on."""
        self.bytes, self.pitch, self.start_partition = memory, pitch, partition
        self.base = partition * pitch + offset
        self.exclusive, self.bytewise = False, True
        assert memory.written is not None
        rows = memory.written[self.base :][: (self.partitions - 1) * pitch + self.free_bytes]
        np.lib.stride_tricks.as_strided(rows, (self.partitions, self.free_bytes), (pitch, 1))[...] = False
        return self

    def widen(self) -> None:
        """Mark every byte instead of every element, for a view with another element size."""
        if not self.bytewise and self.exclusive:
            self.bytewise = True
            if self.bytes.written is not None and not self.complete:
                item = dtype(self.dtype).itemsize
                rows = self.bytes.written.reshape(-1, item)
                rows[:] = rows[:, :1]

    def __del__(self) -> None:
        if self.release is not None:
            self.release.free()

    def __repr__(self) -> str:
        label = f" {self.name!r}" if self.name else ""
        return f"{self.region.value} tensor{label} {self.shape} {self.dtype}"


@dataclass
class Reservation:
    """The bytes of a `Space` that a live tensor takes, in each partition."""

    space: Space
    banks: dict[int, int]

    def free(self) -> None:
        for bank, size in self.banks.items():
            self.space.used[bank] -= size


@dataclass
class Space:
    """Capacity of one on-chip memory, in bytes per partition. SBUF counts as one bank; a PSUM tile lies in one bank.

    A tensor is live as long as the Python code of the kernel refers to it, which is at least as long as in
    the compiled kernel.
    """

    region: MemoryRegion
    bank_bytes: int
    used: list[int]
    physical: Bytes | None = field(default=None, repr=False)

    @property
    def total(self) -> int:
        return self.bank_bytes * len(self.used)

    def reserve(self, size: int, what: str) -> Reservation:
        need = -(-size // self.bank_bytes)
        room = size if need == 1 else self.bank_bytes
        for first in range(len(self.used) - need + 1):
            banks = range(first, first + need)
            if all(self.used[b] + room <= self.bank_bytes for b in banks):
                taken = dict.fromkeys(banks, room)
                for b in banks:
                    self.used[b] += room
                return Reservation(self, taken)
        raise SimulatorError(
            f"nl.ndarray: no room for {what}: it needs {size} bytes per partition, and of {self.total} bytes of "
            f"{self.region.value} {sum(self.used)} are in use"
            + (f" (a tile must be inside one bank of {PSUM_BANK_BYTES} bytes)" if self.region is PSUM else "")
        )

    def memory(self) -> Bytes:
        """The whole memory as bytes, for tensors with an address."""
        if self.physical is None:
            self.physical = Bytes(PARTITIONS * self.total)
        return self.physical


class Allocator:
    """The on-chip memories of one core. If `physical`, tensors share bytes by address, and live bytes are counted."""

    def __init__(self, target: Target, *, physical: bool) -> None:
        self.physical = physical
        self.spaces = {
            SBUF: Space(SBUF, target.sbuf_bytes, [0]),
            PSUM: Space(PSUM, PSUM_BANK_BYTES, [0] * PSUM_BANKS),
        }

    def allocate(self, storage: Storage, address: tuple[int, int] | None) -> Storage:
        """Give an on-chip tensor its bytes. `address` is (partition, byte offset in the partition)."""
        space = self.spaces[storage.region]
        what = repr(storage)
        if storage.partitions > PARTITIONS:
            raise SimulatorError(
                f"nl.ndarray: {what} has {storage.partitions} partitions; at most {PARTITIONS} are possible"
            )
        if storage.free_bytes > space.total:
            raise SimulatorError(
                f"nl.ndarray: {what} needs {storage.free_bytes} bytes per partition; there are {space.total}"
            )
        if address is None:
            if self.physical:
                storage.release = space.reserve(storage.free_bytes, what)
            return storage.own()
        partition, offset = address
        check_start(f"nl.ndarray: {what}", partition, storage.partitions)
        if storage.region is PSUM and offset % PSUM_BANK_BYTES:
            raise SimulatorError(
                f"nl.ndarray: {what} at byte {offset}: a PSUM address must be the start of a bank, a multiple of "
                f"{PSUM_BANK_BYTES}"
            )
        if not 0 <= offset <= space.total - storage.free_bytes:
            raise SimulatorError(
                f"nl.ndarray: {what} at bytes {offset} to {offset + storage.free_bytes}: this is outside of "
                f"{space.region.value}, which has {space.total} bytes per partition"
            )
        if self.physical:
            return storage.place(space.memory(), space.total, partition, offset)
        storage.start_partition = partition
        return storage.own()


def check_start(what: str, start: int, partitions: int) -> None:
    """Check the first partition of an access (source: `trainium_inferentia2_arch.rst`)."""
    step = 128 if partitions > 64 else 64 if partitions > 32 else 32
    if start % step or start + partitions > PARTITIONS:
        legal = "/".join(str(s) for s in range(0, PARTITIONS, step))
        raise SimulatorError(f"{what}: {partitions} partitions from partition {start} on: they must start at {legal}")


__all__ = ["HBM", "ON_CHIP", "PSUM", "PSUM_BYTES", "SBUF", "Allocator", "Bytes", "MemoryRegion", "Storage"]
