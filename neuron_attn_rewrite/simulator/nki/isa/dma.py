"""Instructions of the DMA."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.dtypes import Array, dtype
from neuron_attn_rewrite.simulator.machine.memory import SBUF
from neuron_attn_rewrite.simulator.machine.operators import Operator
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.isa.enums import dge_mode, engine, oob_mode
from neuron_attn_rewrite.simulator.nki.isa.rules import (
    DMA,
    NOT_PSUM,
    Issue,
    check_written,
    issue,
    mark_written,
    require_tensor,
)

_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


def run_bytes(t: NkiTensor) -> int:
    """The contiguous bytes from the first element of the view on, which one descriptor can move."""
    run = 1
    first = 1 if t.storage.on_chip else 0
    for size, stride in zip(reversed(t.shape[first:]), reversed(t.strides[first:]), strict=True):
        if size > 1 and stride != run:
            break
        run *= size
    return run * dtype(t.dtype).itemsize


def _record(i: Issue, dst: NkiTensor, sources: list[NkiTensor]) -> None:
    moved = [(t, t.size * dtype(t.dtype).itemsize) for t in (dst, *sources)]
    i.record(
        bytes=max(size for _, size in moved),
        run=min(run_bytes(t) for t, _ in moved),
        hbm_read=sum(size for t, size in moved[1:] if not t.storage.on_chip),
        hbm_written=0 if dst.storage.on_chip else moved[0][1],
    )


def _options(i: Issue, priority: int | None, mode: dge_mode, oob: oob_mode) -> None:
    if priority is not None and (i.core.target.generation < 4 or priority not in range(4)):
        i.fail(f"priority must be 0 to 3, on gen4, not {priority!r} on {i.core.target}")
    if mode is dge_mode.hwdge and i.core.target.generation < 3:
        i.fail("dge_mode.hwdge needs gen3")
    if not isinstance(oob, oob_mode):
        i.fail(f"oob_mode must be nisa.oob_mode.error or skip, not {oob!r}")


def dma_copy(
    dst: NkiTensor,
    src: NkiTensor,
    priority: int | None = None,
    oob_mode: oob_mode = oob_mode.error,
    dge_mode: dge_mode = dge_mode.unknown,
    engine: engine = engine.unknown,
    name: str | None = None,
) -> None:
    """dst = src, with equally many elements. If the dtypes differ, it casts through float32."""
    skip = oob_mode.name == "skip"
    try:
        i = issue("dma_copy", name, DMA, dst=dst, src=src)
        require_tensor(i, dst=dst, src=src)
        _options(i, priority, dge_mode, oob_mode)
        dst, src = i.operands["dst"], i.operands["src"]
        if dst.size != src.size:
            i.fail(f"dst {list(dst.shape)} has {dst.size} elements, but src {list(src.shape)} has {src.size}")
        for t in (dst, src):
            if t.indirect_by is None:
                t.geometry()
    except SimulatorError:
        # oob_mode.skip only skips a run-time offset that is out of range.
        if skip and _scalar_out_of_range(dst, src):
            return
        raise
    vectors = [k for k in ("dst", "src") if i.operands[k].indirect_by is not None]
    if dge_mode.name == "hwdge" and (vectors or dst.dtype != src.dtype):
        i.fail("dge_mode.hwdge cannot follow vector offsets and cannot cast")
    if engine.value and (dge_mode.name != "hwdge" or engine.name not in ("scalar", "sync")):
        i.fail(f"engine must be scalar or sync, with dge_mode.hwdge, not {engine!r}")
    if dge_mode.name == "none" and vectors:
        i.fail("a vector offset needs dge_mode.swdge")
    if len(vectors) == 2:
        i.fail("only one side may have a vector offset")
    if not vectors:
        i.write_raw("dst", _cast(i.read_raw("src"), src.dtype, dst.dtype).reshape(dst.shape))
    elif vectors == ["src"]:
        rows, ok = _rows(i, src, "src", skip)
        _check_rows(i, rows, ok, src)
        values = _cast(_elements(src, rows)[_indices(src)[ok]], src.dtype, dst.dtype)
        _write_rows(i, dst, values, ok, src.shape)
    else:
        rows, ok = _rows(i, dst, "dst", skip)
        values = _cast(i.read_raw("src"), src.dtype, dst.dtype).reshape(dst.shape)
        _scatter(dst, rows, ok, values)
    _record(i, dst, [src])


def _scalar_out_of_range(*tensors: Any) -> bool:
    """Whether a run-time offset makes a view leave its tensor, which it does not leave at offset 0."""
    for t in tensors:
        if isinstance(t, NkiTensor) and t.indirect_by is not None and t.indirect_by.scalar:
            NkiTensor(t.storage, t.dtype, t.shape, t.strides, t.offset).geometry()
            return True
    return False


def _cast(x: Array, source: str, target: str) -> Array:
    return x if source == target else dtype(target).store(dtype(source).load(x))


def _indices(t: NkiTensor) -> Array:
    """Row indices of a vector offset, in the order of dim 0 of the view. Several columns are read column by column."""
    by = t.indirect_by
    assert by is not None and isinstance(by.index, NkiTensor)
    return by.index.array().reshape(by.index.shape[0], -1).T.reshape(-1)[: t.shape[0]].astype(np.int64)


def _rows(i: Issue, t: NkiTensor, key: str, skip: bool) -> tuple[int, Array]:
    """How many rows the indexed tensor has for this pattern, and which indices are in range."""
    by = t.indirect_by
    assert by is not None
    index = by.index
    if not isinstance(index, NkiTensor) or index.buffer is not SBUF or dtype(index.dtype).kind != "int":
        i.fail(f"vector_offset of {key} must be an integer tile (partitions, 1) in sbuf, not {index!r}")
    if t.storage.on_chip:
        i.fail(f"{key} has a vector offset: it must be in HBM")
    if index.size < t.shape[0]:
        i.fail(f"vector_offset of {key} has {index.size} indices for {t.shape[0]} rows")
    check_written(index, f"nki.isa.{i.op}", f"vector_offset of {key}")
    item = dtype(t.dtype).itemsize
    extent = sum((n - 1) * k for n, k in zip(t.shape[1:], t.strides[1:], strict=True))
    rows = (t.storage.free_bytes // item - t.offset - extent - 1) // by.stride + 1
    values = _indices(t)
    ok = (values >= 0) & (values < rows)
    if not ok.all() and not skip:
        i.fail(f"{key} index {int(values[~ok][0])} of {rows} rows; oob_mode.skip drops such rows")
    return rows, ok


def _elements(t: NkiTensor, rows: int, marks: Array | None = None) -> Array:
    """All rows that an index of the view could select, [rows, ...]; or their `marks`."""
    assert t.indirect_by is not None
    kind = dtype(t.dtype)
    strides = tuple(k * kind.itemsize for k in (t.indirect_by.stride, *t.strides[1:]))
    source, of = (t.storage.bytes.data, kind.storage) if marks is None else (marks, np.dtype(np.bool_))
    return np.ndarray((rows, *t.shape[1:]), of, source, t.storage.base + t.offset * kind.itemsize, strides)


def _check_rows(i: Issue, rows: int, ok: Array, src: NkiTensor) -> None:
    s = src.storage
    if s.complete or s.bytes.written is None or not i.core.check_reads:
        return
    if not _elements(src, rows, s.bytes.written)[_indices(src)[ok]].all():
        i.fail(f"src reads rows of {src!r} that were never written")


def _write_rows(i: Issue, dst: NkiTensor, values: Array, ok: Array, shape: tuple[int, ...]) -> None:
    """Write the rows whose index is in range. The other rows of dst keep their values."""
    if ok.all():
        i.write_raw("dst", values.reshape(dst.shape))
        return
    per_row = math.prod(shape[1:])
    if dst.shape[0] != shape[0] and math.prod(dst.shape[1:]) != per_row:
        i.fail(f"oob_mode.skip: dst {list(dst.shape)} must have the rows of {list(shape)}")
    dst.array()[ok] = values.reshape(-1, *dst.shape[1:])
    found = np.zeros(dst.shape, np.bool_)
    found[ok] = True
    mark_written(dst, found)


def _scatter(dst: NkiTensor, rows: int, ok: Array, values: Array) -> None:
    target = _indices(dst)[ok]
    _elements(dst, rows)[target] = values[ok]
    s = dst.storage
    if not s.complete and s.bytes.written is not None:
        s.widen()
        item = dtype(dst.dtype).itemsize
        for byte in range(item):
            _elements(dst, rows, s.bytes.written[byte:] if byte else s.bytes.written)[target] = True


def dma_transpose(
    dst: NkiTensor,
    src: NkiTensor,
    axes: tuple[int, ...] | None = None,
    priority: int | None = None,
    dge_mode: dge_mode = dge_mode.unknown,
    oob_mode: oob_mode = oob_mode.error,
    name: str | None = None,
) -> None:
    """dst = src with its axes permuted by (1, 0), (2, 1, 0) or (3, 1, 2, 0). dst is in SBUF and has that shape."""
    i = issue("dma_transpose", name, DMA, dst=dst, src=src)
    require_tensor(i, dst=dst, src=src)
    _options(i, priority, dge_mode, oob_mode)
    dst, src = i.operands["dst"], i.operands["src"]
    wanted = _AXES.get(src.ndim)
    if wanted is None or (axes is not None and tuple(axes) != wanted):
        i.fail(f"axes {axes} of src {list(src.shape)}: they must be {', '.join(map(str, _AXES.values()))} for its rank")
    shape = tuple(src.shape[a] for a in wanted)
    if dst.shape != shape:
        i.fail(f"dst is {list(dst.shape)}; it must be {list(shape)} for src {list(src.shape)} and axes {wanted}")
    if src.indirect_by is None:
        if dge_mode.name not in ("unknown", "hwdge"):
            i.fail(f"dge_mode must be unknown or hwdge, not {dge_mode.name}")
        if dge_mode.name == "hwdge":
            _check_hwdge(i, src)
        values = i.read_raw("src")
    else:
        if dge_mode.name not in ("unknown", "swdge"):
            i.fail(f"dge_mode of an indirect transpose must be unknown or swdge, not {dge_mode.name}")
        rows, ok = _rows(i, src, "src", oob_mode.name == "skip")
        _check_gather(i, src)
        _check_rows(i, rows, ok, src)
        if not ok.all():
            i.fail("oob_mode.skip of an indirect transpose is not modelled by the simulator")
        values = _elements(src, rows)[_indices(src)]
    i.write_raw("dst", values.transpose(wanted))
    _record(i, dst, [src])


def _check_hwdge(i: Issue, src: NkiTensor) -> None:
    lead = src.shape[0]
    fits = lead == 16 if src.ndim == 2 else lead in (1, 2, 4, 8, 16) and lead * src.shape[-2] % 16 == 0
    if not fits or src.shape[-1] > 128 or dtype(src.dtype).itemsize != 2:
        i.fail(
            f"dge_mode.hwdge of src {src!r}: it needs 2-byte elements, at most 128 in the last dimension, and 16 rows "
            "(2-d), or 1, 2, 4, 8 or 16 with shape[0] * shape[-2] a multiple of 16"
        )


def _check_gather(i: Issue, src: NkiTensor) -> None:
    assert src.indirect_by is not None and isinstance(src.indirect_by.index, NkiTensor)
    index = src.indirect_by.index
    lines, columns = index.shape[0], index.size // index.shape[0]
    for wrong, message in (
        (i.core.target.generation < 3, f"needs gen3; the target is {i.core.target}"),
        (dtype(src.dtype).itemsize != 2, f"takes 2-byte elements, not {src.dtype}"),
        (src.shape[-1] > 128, f"takes at most 128 elements in the last dimension, not {src.shape[-1]}"),
        (src.shape[0] % 16 != 0, f"takes a multiple of 16 rows, not {src.shape[0]}"),
        (src.ndim == 4 and 1 not in src.shape[1:3], f"of 4 dimensions has a 1 in the middle, not {list(src.shape)}"),
        (index.dtype != "uint32", f"takes uint32 indices, not {index.dtype}"),
        (lines % 16 != 0 or not 16 <= lines <= 128, f"takes indices on 16, 32, ... 128 partitions, not {lines}"),
        (columns > 1 and lines != 128, f"takes several columns of indices on 128 partitions only, not {lines}"),
    ):
        if wrong:
            i.fail(f"an indirect transpose {message}")


def dma_compute(
    dst: NkiTensor,
    srcs: list[NkiTensor],
    reduce_op: Operator,
    scales: list[float] | None = None,
    unique_indices: bool = True,
    oob_mode: oob_mode = oob_mode.error,
    name: str | None = None,
) -> None:
    """dst = the sum of srcs in float32. With a vector offset: dst[rows] += data, or dst += data[rows]."""
    i = issue("dma_compute", name, DMA, dst=dst)
    require_tensor(i, dst=dst)
    if not isinstance(reduce_op, Operator) or reduce_op.name != "add":
        i.fail(f"reduce_op must be nl.add, not {reduce_op!r}")
    if scales is not None and any(s != 1.0 for s in scales):
        i.fail(f"scales must all be 1.0, not {scales}")
    if not 1 <= len(srcs) <= 16:
        i.fail(f"srcs must be 1 to 16 tensors, not {len(srcs)}")
    for k, s in enumerate(srcs):
        if not isinstance(s, NkiTensor) or s.buffer not in NOT_PSUM or s.size != dst.size:
            i.fail(f"srcs[{k}] is {s!r}; it must be in sbuf or HBM with the {dst.size} elements of dst")
    indirect = [t for t in srcs if t.is_indirect()]
    if indirect and (len(srcs) != 2 or not unique_indices):
        i.fail("a vector offset takes exactly two sources and unique_indices=True")
    total = np.zeros(dst.shape, np.float32)
    for t in srcs:
        i.operands["src"] = t
        if t.is_indirect():
            rows, ok = _rows(i, t, "src", oob_mode.name == "skip")
            _check_rows(i, rows, ok, t)
            found = np.zeros(t.shape, np.float32)
            found[ok] = dtype(t.dtype).load(_elements(t, rows)[_indices(t)[ok]])
            total += found.reshape(dst.shape)
        else:
            total += dtype(t.dtype).load(i.read_raw("src")).reshape(dst.shape)
    values = dtype(dst.dtype).store(total)
    del i.operands["src"]
    if dst.is_indirect():
        rows, ok = _rows(i, dst, "dst", oob_mode.name == "skip")
        if len(np.unique(_indices(dst)[ok])) != int(ok.sum()):
            i.fail("indices of dst repeat: with unique_indices=True they must not")
        _scatter(dst, rows, ok, values)
    else:
        i.write_raw("dst", values)
    _record(i, dst, srcs)
