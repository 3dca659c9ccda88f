"""`NkiTensor`: a view of an allocation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.core import VirtualRegister
from neuron_attn_rewrite.simulator.machine.dtypes import Array, dtype
from neuron_attn_rewrite.simulator.machine.indexing import selected
from neuron_attn_rewrite.simulator.machine.memory import MemoryRegion, Storage
from neuron_attn_rewrite.simulator.machine.strides import row_major, view_strides


def _fail(what: str, message: str) -> NoReturn:
    raise SimulatorError(f"NkiTensor.{what}: {message}")


@dataclass(frozen=True)
class Indirect:
    """A run-time offset: one for all elements (`scalar`), or one per partition. It counts `stride` elements."""

    index: NkiTensor | VirtualRegister
    stride: int
    scalar: bool


@dataclass(frozen=True)
class Geometry:
    """Where the elements of a view lie: byte offset and byte strides in `Storage.bytes`."""

    offset: int
    strides: tuple[int, ...]


class NkiTensor:
    """A view of `storage`. shape, strides and offset count elements of `dtype`; on chip, dim 0 is the partition."""

    __slots__ = ("_geometry", "dtype", "indirect_by", "offset", "shape", "storage", "strides")

    def __init__(
        self,
        storage: Storage,
        dtype_name: str,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int = 0,
        indirect: Indirect | None = None,
    ) -> None:
        self.storage, self.dtype, self.shape, self.strides = storage, dtype_name, shape, strides
        self.offset, self.indirect_by = offset, indirect
        self._geometry: Geometry | None = None

    @classmethod
    def whole(cls, storage: Storage) -> NkiTensor:
        return cls(storage, storage.dtype, storage.shape, row_major(storage.shape))

    # -- facts -------------------------------------------------------------------------------------------------

    @property
    def buffer(self) -> MemoryRegion:
        return self.storage.region

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def free_size(self) -> int:
        """Elements per partition of the whole allocation, in the dtype of this view."""
        return self.storage.free_bytes // dtype(self.dtype).itemsize

    @property
    def start_partition(self) -> int:
        return self.storage.start_partition + (self.offset // self.free_size if self.storage.on_chip else 0)

    def is_contiguous(self) -> bool:
        expected = row_major(self.shape)
        dims = range(1 if self.storage.on_chip else 0, self.ndim)
        return all(self.strides[d] == expected[d] or self.shape[d] == 1 for d in dims)

    def is_whole(self) -> bool:
        return (
            self.offset == 0
            and self.indirect_by is None
            and self.size * dtype(self.dtype).itemsize == self.storage.partitions * self.storage.free_bytes
            and view_strides(self.shape, self.strides, (self.size,)) == (1,)
        )

    def is_indirect(self) -> bool:
        return self.indirect_by is not None

    def get_pattern(self) -> list[list[int]]:
        return [[stride, size] for stride, size in zip(self.strides, self.shape, strict=True)]

    def __repr__(self) -> str:
        return f"{self.buffer.value} {self.dtype}{list(self.shape)}" + (f" {self.name!r}" if self.name else "")

    def __bool__(self) -> bool:
        _fail("__bool__", "the values of a tensor are not known while the kernel is built")

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, key: object, value: object) -> NoReturn:
        _fail("__setitem__", "write with an instruction such as nisa.tensor_copy or nisa.dma_copy")

    # -- bytes -------------------------------------------------------------------------------------------------

    def geometry(self) -> Geometry:
        """Byte offset and strides; raises where the view leaves its allocation."""
        if self._geometry is None:
            s, item = self.storage, dtype(self.dtype).itemsize
            last = [(n - 1) * k for n, k in zip(self.shape, self.strides, strict=True)]
            if s.on_chip:
                free = s.free_bytes // item
                partition, start = divmod(self.offset, free)
                rows = self.strides[0] // free
                low = start + sum(min(x, 0) for x in last[1:])
                high = start + sum(max(x, 0) for x in last[1:])
                if low < 0 or high >= free or partition + (self.shape[0] - 1) * rows >= s.partitions:
                    _fail("ap", f"{self.get_pattern()} from {self.offset} on is outside of its {s!r}")
                offset = s.base + partition * s.pitch + start * item
                strides = (rows * s.pitch, *(k * item for k in self.strides[1:]))
            else:
                low = self.offset + sum(min(x, 0) for x in last)
                high = self.offset + sum(max(x, 0) for x in last)
                if low < 0 or high * item >= s.free_bytes:
                    _fail("ap", f"{self.get_pattern()} from {self.offset} on is outside of its {s!r}")
                offset, strides = s.base + self.offset * item, tuple(k * item for k in self.strides)
            self._geometry = Geometry(offset, strides)
        return self._geometry

    def array(self) -> Array:
        """The elements, as a numpy view in the storage type."""
        g = self.geometry()
        return np.ndarray(self.shape, dtype(self.dtype).storage, self.storage.bytes.data, g.offset, g.strides)

    def shadow(self, marks: Array) -> Array:
        """The marks of the view's elements: of their first bytes, or of all bytes if the storage is bytewise."""
        g = self.geometry()
        if self.storage.bytewise:
            item = dtype(self.dtype).itemsize
            return np.ndarray((*self.shape, item), np.bool_, marks, g.offset, (*g.strides, 1))
        return np.ndarray(self.shape, np.bool_, marks, g.offset, g.strides)

    def begun(self) -> Array:
        """Marks of the view's elements: whether a matmul has written them, through this allocation."""
        s = self.storage
        if s.begun is None:
            s.begun = np.zeros(s.partitions * s.free_bytes, np.bool_)
        return np.ndarray(self.shape, np.bool_, s.begun, self.offset, self.strides)

    def _view(self, shape: Sequence[int], strides: Sequence[int], offset: int | None = None) -> NkiTensor:
        start = self.offset if offset is None else offset
        return NkiTensor(self.storage, self.dtype, tuple(shape), tuple(strides), start, self.indirect_by)

    # -- indexing ----------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> NkiTensor:
        keys = list(key) if isinstance(key, tuple) else [key]
        if any(k is Ellipsis for k in keys):
            at = next(i for i, k in enumerate(keys) if k is Ellipsis)
            keys[at : at + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        if len(keys) > self.ndim:
            _fail("__getitem__", f"{len(keys)} indices for the {self.ndim} dimensions of {self!r}")
        keys += [slice(None)] * (self.ndim - len(keys))
        shape, strides, offset = [], [], self.offset
        for d, k in enumerate(keys):
            partitions = d == 0 and self.storage.on_chip
            start, size, step, keep = selected(k, d, self.shape[d], partitions)
            if self.indirect_by is not None and (start, size, step) != (0, self.shape[d], 1):
                _fail("__getitem__", "a view with a dynamic select cannot be sliced")
            offset += start * self.strides[d]
            if keep or partitions:
                shape.append(size)
                strides.append(self.strides[d] * step)
        least = 2 if self.storage.on_chip else 1
        shape += [1] * (least - len(shape))
        strides += [1] * (least - len(strides))
        return self._view(shape, strides, offset)

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        return self[tuple(slice(start, end, step) if d == dim else slice(None) for d in range(self.ndim))]

    def select(self, dim: int, index: int | NkiTensor | VirtualRegister) -> NkiTensor:
        if isinstance(index, int):
            if dim == 0 and self.storage.on_chip:
                return self[index]
            return self[tuple(index if d == dim else slice(None) for d in range(self.ndim))]
        if self.indirect_by is not None or (dim == 0 and self.storage.on_chip):
            _fail("select", "a tensor takes one dynamic select, and not of the partition dimension")
        by = Indirect(index, self.strides[dim], scalar=True)
        rest = [d for d in range(self.ndim) if d != dim]
        shape, strides = [self.shape[d] for d in rest], [self.strides[d] for d in rest]
        return NkiTensor(self.storage, self.dtype, tuple(shape), tuple(strides), self.offset, by)

    def vector_select(self, dim: int, vector_offset: NkiTensor) -> NkiTensor:
        if dim != 0 or self.storage.on_chip or self.indirect_by is not None:
            _fail("vector_select", "it must be of dim 0 of a tensor in HBM that has no dynamic select yet")
        by = Indirect(vector_offset, self.strides[0], scalar=False)
        shape = (vector_offset.shape[0], *self.shape[1:])
        return NkiTensor(self.storage, self.dtype, shape, self.strides, self.offset, by)

    def ap(
        self,
        pattern: Sequence[Sequence[int]],
        offset: int | None = None,
        scalar_offset: NkiTensor | VirtualRegister | None = None,
        vector_offset: NkiTensor | None = None,
        indirect_dim: int = 0,
        dtype: str | None = None,
    ) -> NkiTensor:
        """An explicit access pattern [[stride, count], ...] over the allocation.

        Only of a whole tensor: the documentation contradicts itself on whether `offset` is relative to a view.
        """
        if not self.is_whole():
            _fail("ap", f"{self!r} is a part of its allocation: call .ap on the whole tensor")
        name = dtype or self.dtype
        shape, strides = tuple(int(p[1]) for p in pattern), tuple(int(p[0]) for p in pattern)
        if min(shape) < 1:
            _fail("ap", f"{pattern}: each count must be at least 1")
        by = None
        if scalar_offset is not None and vector_offset is not None:
            _fail("ap", "scalar_offset and vector_offset exclude each other")
        if vector_offset is not None and (indirect_dim != 0 or self.storage.on_chip):
            _fail("ap", "vector_offset must index dim 0 of a tensor in HBM")
        index = scalar_offset if vector_offset is None else vector_offset
        if index is not None:
            by = Indirect(index, row_major(self.shape)[indirect_dim], scalar=vector_offset is None)
        view = NkiTensor(self.storage, name, shape, strides, offset or 0, by)
        if name != self.storage.dtype:
            self.storage.widen()
        if self.storage.on_chip:
            free = view.free_size
            if len(shape) == 1:
                _fail("ap", "a tensor on chip needs a pattern for the partitions and one for the free dimension")
            if strides[0] != free and shape[0] > 1:
                _fail("ap", f"the first stride must be {free}, to read partitions without gaps, not {strides[0]}")
        if by is None:
            view.geometry()
        return view

    def view(self, dtype_name: str) -> NkiTensor:
        old, new = dtype(self.dtype).itemsize, dtype(dtype_name).itemsize
        if self.indirect_by is not None or (self.strides[-1] != 1 and self.shape[-1] != 1 and old != new):
            _fail("view", "the last dimension must be contiguous, without a dynamic select")
        total = self.shape[-1] * old
        if total % new or any(k * old % new for k in (*self.strides[:-1], self.offset)):
            _fail("view", f"{total} bytes of the last dimension are not whole elements of {dtype_name}")
        self.storage.widen()
        strides = (*(k * old // new for k in self.strides[:-1]), 1)
        return NkiTensor(self.storage, dtype_name, (*self.shape[:-1], total // new), strides, self.offset * old // new)

    reinterpret_cast = view

    # -- shape -------------------------------------------------------------------------------------------------

    def _free_dim(self, what: str, dim: int) -> None:
        if dim == 0 and (self.storage.on_chip or (self.indirect_by and not self.indirect_by.scalar)):
            _fail(what, "dim 0 is the partition dimension, which must stay as it is")
        if not 0 <= dim <= self.ndim:
            _fail(what, f"{self!r} has no dim {dim}")

    def permute(self, dims: Sequence[int]) -> NkiTensor:
        if sorted(dims) != list(range(self.ndim)):
            _fail("permute", f"{tuple(dims)} is not a permutation of the {self.ndim} dimensions of {self!r}")
        if dims[0] != 0:
            self._free_dim("permute", 0)
        return self._view([self.shape[d] for d in dims], [self.strides[d] for d in dims])

    def broadcast(self, dim: int, size: int) -> NkiTensor:
        self._free_dim("broadcast", dim)
        if self.shape[dim] != 1:
            _fail("broadcast", f"dim {dim} of {self!r} has size {self.shape[dim]}, not 1")
        shape, strides = list(self.shape), list(self.strides)
        shape[dim], strides[dim] = size, 0
        return self._view(shape, strides)

    def expand_dim(self, dim: int) -> NkiTensor:
        self._free_dim("expand_dim", dim)
        return self._view([*self.shape[:dim], 1, *self.shape[dim:]], [*self.strides[:dim], 1, *self.strides[dim:]])

    def squeeze_dim(self, dim: int) -> NkiTensor:
        self._free_dim("squeeze_dim", dim)
        if self.shape[dim] != 1:
            _fail("squeeze_dim", f"dim {dim} of {self!r} has size {self.shape[dim]}, not 1")
        return self._view([*self.shape[:dim], *self.shape[dim + 1 :]], [*self.strides[:dim], *self.strides[dim + 1 :]])

    def reshape_dim(self, dim: int, shape: Sequence[int]) -> NkiTensor:
        if len(shape) > 1:
            self._free_dim("reshape_dim", dim)
        known = -math.prod(shape) if -1 in shape else math.prod(shape)
        sizes = [self.shape[dim] // max(known, 1) if n == -1 else n for n in shape]
        if math.prod(sizes) != self.shape[dim]:
            _fail("reshape_dim", f"{tuple(shape)} does not divide dim {dim}, whose size is {self.shape[dim]}")
        strides = [k * self.strides[dim] for k in row_major(sizes)]
        return self._view(
            [*self.shape[:dim], *sizes, *self.shape[dim + 1 :]],
            [*self.strides[:dim], *strides, *self.strides[dim + 1 :]],
        )

    def flatten_dims(self, start_dim: int, end_dim: int) -> NkiTensor:
        self._free_dim("flatten_dims", start_dim)
        merged = math.prod(self.shape[start_dim : end_dim + 1])
        inner = slice(start_dim, end_dim + 1)
        strides = view_strides(self.shape[inner], self.strides[inner], (merged,))
        if strides is None:
            _fail("flatten_dims", f"dims {start_dim} to {end_dim} of {self!r} are not contiguous")
        return self._view(
            [*self.shape[:start_dim], merged, *self.shape[end_dim + 1 :]],
            [*self.strides[:start_dim], *strides, *self.strides[end_dim + 1 :]],
        )

    def reshape(self, shape: Sequence[int]) -> NkiTensor:
        new = tuple(int(n) for n in shape)
        if math.prod(new) != self.size:
            _fail("reshape", f"{self!r} has {self.size} elements, {new} has {math.prod(new)}")
        if self.storage.on_chip:
            if new[0] != self.shape[0]:
                _fail("reshape", f"{self!r} to {new}: the partition dimension must stay as it is")
            free = view_strides(self.shape[1:], self.strides[1:], new[1:])
            strides = None if free is None else (self.strides[0], *free)
        else:
            strides = view_strides(self.shape, self.strides, new)
        if strides is None:
            _fail("reshape", f"{self!r} with strides {self.strides} cannot become {new} without a copy")
        return self._view(new, strides)

    def rearrange(
        self, src_pattern: Sequence[Any], dst_pattern: Sequence[Any], fixed_sizes: dict[str, int] | None = None
    ) -> NkiTensor:
        """Split, permute and merge dimensions by name, as einops does."""
        groups = [(p,) if isinstance(p, str) else tuple(p) for p in src_pattern]
        if len(groups) != self.ndim:
            _fail("rearrange", f"{src_pattern} names {len(groups)} dimensions, {self!r} has {self.ndim}")
        view, at = self, 0
        for group in groups:
            if len(group) > 1:
                view = view.reshape_dim(at, tuple((fixed_sizes or {}).get(n, -1) for n in group))
            at += len(group)
        names = [n for g in groups for n in g]
        wanted = [(p,) if isinstance(p, str) else tuple(p) for p in dst_pattern]
        if sorted(names) != sorted(n for g in wanted for n in g):
            _fail("rearrange", f"{src_pattern} and {dst_pattern} do not name the same dimensions")
        view = view.permute([names.index(n) for g in wanted for n in g])
        for at, group in enumerate(wanted):
            if len(group) > 1:
                view = view.flatten_dims(at, at + len(group) - 1)
        return view

    def indirect(self, index: NkiTensor, num_elem: int | None = None) -> NoReturn:
        _fail("indirect", "tensor indirection is not modelled by the simulator")
