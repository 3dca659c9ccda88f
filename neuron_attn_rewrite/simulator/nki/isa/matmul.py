"""Instructions of the tensor engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from neuron_attn_rewrite.simulator.machine.dtypes import FP8, MATMUL, Array, dtype
from neuron_attn_rewrite.simulator.machine.memory import PSUM, SBUF
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.isa.enums import engine, matmul_perf_mode
from neuron_attn_rewrite.simulator.nki.isa.rules import Issue, free_elements, issue, mark_written, require_tensor

WIDE = frozenset({"float32", "tfloat32"})


def nc_matmul(
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: tuple[int, ...] = (),
    tile_size: tuple[int, ...] = (),
    perf_mode: matmul_perf_mode = matmul_perf_mode.none,
    name: str | None = None,
) -> None:
    """dst[M, N] (+)= stationary[K, M].T @ moving[K, N] in float32; K is the partition dimension of both."""
    i = issue("nc_matmul", name, dst=dst, stationary=stationary, moving=moving)
    require_tensor(i, dst=dst, stationary=stationary, moving=moving)
    dst, stationary, moving = (i.operands[k] for k in ("dst", "stationary", "moving"))
    _check_matmul_dtypes(i, is_transpose)
    double = perf_mode is matmul_perf_mode.double_row
    a, b = i.read("stationary"), i.read("moving")
    if double:
        _check_double_row(i)
        a, b = (x.reshape(2 * len(x), -1) for x in (a, b))
    (k, m), n = a.shape, b.shape[1]
    rows = k // 2 if double else k
    row_size, column_size = _tile(i, tile_position, tile_size)
    limit = i.core.target.moving[dst.dtype if not is_transpose else "float32"]
    for what, size, most in (
        ("the partitions (K)", rows, row_size),
        ("the free size of stationary (M)", m, column_size),
        ("the free size of moving (N)", n, limit),
    ):
        if size > most:
            i.fail(f"{what} is {size}; on {i.core.target} it must be at most {most}")
    if b.shape[0] != k:
        i.fail(f"stationary has {len(a)} rows and moving {len(b)}: K is the partition dimension of both")
    if dst.shape[0] != m or free_elements(dst) != n:
        i.fail(f"dst is {list(dst.shape)}; it must be [{m}, {n}] for stationary [{k}, {m}] and moving [{k}, {n}]")
    _accumulate(i, np.matmul(a.T, b), accumulate)
    i.record(dims=(k, m, n))


def _check_matmul_dtypes(i: Issue, is_transpose: bool) -> None:
    generation = i.core.target.generation
    kinds = {key: i.operands[key].dtype for key in ("stationary", "moving")}
    for key, kind in kinds.items():
        if kind not in MATMUL or (kind == "float8_e4m3fn" and generation < 4):
            i.fail(f"{key} is {kind}, which the tensor engine of {i.core.target} cannot multiply")
    if len({kind in WIDE for kind in kinds.values()}) > 1:
        i.fail(f"stationary is {kinds['stationary']} and moving {kinds['moving']}: float32 only goes with float32")
    if set(kinds.values()) == {"float8_e4m3", "float8_e4m3fn"}:
        i.fail("float8_e4m3 and float8_e4m3fn cannot be mixed")
    kind = i.operands["dst"].dtype
    legal = {*i.core.target.moving} | ({kinds["stationary"]} if is_transpose else set())
    if kind not in legal:
        i.fail(f"dst is {kind}; on {i.core.target} it must be {' or '.join(sorted(legal))}")


def _check_double_row(i: Issue) -> None:
    if i.core.target.generation < 3:
        i.fail("perf_mode double_row needs gen3")
    for key in ("stationary", "moving"):
        t = i.operands[key]
        if t.dtype not in FP8 or len(t.shape) < 3 or t.shape[1] != 2:
            i.fail(f"double_row needs float8 tiles [partitions, 2, ...]; {key} is {t!r}")


def _tile(i: Issue, position: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the array that the matmul may use. Column tiling is refused: its documentation contradicts
    itself (the text allows it, the parameters' notes do not)."""
    if not position and not size:
        return 128, 128
    if len(position) != 2 or len(size) != 2:
        i.fail("tile_position and tile_size must be set together, as (row, column)")
    smallest = 64 if i.core.target.generation < 3 else 32
    if size[0] not in (smallest, 64, 128) or size[1] != 128 or position[1] != 0:
        i.fail(f"tile_size must be (rows, 128) with {smallest}, 64 or 128 rows, at (row, 0), not {size} at {position}")
    if position[0] % size[0] or not 0 <= position[0] <= 128 - size[0]:
        i.fail(f"tile_position {position} is not a multiple of the {size[0]} rows")
    return size[0], size[1]


def _accumulate(i: Issue, product: Array, accumulate: bool | None) -> None:
    """Write or add a product. Where a matmul has written is known element by element."""
    dst = i.operands["dst"]
    s = dst.storage
    begun = dst.begun()
    old = dst.array()
    kind = dtype(dst.dtype)
    value = product.reshape(dst.shape)
    if accumulate and not begun.all():
        written = s.complete or (s.bytes.written is not None and bool(dst.shadow(s.bytes.written).all()))
        if not written:
            i.fail("accumulate=True onto PSUM that was never written: pass accumulate=False to the first matmul")
        if i.core.target.generation < 4:
            i.fail(
                "accumulate=True onto PSUM that another instruction has written (undefined on gen2 and gen3): "
                "pass accumulate=False to the first matmul"
            )
    if accumulate or (accumulate is None and begun.all()):
        value = kind.load(old) + value
    elif accumulate is None and begun.any():
        value = np.where(begun, kind.load(old) + value, value)
    old[...] = kind.store(value)
    mark_written(dst)
    begun[...] = True


def nc_transpose(dst: NkiTensor, data: NkiTensor, engine: engine = engine.unknown, name: str | None = None) -> None:
    """dst[F, P] = data[P, F].T, with the free dimensions flattened. It copies the bits."""
    engine = engine if engine.value else _transpose_engine(dst, data)
    i = issue("nc_transpose", name, engine, dst=dst, data=data)
    require_tensor(i, dst=dst, data=data)
    dst, data = i.operands["dst"], i.operands["data"]
    p, f = data.shape[0], free_elements(data)
    most = 128 if engine.name == "tensor" else 32
    if max(p, f) > most:
        i.fail(f"data is [{p}, {f}]; the {engine.name} engine can transpose at most [{most}, {most}]")
    if engine.name == "tensor" and (data.buffer is not SBUF or dst.buffer is not PSUM):
        i.fail(f"the tensor engine reads sbuf and writes psum, not {data.buffer.value} to {dst.buffer.value}")
    if (dst.shape[0], free_elements(dst)) != (f, p):
        i.fail(f"dst is {list(dst.shape)}; it must be [{f}, {p}] for data {list(data.shape)}")
    i.write_raw("dst", i.read_raw("data").reshape(p, f).T.reshape(dst.shape))
    i.record(dims=(p, f))


def _transpose_engine(dst: Any, data: Any) -> engine:
    """The engine if the kernel names none: the tensor engine if it can, else the vector engine."""
    fits = isinstance(data, NkiTensor) and isinstance(dst, NkiTensor)
    return engine.tensor if fits and data.buffer is SBUF and dst.buffer is PSUM else engine.vector
