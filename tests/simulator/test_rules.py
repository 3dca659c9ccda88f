"""One test a refusal: what the documentation of NKI forbids raises an error that names the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from neuron_attn_rewrite.simulator import SimulatorError, active, run

with active():
    import nki
    import nki.isa as nisa
    import nki.language as nl

F32, BF16 = nl.float32, nl.bfloat16


def sb(*shape: int, dtype: str = F32, fill: float | None = 0, **options: Any) -> Any:
    """A tile in SBUF, written unless fill is None."""
    tile = nl.ndarray(shape, dtype, buffer=nl.sbuf, **options)
    if fill is not None:
        nisa.memset(tile, fill if dtype in (F32, BF16, nl.float16) else int(fill))
    return tile


def ps(*shape: int, dtype: str = F32, fill: float | None = 0, **options: Any) -> Any:
    tile = nl.ndarray(shape, dtype, buffer=nl.psum, **options)
    if fill is not None:
        nisa.memset(tile, fill)
    return tile


def hbm(*shape: int, dtype: str = F32) -> Any:
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


def col(fill: float = 0.0) -> Any:
    return sb(128, 1, fill=fill)


def select(**changes: Any) -> None:
    operands = {
        "dst": sb(128, 8),
        "on_true_tile": sb(128, 8),
        "comp_op0": nl.greater_equal,
        "comp_op1": nl.less,
        "bound0": col(),
        "bound1": col(4.0),
    }
    nisa.range_select(**{**operands, **changes})


def matmul(k: int = 128, m: int = 128, n: int = 128, **options: Any) -> None:
    dtypes = [options.pop(key, BF16) for key in ("stationary", "moving")]
    dst = options.pop("dst", None)
    nisa.nc_matmul(
        ps(m, n, fill=None) if dst is None else dst, sb(k, m, dtype=dtypes[0]), sb(k, n, dtype=dtypes[1]), **options
    )


def loop(body: Callable[[Any], Any]) -> None:
    nl.fori_loop(0, 2, body)


def gather(index: int, dtype: str = nl.int32, **options: Any) -> None:
    table = hbm(16, 8)
    nisa.dma_copy(table, sb(16, 8))
    rows = sb(16, 1, dtype=dtype, fill=index)
    source = table.ap([[8, 16], [1, 8]], vector_offset=rows, indirect_dim=0)
    nisa.dma_copy(sb(16, 8, fill=None), source, **options)


Case = tuple[str, Callable[[], Any]]
RULES: dict[str, Case] = {
    # memory
    "partitions": ("129 partitions", lambda: sb(129, 1, fill=None)),
    "partition bytes": ("bytes per partition", lambda: sb(1, 60000, fill=None)),
    "psum bytes": ("bytes per partition", lambda: ps(128, 5000, fill=None)),
    "shape": ("positive integers", lambda: sb(128, 0, fill=None)),
    "free dimension": ("at least one free dimension", lambda: sb(128, fill=None)),
    "dtype": ("no dtype", lambda: sb(128, 1, dtype="float64", fill=None)),
    "buffer": ("buffer must be", lambda: nl.ndarray((128, 1), F32, buffer="sbuf")),
    "address of hbm": ("address=", lambda: nl.ndarray((8, 1), F32, buffer=nl.shared_hbm, address=(0, 0))),
    "psum bank": ("start of a bank", lambda: ps(128, 4, fill=None, address=(0, 64))),
    "start of address": ("start at 0/64", lambda: sb(64, 4, fill=None, address=(32, 0))),
    "address outside": ("outside of", lambda: sb(64, 4, fill=None, address=(0, 300000))),
    "uninitialized read": ("never written", lambda: nisa.tensor_copy(sb(128, 8), sb(128, 8, fill=None))),
    "partly uninitialized": (
        "512 of 1024 elements were never written",
        lambda: (x := sb(128, 8, fill=None), nisa.memset(x[:, 0:4], 0.0), nisa.tensor_copy(sb(128, 8), x)),
    ),
    # indexing
    "negative index": ("must not be negative", lambda: sb(128, 8)[:, -1]),
    "index": ("whose size is 8", lambda: sb(128, 8)[:, 8]),
    "slice end": ("in range and not empty", lambda: sb(128, 8)[:, 0:9]),
    "empty slice": ("in range and not empty", lambda: sb(128, 8)[:, 4:4]),
    "partition step": ("step", lambda: sb(128, 8)[0:128:2, :]),
    "too many indices": ("3 indices", lambda: sb(128, 8)[0, 0, 0]),
    "float index": ("not an index", lambda: sb(128, 8)[:, 1.0]),
    "ds": (r"ds\(4, 8\)", lambda: sb(128, 8)[:, nl.ds(4, 8)]),
    "assignment": ("write with an instruction", lambda: sb(128, 8).__setitem__(0, 1)),
    "truth": ("not known", lambda: bool(sb(128, 8))),
    "ap of a part": ("whole tensor", lambda: sb(128, 8)[:, 0:4].ap([[8, 128], [1, 4]])),
    "ap outside": ("outside of its", lambda: sb(128, 8).ap([[8, 128], [1, 9]])),
    "ap partition stride": ("without gaps", lambda: sb(128, 8).ap([[16, 64], [1, 8]])),
    "ap rank": ("one for the free dimension", lambda: sb(128, 8).ap([[8, 128]])),
    "reshape partitions": ("partition dimension", lambda: sb(128, 8).reshape((64, 16))),
    "reshape count": ("elements", lambda: sb(128, 8).reshape((128, 9))),
    "reshape strides": ("without a copy", lambda: sb(128, 4, 8)[:, :, 0:4].reshape((128, 16))),
    "permute": ("partition dimension", lambda: sb(128, 8).permute((1, 0))),
    "broadcast": ("not 1", lambda: sb(128, 8).broadcast(1, 2)),
    "squeeze": ("not 1", lambda: sb(128, 8, 2).squeeze_dim(2)),
    "flatten": ("not contiguous", lambda: sb(128, 4, 8)[:, :, 0:4].flatten_dims(1, 2)),
    "view": ("whole elements", lambda: sb(128, 3, dtype=BF16).view(F32)),
    "write to a broadcast": ("cannot be written", lambda: nisa.memset(sb(128, 1).broadcast(1, 4), 0.0)),
    "indirection": ("not modelled", lambda: sb(128, 8).indirect(sb(128, 1, dtype=nl.uint16))),
    # registers
    "register arithmetic": ("no value while", lambda: nisa.register_alloc(1) + 1),
    "register truth": ("no value while", lambda: bool(nisa.register_alloc(1))),
    "register comparison": ("no value while", lambda: nisa.register_alloc(1) == 1),
    "register range": ("no value while", lambda: range(nisa.register_alloc(1))),
    "register slice": ("use nl.ds", lambda: sb(128, 8)[:, 0 : nisa.register_alloc(4)]),
    "register unset": ("never written", lambda: nisa.register_move(nisa.register_alloc(), nisa.register_alloc())),
    "register unrolled": ("fori_loop", lambda: nl.static_range(nisa.register_alloc(3))),
    "loop index": ("index must not be a register", lambda: loop(lambda i: sb(128, 8)[:, i])),
    "loop result": ("must return nothing", lambda: loop(lambda i: i)),
    "loop step": ("positive", lambda: nl.fori_loop(0, 2, lambda i: None, step=0)),
    "while result": ("must return the register", lambda: nl.while_loop(nisa.register_alloc(1), lambda r: None)),
    "register of many": ("one integer", lambda: nisa.register_load(nisa.register_alloc(), sb(1, 2, dtype=nl.int32))),
    # all instructions
    "names": ("is taken", lambda: [nisa.memset(sb(128, 1), 0.0, name="a") for _ in range(2)]),
    "no tensor": ("must be a tensor", lambda: nisa.tensor_copy(sb(128, 1), 1.0)),
    "no dst": ("first argument", lambda: nisa.memset(None, 0.0)),
    "engine": ("not on", lambda: nisa.memset(sb(128, 1), 0.0, engine=nisa.engine.scalar)),
    "gpsimd psum": ("GpSimd", lambda: nisa.memset(ps(128, 1), 0.0, engine=nisa.engine.gpsimd)),
    "start partition": ("start at 0/32", lambda: nisa.memset(sb(128, 8)[16:32, :], 0.0)),
    "start partition 64": ("start at 0/64", lambda: nisa.memset(sb(128, 8)[32:96, :], 0.0)),
    "five dimensions": ("at most 4", lambda: nisa.memset(sb(128, 1, 1, 1, 1, 1, fill=None), 0.0)),
    "sizes": ("equally many", lambda: nisa.tensor_copy(sb(128, 8), sb(128, 4))),
    "hbm": ("must be in", lambda: nisa.tensor_copy(sb(128, 8), hbm(128, 8))),
    "operator": ("must be an operator", lambda: nisa.tensor_scalar(sb(128, 8), sb(128, 8), "add", 1.0)),
    "operator use": ("no binary form", lambda: nisa.tensor_scalar(sb(128, 8), sb(128, 8), nl.exp, 1.0)),
    "operator call": ("must be a tile", lambda: nl.add(1.0, 2.0)),
    "broadcast_to": ("can grow", lambda: nl.broadcast_to(sb(128, 8), (128, 16))),
    "unknown name": ("not modelled", lambda: nl.rms_norm),
    # tensor engine
    "matmul dst": ("must be in psum", lambda: matmul(dst=sb(128, 128))),
    "matmul psum": ("must be in sbuf", lambda: nisa.nc_matmul(ps(128, 8), ps(128, 128), sb(128, 8))),
    "matmul m": ("at most 128", lambda: matmul(m=129, dst=ps(128, 128))),
    "matmul n": ("at most 512", lambda: matmul(n=513)),
    "matmul k": ("K is the partition", lambda: nisa.nc_matmul(ps(8, 8), sb(64, 8), sb(128, 8))),
    "matmul shape": (r"it must be \[128, 128\]", lambda: matmul(dst=ps(128, 64))),
    "matmul mix": ("float32 only goes with float32", lambda: matmul(stationary=F32)),
    "matmul int": ("cannot multiply", lambda: matmul(moving=nl.int32)),
    "matmul e4m3fn": ("cannot multiply", lambda: matmul(moving=nl.float8_e4m3fn)),
    "matmul bfloat16 dst": ("it must be", lambda: matmul(dst=ps(128, 128, dtype=BF16))),
    "matmul onto nothing": ("never written", lambda: matmul(accumulate=True)),
    "matmul onto a memset": ("another instruction", lambda: matmul(accumulate=True, dst=ps(128, 128))),
    "matmul onto a copy": (
        "another instruction",
        lambda: (x := ps(128, 128), matmul(dst=x), nisa.memset(x, 0.0), matmul(accumulate=True, dst=x)),
    ),
    "matmul columns": ("tile_size must be", lambda: matmul(m=32, tile_position=(0, 32), tile_size=(128, 32))),
    "matmul tile": ("set together", lambda: matmul(tile_size=(64, 128))),
    "matmul rows": ("at most 64", lambda: matmul(tile_position=(0, 0), tile_size=(64, 128))),
    "matmul double": ("double_row needs", lambda: matmul(perf_mode=nisa.matmul_perf_mode.double_row)),
    "transpose size": ("at most", lambda: nisa.nc_transpose(sb(64, 64), sb(64, 64))),
    "transpose shape": (r"it must be \[8, 128\]", lambda: nisa.nc_transpose(ps(128, 8), sb(128, 8))),
    "transpose dtype": ("one dtype", lambda: nisa.nc_transpose(ps(8, 128), sb(128, 8, dtype=BF16))),
    "transpose buffers": (
        "reads sbuf and writes psum",
        lambda: nisa.nc_transpose(sb(8, 128), sb(128, 8), engine=nisa.engine.tensor),
    ),
    # scalar engine
    "bias shape": (r"shape \(128, 1\)", lambda: nisa.activation(sb(128, 8), nl.exp, sb(128, 8), bias=sb(128, 2))),
    "scale dtype": ("float32", lambda: nisa.activation(sb(128, 8), nl.exp, sb(128, 8), scale=sb(128, 1, dtype=BF16))),
    "activation": ("no activation form", lambda: nisa.activation(sb(128, 8), nl.add, sb(128, 8))),
    "activation range": ("in \\[5.42", lambda: nisa.activation(sb(128, 8), nl.log, sb(128, 8))),
    "activation reduce op": (
        "reduce_op must be nl.add",
        lambda: nisa.activation_reduce(sb(128, 8), nl.exp, sb(128, 8), nl.maximum, col()),
    ),
    "activation registers": (
        "nothing was reduced",
        lambda: nisa.activation(sb(128, 8), nl.exp, sb(128, 8), reduce_res=col()),
    ),
    "activate2": (
        "needs gen4",
        lambda: nisa.activate2(sb(128, 8), nl.exp, sb(128, 8), 1.0, 0.0, nl.multiply, nl.add),
    ),
    # vector engine
    "memset float": ("pass an int", lambda: nisa.memset(sb(128, 1, dtype=nl.int32), 0.5)),
    "memset range": ("out of the range", lambda: nisa.memset(sb(128, 1, dtype=nl.uint8), 256)),
    "both in psum": (
        "both in psum",
        lambda: nisa.tensor_tensor(sb(128, 8), ps(128, 8), ps(128, 8), nl.add),
    ),
    "power in psum": ("GpSimd", lambda: nisa.tensor_tensor(sb(128, 8), ps(128, 8), sb(128, 8), nl.power)),
    "bits of floats": ("take integers", lambda: nisa.tensor_tensor(sb(128, 8), sb(128, 8), sb(128, 8), nl.bitwise_and)),
    "mixed operators": (
        "or neither",
        lambda: nisa.tensor_scalar(
            sb(128, 8, dtype=nl.int32), sb(128, 8, dtype=nl.int32), nl.bitwise_and, 1, op1=nl.add, operand1=1.0
        ),
    ),
    "operand dtype": (
        "float32",
        lambda: nisa.tensor_scalar(sb(128, 8), sb(128, 8), nl.add, sb(128, 1, dtype=BF16)),
    ),
    "operand alone": ("together", lambda: nisa.tensor_scalar(sb(128, 8), sb(128, 8), nl.add, 1.0, op1=nl.add)),
    "scalar engine operators": (
        "the scalar engine has",
        lambda: nisa.tensor_scalar(sb(128, 8), sb(128, 8), nl.subtract, 1.0, engine=nisa.engine.scalar),
    ),
    "gpsimd operators": (
        "only has rsqrt",
        lambda: nisa.tensor_scalar(sb(128, 8), sb(128, 8), nl.add, 1.0, engine=nisa.engine.gpsimd),
    ),
    "unary operand": ("None or 0", lambda: nisa.tensor_scalar(sb(128, 8), sb(128, 8), nl.abs, 1.0)),
    "stt in psum": (
        "both in psum",
        lambda: nisa.scalar_tensor_tensor(sb(128, 8), ps(128, 8), nl.add, 1.0, nl.add, ps(128, 8)),
    ),
    "predicate dtype": (
        "predicate must be",
        lambda: nisa.tensor_copy_predicated(sb(128, 8), sb(128, 8), sb(128, 8, dtype=nl.int32)),
    ),
    "predicated rest": (
        "1024 of 1024 elements were never written",
        lambda: (
            x := sb(128, 8, fill=None),
            nisa.tensor_copy_predicated(x, 1.0, sb(128, 8, dtype=nl.uint8)),
            nisa.tensor_copy(sb(128, 8), x),
        ),
    ),
    "predicated dtype": (
        "one dtype",
        lambda: nisa.tensor_copy_predicated(sb(128, 8), sb(128, 8, dtype=BF16), sb(128, 8, dtype=nl.uint8)),
    ),
    "shuffle mask": ("32 entries", lambda: nisa.nc_stream_shuffle(sb(32, 8), sb(32, 8), [0] * 31)),
    "shuffle rows": ("which has 1", lambda: nisa.nc_stream_shuffle(sb(32, 8), sb(1, 8), list(range(32)))),
    # reductions
    "reduce partitions": (
        "the last free dimensions",
        lambda: nisa.tensor_reduce(sb(128, 1), nl.add, sb(128, 8), axis=0),
    ),
    "reduce gap": ("without a gap", lambda: nisa.tensor_reduce(sb(128, 8), nl.add, sb(128, 4, 8), axis=1)),
    "reduce shape": ("partitions of 1", lambda: nisa.tensor_reduce(sb(128, 2), nl.add, sb(128, 8), axis=1)),
    "reduce op": ("no reduce form", lambda: nisa.tensor_reduce(col(), nl.equal, sb(128, 8), axis=1)),
    "reverse0": (
        "not supported yet",
        lambda: nisa.tensor_scalar_reduce(sb(128, 8), sb(128, 8), nl.add, 1.0, nl.add, col(), reverse0=True),
    ),
    "reduce unknown": (
        "unknown state",
        lambda: nisa.tensor_scalar_reduce(
            sb(128, 8), sb(128, 8), nl.add, 1.0, nl.add, col(), reduce_cmd=nisa.reduce_cmd.reduce
        ),
    ),
    "reduce init": (
        "needs reduce_init",
        lambda: nisa.tensor_scalar_reduce(
            sb(128, 8), sb(128, 8), nl.add, 1.0, nl.add, col(), reduce_cmd=nisa.reduce_cmd.load_reduce
        ),
    ),
    "reduce_res": (
        "reduce_res must be a tile",
        lambda: nisa.tensor_scalar_reduce(sb(128, 8), sb(128, 8), nl.add, 1.0, nl.add, sb(128, 2)),
    ),
    "select fill": ("minimum of float32", lambda: select(on_false_value=-1e30)),
    "select op": ("reduce_op must be", lambda: select(reduce_op=nl.add)),
    "select comparison": ("comp_op0 must be one of", lambda: select(comp_op0=nl.not_equal)),
    "select bound": ("float32", lambda: select(bound0=sb(128, 1, dtype=nl.int32))),
    "select start": ("2.24", lambda: select(range_start=2**24)),
    "select after idle": (
        "unknown state",
        lambda: [select(reduce_cmd=c) for c in (nisa.reduce_cmd.idle, nisa.reduce_cmd.reduce)],
    ),
    "select_reduce": (
        "on_true must not be of",
        lambda: nisa.select_reduce(sb(128, 8), sb(128, 8, dtype=nl.uint8), sb(128, 8, dtype=nl.int32), sb(128, 1)),
    ),
    "exponential": ("needs gen4", lambda: nisa.exponential(sb(128, 8), sb(128, 8))),
    # GpSimd
    "iota psum": ("must be in sbuf", lambda: nisa.iota(ps(128, 8), [[1, 8]])),
    "iota count": ("has 9 values", lambda: nisa.iota(sb(128, 8), [[1, 9]])),
    "iota rank": ("one to four", lambda: nisa.iota(sb(128, 8), [[1, 1]] * 4 + [[1, 8]])),
    "iota offset": ("compile time", lambda: nisa.iota(sb(128, 8), [[1, 8]], offset=0.5)),
    "affine psum": ("must be in sbuf", lambda: nisa.affine_select(sb(128, 8), [[1, 8]], 1, ps(128, 8), 0.0)),
    "affine op": ("comparison", lambda: nisa.affine_select(sb(128, 8), [[1, 8]], 1, sb(128, 8), 0.0, cmp_op=nl.add)),
    # DMA
    "dma psum": ("must be in sbuf", lambda: nisa.dma_copy(sb(128, 8), ps(128, 8))),
    "dma count": ("elements", lambda: nisa.dma_copy(sb(128, 8), sb(128, 4))),
    "dma cast": (
        "cannot cast",
        lambda: nisa.dma_copy(sb(128, 8, dtype=BF16), sb(128, 8), dge_mode=nisa.dge_mode.hwdge),
    ),
    "dma engine": ("with dge_mode.hwdge", lambda: nisa.dma_copy(sb(8, 8), sb(8, 8), engine=nisa.engine.sync)),
    "dma priority": ("on gen4", lambda: nisa.dma_copy(sb(8, 8), sb(8, 8), priority=0)),
    "gather range": ("index 16 of 16", lambda: gather(16)),
    "gather mode": ("swdge", lambda: gather(1, dge_mode=nisa.dge_mode.none)),
    "gather on chip": ("in HBM", lambda: sb(16, 8).ap([[8, 16], [1, 8]], vector_offset=sb(16, 1, dtype=nl.int32))),
    "gather float": ("integer tile", lambda: gather(1, dtype=F32)),
    "scalar offset": (
        "a register or one element",
        lambda: nisa.dma_copy(
            sb(1, 8), sb(1, 16).ap([[16, 1], [1, 8]], scalar_offset=sb(1, 2, dtype=nl.int32), indirect_dim=1)
        ),
    ),
    "scalar range": (
        "outside of its",
        lambda: nisa.dma_copy(
            sb(1, 8), sb(1, 16).ap([[16, 1], [1, 8]], scalar_offset=sb(1, 1, dtype=nl.int32, fill=9), indirect_dim=1)
        ),
    ),
    "dma_transpose axes": ("for its rank", lambda: nisa.dma_transpose(sb(8, 16), sb(16, 8), axes=(0, 1))),
    "dma_transpose shape": (r"it must be \[8, 16\]", lambda: nisa.dma_transpose(sb(16, 8), sb(16, 8))),
    "dma_transpose mode": (
        "unknown or hwdge",
        lambda: nisa.dma_transpose(sb(8, 16), sb(16, 8), dge_mode=nisa.dge_mode.swdge),
    ),
    "dma_transpose hwdge": (
        "2-byte",
        lambda: nisa.dma_transpose(sb(8, 16), sb(16, 8), dge_mode=nisa.dge_mode.hwdge),
    ),
    "dma_compute op": ("reduce_op must be", lambda: nisa.dma_compute(sb(8, 8), [sb(8, 8)], nl.multiply)),
    "dma_compute scales": ("all be 1.0", lambda: nisa.dma_compute(sb(8, 8), [sb(8, 8)], nl.add, scales=[2.0])),
    # two cores
    "barrier alone": ("LNC 2", lambda: nisa.core_barrier(hbm(8, 8), (0, 1))),
    "barrier data": ("must be in shared_hbm", lambda: nisa.core_barrier(sb(8, 8), (0, 1))),
    "barrier cores": (r"\(0, 1\)", lambda: nisa.core_barrier(hbm(8, 8), (0,))),
}


@pytest.mark.parametrize("rule", RULES)
def test_refused(rule: str) -> None:
    message, body = RULES[rule]

    def kernel() -> None:
        body()

    with pytest.raises(SimulatorError, match=message):
        run(kernel, target="gen3")


GEN2: dict[str, Case] = {
    "range_select": ("needs gen3", lambda: select()),
    "bias": ("numbers need gen3", lambda: nisa.activation(sb(128, 8), nl.exp, sb(128, 8), bias=0.5)),
    "tensor_copy": (
        "use nisa.activation",
        lambda: nisa.tensor_copy(sb(128, 8), sb(128, 8), engine=nisa.engine.scalar),
    ),
    "hwdge": ("needs gen3", lambda: nisa.dma_copy(sb(8, 8), sb(8, 8), dge_mode=nisa.dge_mode.hwdge)),
    "double row": ("needs gen3", lambda: matmul(perf_mode=nisa.matmul_perf_mode.double_row)),
    "quarter rows": ("tile_size must be", lambda: matmul(k=32, tile_position=(0, 0), tile_size=(32, 128))),
}


@pytest.mark.parametrize("rule", GEN2)
def test_refused_on_gen2(rule: str) -> None:
    message, body = GEN2[rule]

    def kernel() -> None:
        body()

    with pytest.raises(SimulatorError, match=message):
        run(kernel, target="gen2")


def test_what_gen4_allows() -> None:
    def kernel() -> None:
        matmul(n=4096)
        matmul(n=512, dst=ps(128, 512, dtype=BF16))
        matmul(accumulate=True, dst=ps(128, 128))
        matmul(stationary=nl.float8_e4m3fn)
        nisa.dma_copy(sb(8, 8), sb(8, 8), priority=3)

    run(kernel, target="gen4")


def test_what_is_written_is_known_byte_by_byte() -> None:
    def kernel(last: int) -> None:
        tile = sb(8, 4, fill=None)
        nisa.memset(tile[:, 0:2], 1.0)
        nisa.tensor_copy(sb(8, last, dtype=BF16), tile.view(BF16)[:, 0:last])
        nisa.memset(tile.view(BF16)[:, 4:8], 1.0)
        nisa.tensor_copy(sb(8, 4), tile)

    run(kernel, 4)
    with pytest.raises(SimulatorError, match="never written"):
        run(kernel, 5)

    def half() -> None:
        tile = sb(8, 4, fill=None)
        nisa.memset(tile.view(BF16)[:, 0:8:2], 1.0)
        nisa.tensor_copy(sb(8, 4), tile)

    with pytest.raises(SimulatorError, match="never written"):
        run(half)


def test_capacity_is_counted_in_the_physical_mode() -> None:
    def kernel(count: int, where: Any) -> None:
        tiles = [nl.ndarray((128, 512 if where is nl.psum else 8192), F32, buffer=where) for _ in range(count)]
        del tiles
        nl.ndarray((128, 512), F32, buffer=where)

    for where, most in ((nl.sbuf, 6), (nl.psum, 8)):
        run(kernel, most, where, memory="physical", target="gen3")
        run(kernel, most + 1, where, memory="logical", target="gen3")
        with pytest.raises(SimulatorError, match="no room"):
            run(kernel, most + 1, where, memory="physical", target="gen3")


def test_addresses_share_bytes_in_the_physical_mode() -> None:
    def kernel() -> Any:
        out = hbm(128, 4)
        first = sb(128, 4, fill=None, address=(0, 64))
        second = sb(128, 4, fill=None, address=(0, 64))
        nisa.memset(first, 1.0)
        nisa.memset(second, 2.0)
        nisa.dma_copy(out, first)
        return out

    assert (run(kernel, memory="logical").outputs == 1).all()
    assert (run(kernel, memory="physical").outputs == 2).all()


@pytest.mark.parametrize(
    "message,body",
    [
        ("core 1", lambda core: nisa.memset(sb(8, 8), 0.0) if core else None),
        ("same tensors", lambda core: hbm(8 + core, 8)),
        ("would wait forever", lambda core: nisa.core_barrier(hbm(8, 8), (0, 1)) if core else hbm(8, 8)),
        ("both would wait forever", lambda core: [hbm(8, 8), _meet(core)]),
        ("core 0 must send", lambda core: nisa.sendrecv(sb(8, 8), sb(8, 8), 0, 0, 0)),
        ("at most 1024 bytes", lambda core: _send(core, 512, gpsimd=True)),
        ("never written", lambda core: _race(core)),
    ],
)
def test_refused_on_two_cores(message: str, body: Callable[[int], Any]) -> None:
    def kernel() -> None:
        body(nl.program_id(0))

    with pytest.raises(SimulatorError, match=message):
        run(kernel, lnc=2, target="gen3")


def _meet(core: int) -> None:
    if core:
        nisa.core_barrier(hbm(4, 4), (0, 1))
    else:
        _send(core, 8)


def _send(core: int, n: int, gpsimd: bool = False) -> Any:
    engine = nisa.dma_engine.gpsimd_dma if gpsimd else nisa.dma_engine.dma
    nisa.sendrecv(sb(8, n), sb(8, n), 1 - core, 1 - core, 0, dma_engine=engine)


def _race(core: int) -> None:
    """Reads what the other core writes, and does not wait for it."""
    shared = hbm(2, 8)
    nisa.dma_copy(shared[core, :], sb(1, 8))
    nisa.dma_copy(sb(1, 8), shared[1 - core, :])


def test_a_race_is_seen_in_one_of_the_orders() -> None:
    def kernel() -> None:
        shared = hbm(1, 8)
        if nl.program_id(0) == 1:
            nisa.dma_copy(shared, sb(1, 8))
        else:
            nisa.dma_copy(sb(1, 8), shared)

    options: dict[str, Any] = {"lnc": 2, "same_instructions": False}
    run(kernel, first_core=1, **options)
    with pytest.raises(SimulatorError, match="never written"):
        run(kernel, first_core=0, **options)


def outputs(x: Any, how: str) -> Any:
    tile = sb(8, 8)
    if how == "sbuf":
        return tile
    out = hbm(8, 8)
    nisa.dma_copy(out[0:4, :], tile[0:4, :])
    return 1.0 if how == "number" else out


@pytest.mark.parametrize(
    "how,message",
    [("sbuf", "outputs must be in"), ("number", "must return tensors"), ("partly", "not written 32 of 64")],
)
def test_refused_outputs(how: str, message: str) -> None:
    with pytest.raises(SimulatorError, match=message):
        run(outputs, np.zeros((1, 1), np.float32), how)


@pytest.mark.parametrize(
    "value,message",
    [
        (np.zeros(4), "64 bits"),
        ([1], "pass a tuple"),
        (np.zeros((0, 4), np.float32), "empty"),
        (np.zeros(4, np.complex64), "64 bits"),
    ],
)
def test_refused_arguments(value: Any, message: str) -> None:
    with pytest.raises(SimulatorError, match=message):
        run(lambda x: None, value)


def test_refused_launches() -> None:
    @nki.jit
    def inner() -> None: ...

    with pytest.raises(SimulatorError, match="call the plain function"):
        run(lambda: inner())
    with pytest.raises(SimulatorError, match="LNC must be 1 or 2"):
        inner[3]
    with pytest.raises(SimulatorError, match="platform_target"):
        nki.jit(platform_target="trn2")
    with pytest.raises(SimulatorError, match="target 'gen5'"):
        run(inner, target="gen5")
    with pytest.raises(SimulatorError, match="memory must be"):
        run(inner, memory="none")
    with pytest.raises(SimulatorError, match="missing a required argument"):
        run(lambda x: None)
    with pytest.raises(SimulatorError, match="only in a running kernel"):
        nl.ndarray((8, 8), F32)
    with pytest.raises(SimulatorError, match="memory must be"), active(memory="fast"):
        pass
