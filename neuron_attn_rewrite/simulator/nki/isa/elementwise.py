"""Instructions of the vector engine that work element by element. GpSimd and the scalar engine have some of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from neuron_attn_rewrite.simulator.machine.dtypes import Array, dtype
from neuron_attn_rewrite.simulator.machine.memory import PSUM, check_start
from neuron_attn_rewrite.simulator.machine.operators import Operator
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.isa.activations import combine
from neuron_attn_rewrite.simulator.nki.isa.enums import engine
from neuron_attn_rewrite.simulator.nki.isa.rules import (
    Issue,
    check_written,
    free_elements,
    issue,
    mark_written,
    operator,
    require_tensor,
)

WORDS = frozenset({"int32", "uint32"})


def tensor_copy(dst: NkiTensor, src: NkiTensor, engine: engine = engine.unknown, name: str | None = None) -> None:
    """dst = src. With one dtype it copies the bits, except on the scalar engine; else it casts through float32."""
    i = issue("tensor_copy", name, engine, dst=dst, src=src)
    require_tensor(i, dst=dst, src=src)
    scalar = i.engine.name == "scalar"
    if scalar and i.core.target.generation < 3:
        i.fail("the scalar engine of gen2 has no tensor_copy: use nisa.activation with op=nl.copy")
    if i.operands["dst"].dtype == i.operands["src"].dtype and not scalar:
        i.write_raw("dst", i.read_raw("src").reshape(i.operands["dst"].shape))
    else:
        i.write("dst", i.read("src"))
    i.record()


def memset(dst: NkiTensor, value: float, engine: engine = engine.unknown, name: str | None = None) -> None:
    """dst = value: a float for a float dtype, an int for an integer dtype."""
    i = issue("memset", name, engine, dst=dst)
    require_tensor(i, dst=dst)
    kind = dtype(i.operands["dst"].dtype)
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        i.fail(f"value must be a number, not {value!r}")
    if kind.kind != "float" and isinstance(value, float | np.floating):
        i.fail(f"value={value!r} is a float, but dst is {kind.name}: pass an int")
    if kind.kind == "float":
        i.write_raw("dst", kind.store(np.array(value, np.float32)))
    else:
        limits = np.iinfo(kind.storage)
        if not limits.min <= value <= limits.max:
            i.fail(f"value={value!r} is out of the range of {kind.name}")
        i.write_raw("dst", np.array(value, kind.storage))
    i.record()


def tensor_copy_predicated(
    dst: NkiTensor,
    src: float | NkiTensor,
    predicate: NkiTensor,
    reverse_pred: bool = False,
    name: str | None = None,
) -> None:
    """dst = src where predicate is not zero. Elsewhere dst keeps its values."""
    i = issue("tensor_copy_predicated", name, dst=dst, src=src, predicate=predicate)
    require_tensor(i, dst=dst, predicate=predicate)
    dst = i.operands["dst"]
    if i.operands["predicate"].dtype not in ("uint8", "uint16", "uint32"):
        i.fail(f"predicate must be uint8, uint16 or uint32, not {i.operands['predicate'].dtype}")
    chosen = (i.read_raw("predicate") != 0).reshape(dst.shape) != bool(reverse_pred)
    if isinstance(src, NkiTensor):
        value = i.read_raw("src").reshape(dst.shape)
    else:
        value = dtype(dst.dtype).store(np.array(i.scalar("src", src, "dst"), np.float32))
    np.copyto(dst.array(), value, where=chosen)
    mark_written(dst, chosen)
    i.record()


def tensor_tensor(
    dst: NkiTensor,
    data1: NkiTensor,
    data2: NkiTensor,
    op: Operator,
    engine: engine = engine.unknown,
    name: str | None = None,
) -> None:
    """dst = data1 op data2 in float32. If all are int32 or uint32, GpSimd computes with exact 32-bit integers."""
    tiles = [t for t in (dst, data1, data2) if isinstance(t, NkiTensor)]
    on_gpsimd = isinstance(op, Operator) and op.name == "power"
    words = {t.dtype for t in tiles} <= WORDS and PSUM not in {t.buffer for t in tiles}
    arithmetic = isinstance(op, Operator) and op.bits is None
    if not engine.value and arithmetic and (on_gpsimd or words):
        engine = engine.gpsimd
    i = issue("tensor_tensor", name, engine, dst=dst, data1=data1, data2=data2)
    require_tensor(i, dst=dst, data1=data1, data2=data2)
    if isinstance(op, Operator) and op.bits is not None:
        _integers(i, "dst", "data1", "data2")
        if i.engine.name != "vector":
            i.fail(f"{op!r} works on bits: only the vector engine has it")
        result = op.bits(*(i.read_raw(k).reshape(i.operands["dst"].shape) for k in ("data1", "data2")))
        i.write_raw("dst", result)
    elif i.engine.name == "gpsimd" and words:
        exact = operator(i, "op", op, "binary")
        first, second = (i.read_raw(k).astype(np.int64).reshape(i.operands["dst"].shape) for k in ("data1", "data2"))
        result = combine(exact, first, second)
        i.write_raw("dst", np.asarray(result).astype(np.int64).astype(i.operands["dst"].array().dtype))
    else:
        i.write("dst", combine(operator(i, "op", op, "binary"), i.read("data1"), i.read("data2")))
    i.record()


def _integers(i: Issue, *keys: str) -> None:
    for key in keys:
        kind = dtype(i.operands[key].dtype)
        if kind.kind == "float":
            i.fail(f"{key} is {kind.name}; operators on bits only take integers")
    if len({dtype(i.operands[k].dtype).itemsize for k in keys}) > 1:
        i.fail(f"operators on bits do not cast: {', '.join(i.operands[k].dtype for k in keys)} differ in size")


def tensor_scalar(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Operator,
    operand0: float | NkiTensor | None,
    reverse0: bool = False,
    op1: Operator | None = None,
    operand1: float | NkiTensor | None = None,
    reverse1: bool = False,
    engine: engine = engine.unknown,
    name: str | None = None,
) -> None:
    """dst = (data op0 operand0) op1 operand1; the operands are numbers or float32 tiles [partitions, 1]."""
    rsqrt = isinstance(op0, Operator) and op0.name == "rsqrt"
    if not engine.value and rsqrt:
        engine = engine.gpsimd
    i = issue("tensor_scalar", name, engine, dst=dst, data=data, operand0=operand0, operand1=operand1)
    require_tensor(i, dst=dst, data=data)
    if (op1 is None) != (operand1 is None) and not (isinstance(op1, Operator) and op1.unary):
        i.fail("op1 and operand1 must be given together")
    if i.engine.name == "gpsimd" and not rsqrt:
        i.fail("gpsimd only has rsqrt")
    if i.engine.name == "scalar":
        pair = (getattr(op0, "name", ""), getattr(op1, "name", None))
        if i.core.target.generation < 3 or pair not in {("multiply", "add"), ("multiply", None), ("add", None)}:
            i.fail(f"the scalar engine has multiply and add, multiply, or add, from gen3 on, not {op0!r}, {op1!r}")
    bits = [isinstance(op, Operator) and op.bits is not None for op in (op0, op1) if op is not None]
    if any(bits):
        if not all(bits) or i.engine.name != "vector":
            i.fail(f"{op0!r} and {op1!r}: both must work on bits, on the vector engine, or neither of them")
        _integers(i, "dst", "data")
        y: Any = i.read_raw("data").reshape(len(i.operands["data"].array()), -1)
        for key, op, operand, reverse in (("operand0", op0, operand0, reverse0), ("operand1", op1, operand1, reverse1)):
            if op is not None:
                y = _bits(i, key, op, y, operand, reverse)
        i.write_raw("dst", y.reshape(i.operands["dst"].shape).view(i.operands["dst"].array().dtype))
    else:
        y = apply_alu(i, "0", op0, i.read("data"), operand0, reverse0)
        if op1 is not None:
            y = apply_alu(i, "1", op1, y, operand1, reverse1)
        i.write("dst", y)
    i.record()


def _bits(i: Issue, key: str, op: Operator, x: Array, operand: Any, reverse: bool) -> Array:
    assert op.bits is not None
    if op.name == "invert":
        result: Array = op.bits(x)
        return result
    if isinstance(operand, NkiTensor):
        if dtype(operand.dtype).kind == "float" or operand.shape[0] != len(x) or free_elements(operand) != 1:
            i.fail(f"{key} must be an int or an integer tile of shape ({len(x)}, 1), not {operand!r}")
        y = i.read_raw(key).reshape(-1, 1).astype(x.dtype)
    elif isinstance(operand, int) and not isinstance(operand, bool):
        y = np.array(operand & (2 ** (8 * x.dtype.itemsize) - 1), np.uint64).astype(x.dtype)
    else:
        i.fail(f"{key} must be an int or an integer tile, not {operand!r}")
    shifted: Array = op.bits(y, x) if reverse else op.bits(x, y)
    return shifted


def apply_alu(i: Issue, slot: str, op: object, x: Array, operand: Any, reverse: bool) -> Array:
    """One operator of the ALU on float32 [partitions, elements]."""
    if isinstance(op, Operator) and op.unary is not None:
        if operand is not None and not (isinstance(operand, int | float) and operand == 0):
            i.fail(f"operand{slot} of {op!r}, which takes one input, must be None or 0, not {operand!r}")
        result: Array = op.unary(x)
        return result
    binary = operator(i, f"op{slot}", op, "binary")
    combined: Array = combine(binary, x, i.scalar(f"operand{slot}", operand, "data"), reverse)
    return combined


def scalar_tensor_tensor(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Operator,
    operand0: float | NkiTensor,
    op1: Operator,
    operand1: NkiTensor,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """dst = (data op0 operand0) op1 operand1. operand0 is a number or [partitions, 1], operand1 a tile."""
    i = issue("scalar_tensor_tensor", name, dst=dst, data=data, operand0=operand0, operand1=operand1)
    require_tensor(i, dst=dst, data=data, operand1=operand1)
    x = apply_alu(i, "0", op0, i.read("data"), operand0, reverse0)
    i.write("dst", combine(operator(i, "op1", op1, "binary"), x, i.read("operand1"), reverse1))
    i.record()


def reciprocal(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> None:
    """dst = 1 / data in float32."""
    i = issue("reciprocal", name, dst=dst, data=data)
    require_tensor(i, dst=dst, data=data)
    i.write("dst", np.float32(1) / i.read("data"))
    i.record()


def nc_stream_shuffle(dst: NkiTensor, src: NkiTensor, shuffle_mask: list[int], name: str | None = None) -> None:
    """In each quadrant of 32 partitions, dst[p] = src[shuffle_mask[p]]. With 255, dst[p] keeps its values."""
    i = issue("nc_stream_shuffle", name, dst=dst, src=src)
    require_tensor(i, dst=dst, src=src)
    dst, src = i.operands["dst"], i.operands["src"]
    mask = [int(m) for m in shuffle_mask]
    if len(mask) != 32 or any(not (0 <= m < 32 or m == 255) for m in mask):
        i.fail(f"shuffle_mask must have 32 entries, each a partition 0 to 31 or 255, not {mask}")
    if free_elements(dst) != free_elements(src):
        i.fail(f"dst {list(dst.shape)} and src {list(src.shape)} must have equally many elements per partition")
    active = -(-max(dst.shape[0], src.shape[0]) // 32) * 32
    for key, t in (("dst", dst), ("src", src)):
        check_start(f"nki.isa.nc_stream_shuffle: {key}", t.start_partition, active)
    rows = [(p, p // 32 * 32 + mask[p % 32]) for p in range(dst.shape[0]) if mask[p % 32] != 255]
    if rows and max(source for _, source in rows) >= src.shape[0]:
        i.fail(f"shuffle_mask reads partition {max(s for _, s in rows)} of src, which has {src.shape[0]}")
    to, source = [p for p, _ in rows], [s for _, s in rows]
    check_written(src, "nki.isa.nc_stream_shuffle", "src", source)
    values = src.array().reshape(src.shape[0], -1)[source]
    dst.array()[to] = values.reshape(len(to), *dst.shape[1:])
    moved = np.zeros(dst.shape, np.bool_)
    moved[to] = True
    mark_written(dst, moved)
    i.record()


def tensor_tensor_scan(
    dst: NkiTensor,
    data0: NkiTensor,
    data1: NkiTensor,
    initial: float | NkiTensor,
    op0: Operator,
    op1: Operator,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """r[j] = (data0[j] op0 r[j-1]) op1 data1[j] along the free dimension, r[-1] = initial."""
    i = issue("tensor_tensor_scan", name, dst=dst, data0=data0, data1=data1, initial=initial)
    require_tensor(i, dst=dst, data0=data0, data1=data1)
    first, second = operator(i, "op0", op0, "binary"), operator(i, "op1", op1, "binary")
    a, b = i.read("data0"), i.read("data1")
    state = np.broadcast_to(i.scalar("initial", initial, "data0", any_float=True), (len(a), 1))
    result = np.empty_like(a)
    for j in range(a.shape[1]):
        step = combine(first, a[:, j : j + 1], state, reverse0)
        state = combine(second, step, b[:, j : j + 1], reverse1)
        result[:, j : j + 1] = state
    i.write("dst", result)
    i.record()
