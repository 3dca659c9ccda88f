"""Each instruction of the simulator against plain formulas of numpy, ml_dtypes and torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from neuron_attn_rewrite.simulator import active, run

with active():
    import nki
    import nki.isa as nisa
    import nki.language as nl

Array = Any
RNG = np.random.default_rng(20261124)
STORAGE = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3": ml_dtypes.float8_e4m3,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int8": np.int8,
    "int32": np.int32,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
}


def normal(*shape: int, scale: float = 1.0, dtype: Any = np.float32) -> Array:
    return (RNG.standard_normal(shape) * scale).astype(dtype)


def compute(body: Callable[..., Any], *inputs: Array, target: str = "gen3", **options: Any) -> list[Array]:
    """Run `body` on the inputs as tiles in SBUF; what it returns, tiles or tensors in HBM, comes back as arrays."""

    def kernel(*tensors: Any) -> Any:
        results = body(*[loaded(x) for x in tensors])
        return tuple(stored(r) for r in (results if isinstance(results, tuple) else (results,)))

    arguments = tuple(inputs)
    return list(run(lambda tensors: kernel(*tensors), arguments, target=target, **options).outputs)


def loaded(x: Any) -> Any:
    tile = nl.ndarray(x.shape, x.dtype)
    nisa.dma_copy(tile, x)
    return tile


def stored(x: Any) -> Any:
    if nl.is_hbm(x.buffer):
        return x
    if nl.is_psum(x.buffer):
        tile = nl.ndarray(x.shape, x.dtype)
        nisa.tensor_copy(tile, x)
        x = tile
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(out, x)
    return out


def new(*shape: int, dtype: str = "float32", buffer: Any = None) -> Any:
    return nl.ndarray(shape, dtype, buffer=buffer or nl.sbuf)


def same(got: Array, expected: Array, tolerance: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), tolerance, tolerance)


# -- conversions -----------------------------------------------------------------------------------------------


def cast(x: Array, dtype: str) -> Array:
    def body(t: Any) -> Any:
        dst = new(*t.shape, dtype=dtype)
        nisa.tensor_copy(dst, t)
        return dst

    return compute(body, x)[0]


def test_bfloat16_rounds_to_nearest_even() -> None:
    bits = RNG.integers(0, 2**32, (128, 512), dtype=np.uint32)
    ties = (RNG.integers(0, 2**15, (128, 512), dtype=np.uint32) << 16) | 0x8000
    for x in (bits.view(np.float32), ties.view(np.float32)):
        x = np.where(np.isfinite(x), x, np.float32(1))
        expected = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(cast(x, "bfloat16").astype(np.float32), expected)
        np.testing.assert_array_equal(cast(cast(x, "bfloat16"), "float32"), expected)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3", "float8_e5m2"])
def test_small_floats(dtype: str) -> None:
    x = normal(128, 64, scale=20)
    np.testing.assert_array_equal(cast(x, dtype), x.astype(STORAGE[dtype]))
    np.testing.assert_array_equal(cast(cast(x, dtype), "float32"), x.astype(STORAGE[dtype]).astype(np.float32))


def test_integers_round_to_even_and_saturate() -> None:
    x = np.array([[0.5, 1.5, 2.5, -0.5, 300.0, -300.0, 1e20, -1e20]], np.float32)
    same(cast(x, "uint8"), [[0, 2, 2, 0, 255, 0, 255, 0]])
    same(cast(x, "int8"), [[0, 2, 2, 0, 127, -128, 127, -128]])
    same(cast(x, "int32"), [[0, 2, 2, 0, 300, -300, 2**31 - 1, -(2**31)]])


def test_tfloat32_keeps_ten_bits() -> None:
    x = np.array([[1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-20]], np.float32)
    same(cast(x, "tfloat32"), [[1 + 2.0**-10, 1, 1 + 2.0**-9, 1]])


def test_integer_copies_keep_their_bits_but_not_on_the_scalar_engine() -> None:
    x = np.array([[2**24 + 1, -5]], np.int32)

    def body(t: Any) -> Any:
        exact, rounded = new(1, 2, dtype="int32"), new(1, 2, dtype="int32")
        nisa.tensor_copy(exact, t)
        nisa.tensor_copy(rounded, t, engine=nisa.engine.scalar)
        return exact, rounded

    exact, rounded = compute(body, x)
    same(exact, x)
    same(rounded, [[2**24, -5]])


# -- tensor engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k,m,n", [(128, 128, 512), (7, 3, 5), (96, 1, 33)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul(k: int, m: int, n: int, dtype: str) -> None:
    a, b, c = (normal(k, w, dtype=STORAGE[dtype]) for w in (m, n, n))

    def body(a: Any, b: Any, c: Any) -> Any:
        once, twice, implied = (new(m, n, buffer=nl.psum) for _ in range(3))
        nisa.nc_matmul(once, a, c)
        nisa.nc_matmul(once, a, b, accumulate=False)
        for j, x in enumerate((b, c)):
            nisa.nc_matmul(twice, a, x, accumulate=j > 0)
            nisa.nc_matmul(implied, a, x)
        return once, twice, implied

    wide = [x.astype(np.float64) for x in (a, b, c)]
    once, twice, implied = compute(body, a, b, c)
    same(once, wide[0].T @ wide[1], 2e-5)
    same(twice, wide[0].T @ (wide[1] + wide[2]), 4e-5)
    same(implied, twice)


def test_matmul_accumulates_by_location() -> None:
    a, b = normal(16, 8), normal(16, 8)

    def body(a: Any, b: Any) -> Any:
        dst = new(8, 8, buffer=nl.psum)
        nisa.nc_matmul(dst[:, 0:4], a, b[:, 0:4])
        nisa.nc_matmul(dst, a, b)
        return dst

    product = a.T @ b
    same(compute(body, a, b)[0], np.concatenate([2 * product[:, :4], product[:, 4:]], 1), 1e-5)


def test_double_row_contracts_over_two_free_rows() -> None:
    a, b = (normal(64, 2, n, dtype=STORAGE["float8_e4m3"]) for n in (8, 16))

    def body(a: Any, b: Any) -> Any:
        dst = new(8, 16, buffer=nl.psum)
        nisa.nc_matmul(dst, a, b, perf_mode=nisa.matmul_perf_mode.double_row)
        return dst

    expected = np.einsum("kim,kin->mn", a.astype(np.float64), b.astype(np.float64))
    same(compute(body, a, b)[0], expected, 1e-5)


@pytest.mark.parametrize(
    "rows,free,engine", [(128, 128, "tensor"), (100, 12, "tensor"), (32, 32, "vector"), (5, 9, "vector")]
)
def test_transpose(rows: int, free: int, engine: str) -> None:
    x = normal(rows, free, dtype=STORAGE["bfloat16"])

    def body(t: Any) -> Any:
        dst = new(free, rows, dtype="bfloat16", buffer=nl.psum if engine == "tensor" else nl.sbuf)
        nisa.nc_transpose(dst, t, engine=nisa.engine[engine])
        return dst

    np.testing.assert_array_equal(compute(body, x)[0], x.T)


# -- scalar engine ---------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "copy": lambda x: x,
    "exp": torch.exp,
    "square": torch.square,
    "abs": torch.abs,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_apprx_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_apprx_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "softplus": torch.nn.functional.softplus,
    "mish": torch.nn.functional.mish,
    "erf": torch.erf,
    "sign": torch.sign,
    "sin": torch.sin,
    "arctan": torch.arctan,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    positive = name in ("log", "sqrt", "rsqrt", "reciprocal")
    x, scale, bias = normal(128, 40, scale=0.3), np.abs(normal(128, 1)) + 0.5, np.abs(normal(128, 1, scale=0.1))
    x = np.abs(x) + 0.1 if positive else np.clip(x, -0.5, 0.5)

    def body(x: Any, scale: Any, bias: Any) -> Any:
        y, total = new(128, 40), new(128, 1)
        nisa.activation(
            y,
            getattr(nl, name),
            x,
            bias=bias,
            scale=scale,
            reduce_op=nl.add,
            reduce_res=total,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )
        return y, total

    scale = scale / 2 if name in ("sin", "arctan") else scale
    expected = ACTIVATIONS[name](torch.from_numpy(x.astype(np.float64) * scale + bias)).numpy()
    y, total = compute(body, x, scale, bias)
    same(y, expected, 1e-5)
    same(total, expected.sum(1, keepdims=True), 1e-4)


def test_activation_registers_go_on_until_they_are_reset() -> None:
    x = normal(64, 32)

    def body(x: Any) -> Any:
        y, totals = new(64, 32), [new(64, 1) for _ in range(3)]
        commands = (nisa.reduce_cmd.reset_reduce, nisa.reduce_cmd.reduce, nisa.reduce_cmd.idle)
        for command, total in zip(commands, totals, strict=True):
            nisa.activation(y, nl.exp, x, reduce_op=nl.add, reduce_res=total, reduce_cmd=command)
        nisa.activation_reduce(y, nl.copy, x, nl.add, again := new(64, 1))
        return (*totals, again)

    one = np.exp(x.astype(np.float64)).sum(1, keepdims=True)
    for got, expected in zip(compute(body, x), (one, 2 * one, 2 * one, x.sum(1, keepdims=True)), strict=True):
        same(got, expected, 1e-4)


def test_activate2() -> None:
    x, shift = normal(16, 8), normal(16, 1)

    def body(x: Any, shift: Any) -> Any:
        y, top = new(16, 8), new(16, 1)
        nisa.activate2(
            y,
            nl.exp,
            x,
            2.0,
            shift,
            nl.multiply,
            nl.subtract,
            reverse1=True,
            reduce_op=nl.maximum,
            reduce_res=top,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )
        return y, top

    y, top = compute(body, x, shift, target="gen4")
    same(y, np.exp(shift - 2 * x), 1e-5)
    same(top, np.exp(shift - 2 * x).max(1, keepdims=True), 1e-5)


# -- vector engine ---------------------------------------------------------------------------------------------

BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "abs_max": lambda a, b: np.maximum(abs(a), abs(b)),
    "abs_min": lambda a, b: np.minimum(abs(a), abs(b)),
}


@pytest.mark.parametrize("name", BINARY)
def test_tensor_tensor_and_tensor_scalar(name: str) -> None:
    a, b, c = (np.rint(normal(32, 48, scale=2)) / 2 for _ in range(3))
    a, b, c = a.astype(np.float32), b.astype(np.float32), c[:, :1].astype(np.float32)
    op = getattr(nl, name)

    def body(a: Any, b: Any, c: Any) -> Any:
        results = [new(32, 48) for _ in range(4)]
        nisa.tensor_tensor(results[0], a, b, op)
        nisa.tensor_scalar(results[1], a, op, c, reverse0=True, op1=nl.subtract, operand1=2.0)
        nisa.tensor_scalar(results[2], a, nl.multiply, 3.0, op1=op, operand1=c, reverse1=True)
        nisa.scalar_tensor_tensor(results[3], a, op, c, nl.subtract, b, reverse1=True)
        return tuple(results)

    f = BINARY[name]
    expected = (f(a, b), f(c, a) - 2.0, f(c, 3 * a), b - f(a, c).astype(np.float32))
    for got, value in zip(compute(body, a, b, c), expected, strict=True):
        same(got, value)


def test_power_runs_on_gpsimd() -> None:
    a, b = np.abs(normal(16, 8)) + 0.1, normal(16, 8)

    def body(a: Any, b: Any) -> Any:
        dst = new(16, 8)
        nisa.tensor_tensor(dst, a, b, nl.power)
        return dst

    same(compute(body, a, b)[0], a**b, 1e-5)


def test_integers_are_exact_on_gpsimd_and_float32_on_the_vector_engine() -> None:
    a, b = np.array([[2**24 + 1, 7]], np.int32), np.array([[2, -9]], np.int32)

    def body(a: Any, b: Any) -> Any:
        exact, rounded = new(1, 2, dtype="int32"), new(1, 2, dtype="int32")
        nisa.tensor_tensor(exact, a, b, nl.add)
        nisa.tensor_tensor(rounded, a, b, nl.add, engine=nisa.engine.vector)
        return exact, rounded

    exact, rounded = compute(body, a, b)
    same(exact, a + b)
    same(rounded, [[2**24 + 2, -2]])


def test_bits() -> None:
    a, b = (RNG.integers(0, 2**32, (16, 8), dtype=np.uint32) for _ in range(2))

    def body(a: Any, b: Any) -> Any:
        results = [new(16, 8, dtype="uint32") for _ in range(4)]
        for dst, op in zip(results[:3], (nl.bitwise_and, nl.bitwise_or, nl.bitwise_xor), strict=True):
            nisa.tensor_tensor(dst, a, b, op)
        nisa.tensor_scalar(results[3], a, nl.right_shift, 3, op1=nl.bitwise_and, operand1=255)
        return tuple(results)

    for got, expected in zip(compute(body, a, b), (a & b, a | b, a ^ b, (a >> 3) & 255), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_unary_operators_and_reciprocal() -> None:
    x = np.abs(normal(16, 8)) + 0.5

    def body(x: Any) -> Any:
        results = [new(16, 8) for _ in range(4)]
        nisa.tensor_scalar(results[0], x, nl.rsqrt, 0.0)
        nisa.tensor_scalar(results[1], x, nl.subtract, 1.0, op1=nl.abs, operand1=0.0)
        nisa.tensor_scalar(results[2], x, nl.subtract, 1.0, op1=nl.relu, operand1=0.0)
        nisa.reciprocal(results[3], x)
        return tuple(results)

    expected = (1 / np.sqrt(x), abs(x - 1), np.maximum(x - 1, 0), 1 / x)
    for got, value in zip(compute(body, x), expected, strict=True):
        same(got, value, 1e-6)


def test_predicated_copy_leaves_the_rest() -> None:
    x, p = normal(32, 16), RNG.integers(0, 2, (32, 16)).astype(np.uint8)

    def body(x: Any, p: Any) -> Any:
        results = [new(32, 16) for _ in range(3)]
        for dst in results:
            nisa.memset(dst, 7.0)
        nisa.tensor_copy_predicated(results[0], x, p)
        nisa.tensor_copy_predicated(results[1], x, p, reverse_pred=True)
        nisa.tensor_copy_predicated(results[2], -1.0, p)
        return tuple(results)

    for got, expected in zip(
        compute(body, x, p), (np.where(p, x, 7), np.where(p, 7, x), np.where(p, -1, 7)), strict=True
    ):
        same(got, expected)


def test_stream_shuffle() -> None:
    x, mask = normal(64, 4), [*RNG.permutation(32)[:30].tolist(), 255, 255]

    def body(x: Any) -> Any:
        dst = new(64, 4)
        nisa.memset(dst, 9.0)
        nisa.nc_stream_shuffle(dst, x, mask)
        return dst

    expected = np.stack([x[p // 32 * 32 + mask[p % 32]] if mask[p % 32] != 255 else np.full(4, 9.0) for p in range(64)])
    same(compute(body, x)[0], expected)


def test_scan() -> None:
    a, b, start = normal(8, 6), normal(8, 6), normal(8, 1)

    def body(a: Any, b: Any, start: Any) -> Any:
        dst = new(8, 6)
        nisa.tensor_tensor_scan(dst, a, b, start, nl.multiply, nl.add)
        return dst

    expected, state = [], start[:, 0]
    for j in range(6):
        state = a[:, j] * state + b[:, j]
        expected.append(state)
    same(compute(body, a, b, start)[0], np.stack(expected, 1), 1e-5)


@pytest.mark.parametrize("name", ["add", "multiply", "maximum", "minimum"])
def test_reductions(name: str) -> None:
    x = normal(32, 4, 5)
    op, f = getattr(nl, name), getattr(np, name).reduce

    def body(x: Any) -> Any:
        last, both, running, y = new(32, 4), new(32, 1), new(32, 1), new(32, 4, 5)
        nisa.tensor_reduce(last, op, x, axis=2)
        nisa.tensor_reduce(both, op, x, axis=(1, 2), negate=True)
        command = nisa.reduce_cmd
        nisa.tensor_scalar_reduce(y, x, nl.multiply, 2.0, op, reduce_cmd=command.load_reduce, reduce_init=0.5)
        nisa.tensor_scalar_reduce(y, x, nl.add, 1.0, op, running, reduce_cmd=command.reduce, reduce_res_negate=True)
        return last, both, running, y

    flat = x.reshape(32, -1)
    last, both, running, y = compute(body, x)
    same(last, f(x, axis=2), 1e-5)
    same(both, -f(flat, axis=1, keepdims=True), 1e-5)
    parts = np.concatenate([np.full((32, 1), 0.5), 2 * flat, flat + 1], 1)
    same(running, -f(parts, axis=1, keepdims=True), 1e-4)
    same(y, x + 1, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_range_select(dtype: str) -> None:
    x, lo, hi = normal(32, 16), RNG.integers(90, 110, (32, 1)), RNG.integers(90, 125, (32, 1))

    def body(x: Any, lo: Any, hi: Any) -> Any:
        y, top, chained = new(32, 16, dtype=dtype), new(32, 1), new(32, 1)
        nisa.range_select(y, x, nl.greater_equal, nl.less, lo, hi, reduce_res=top, range_start=100)
        nisa.range_select(y, x, nl.greater_equal, nl.less, lo, hi, nisa.reduce_cmd.reset_reduce, range_start=116)
        nisa.range_select(y, x, nl.greater_equal, nl.less, lo, hi, nisa.reduce_cmd.reduce, chained, range_start=100)
        return y, top, chained

    lowest = np.finfo(np.float32).min

    def select(start: int) -> Array:
        index = np.arange(start, start + 16)
        return np.where((index >= lo) & (index < hi), x, lowest)

    y, top, chained = compute(body, x, lo.astype(np.float32), hi.astype(np.float32))
    np.testing.assert_array_equal(y, select(100).astype(STORAGE[dtype]))
    same(top, select(100).max(1, keepdims=True))
    same(chained, np.maximum(select(100), select(116)).max(1, keepdims=True))


def test_select_reduce() -> None:
    x, p, other = normal(32, 16), RNG.integers(0, 2, (32, 16)).astype(np.uint8), normal(32, 1)

    def body(x: Any, p: Any, other: Any) -> Any:
        y, top, z = new(32, 16), new(32, 1), new(32, 16)
        nisa.select_reduce(y, p, x, other, top, nisa.reduce_cmd.reset_reduce)
        nisa.select_reduce(z, p, x, -3.0, reverse_pred=True)
        return y, top, z

    y, top, z = compute(body, x, p, other)
    same(y, np.where(p, x, other))
    same(top, np.where(p, x, other).max(1, keepdims=True))
    same(z, np.where(p, -3.0, x))


def test_exponential() -> None:
    x, top = normal(32, 16), normal(32, 1)

    def body(x: Any, top: Any) -> Any:
        y, total = new(32, 16), new(32, 1)
        nisa.exponential(y, x, top, reduce_cmd=nisa.reduce_cmd.reset_reduce)
        nisa.exponential(y, x, top, total, nisa.reduce_cmd.reduce)
        return y, total

    y, total = compute(body, x, top, target="gen4")
    same(y, np.exp(x - top), 1e-5)
    same(total, 2 * np.exp(x - top).sum(1, keepdims=True), 1e-5)


# -- GpSimd ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "float32", "uint8"])
def test_iota_and_affine_select(dtype: str) -> None:
    x = normal(16, 12)

    def body(x: Any) -> Any:
        y, z = new(16, 3, 4, dtype=dtype), new(16, 12)
        nisa.iota(y, [[20, 3], [1, 4]], offset=-3, channel_multiplier=2)
        nisa.affine_select(z, [[-1, 12]], 1, x, -9.0, cmp_op=nl.greater_equal, offset=-2)
        return y, z

    p, j, i = np.ogrid[:16, :3, :4]
    y, z = compute(body, x)
    value = -3 + 2 * p + 20 * j + i
    same(y, np.clip(value, 0, 255) if dtype == "uint8" else value)
    same(z, np.where(np.arange(16)[:, None] - np.arange(12) - 2 >= 0, x, -9.0))


# -- DMA -------------------------------------------------------------------------------------------------------


def hbm_copy(x: Any) -> Any:
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(out, x)
    return out


@pytest.mark.parametrize("skip", [False, True])
def test_gather_and_scatter(skip: bool) -> None:
    table, rows = normal(20, 6), RNG.permutation(20)[:8].astype(np.int32)[:, None]
    if skip:
        rows[3], rows[5] = 20, -1
    ok = (rows[:, 0] >= 0) & (rows[:, 0] < 20)
    mode = nisa.oob_mode.skip if skip else nisa.oob_mode.error

    def body(table: Any, rows: Any) -> Any:
        source, target, found = hbm_copy(table), hbm_copy(table), new(8, 6)
        nisa.memset(found, 5.0)
        pattern = [[6, 8], [1, 6]]
        nisa.dma_copy(found, source.ap(pattern, vector_offset=rows), oob_mode=mode)
        nisa.tensor_scalar(found, found, nl.multiply, 2.0)
        nisa.dma_copy(target.ap(pattern, vector_offset=rows), found, oob_mode=mode)
        return found, target

    found, target = compute(body, table, rows)
    expected = np.full((8, 6), 5.0, np.float32)
    expected[ok] = table[rows[ok, 0]]
    same(found, 2 * expected)
    after = table.copy()
    after[rows[ok, 0]] = 2 * expected[ok]
    same(target, after)


def test_scalar_offsets() -> None:
    x, row = normal(4, 8, 6), np.array([[2]], np.int32)

    def body(x: Any, row: Any) -> Any:
        source, results = hbm_copy(x), [new(8, 6) for _ in range(4)]
        register = nisa.register_alloc()
        nisa.register_load(register, row)
        nisa.dma_copy(results[0], source.ap([[6, 8], [1, 6]], scalar_offset=row, indirect_dim=0))
        nisa.dma_copy(results[1], source.ap([[6, 8], [1, 6]], scalar_offset=register, indirect_dim=0))
        nisa.dma_copy(results[2], source.select(0, row))
        nisa.dma_copy(results[3], source[nl.ds(register, 1), :, :])
        word = new(1, 1, dtype="int32")
        nisa.register_store(word, register)
        return (*results, word)

    *results, word = compute(body, x, row)
    for got in results:
        same(got, x[2])
    same(word, row)


@pytest.mark.parametrize("shape", [(16, 12), (4, 3, 16), (4, 3, 5, 16)])
def test_dma_transpose(shape: tuple[int, ...]) -> None:
    x = normal(*shape, dtype=STORAGE["bfloat16"])
    axes = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}[len(shape)]

    def body(x: Any) -> Any:
        dst = new(*(shape[a] for a in axes), dtype="bfloat16")
        nisa.dma_transpose(dst, x, axes=axes)
        return dst

    np.testing.assert_array_equal(compute(body, x)[0], x.transpose(axes))


def test_indirect_dma_transpose_reads_indices_by_column() -> None:
    x = normal(300, 64, dtype=STORAGE["bfloat16"])
    rows = RNG.integers(0, 300, (128, 2)).astype(np.uint32)

    def body(rows: Any, source: Any) -> Any:
        dst = new(64, 256, dtype="bfloat16")
        nisa.dma_transpose(dst, source.ap([[64, 256], [1, 64]], vector_offset=rows), axes=(1, 0))
        return dst

    result = run(lambda rows, x: stored(body(loaded(rows), x)), rows, x, target="gen3").outputs
    np.testing.assert_array_equal(result, x[rows.T.reshape(-1)].T)


def test_dma_compute() -> None:
    table, rows, x = normal(20, 6), RNG.permutation(20)[:8].astype(np.int32)[:, None], normal(8, 6)

    def body(table: Any, rows: Any, x: Any) -> Any:
        target, total, gathered = hbm_copy(table), new(8, 6), new(8, 6)
        nisa.dma_compute(total, [x, x, x], nl.add)
        nisa.tensor_copy(gathered, x)
        view = target.ap([[6, 8], [1, 6]], vector_offset=rows)
        nisa.dma_compute(gathered, [gathered, view], nl.add)
        nisa.dma_compute(view, [view, x], nl.add)
        return total, gathered, target

    total, gathered, target = compute(body, table, rows, x)
    same(total, 3 * x, 1e-6)
    same(gathered, x + table[rows[:, 0]], 1e-6)
    after = table.copy()
    after[rows[:, 0]] += x
    same(target, after, 1e-6)


# -- language --------------------------------------------------------------------------------------------------


def test_views() -> None:
    x = normal(16, 4, 6)

    def body(x: Any) -> Any:
        views = (
            x[:, 1:4:2, nl.ds(2, 3)],
            x.permute((0, 2, 1)),
            x.reshape((16, 24)),
            x.reshape_dim(2, (2, -1)).flatten_dims(1, 2),
            x.select(1, 2),
            x.expand_dim(1).broadcast(1, 2),
            x[:, 0:1, :].squeeze_dim(1),
            x.rearrange(("p", "a", ("b", "c")), ("p", "b", "a", "c"), {"b": 2}),
            x.ap([[24, 16], [1, 2], [6, 4]], offset=3),
            x[3],
        )
        results = []
        for view in views:
            dst = new(*view.shape)
            nisa.dma_copy(dst, view)
            results.append(dst)
        return tuple(results)

    flat = x.reshape(16, 24)
    expected = (
        x[:, 1:4:2, 2:5],
        x.transpose(0, 2, 1),
        flat,
        x.reshape(16, 8, 3),
        x[:, 2],
        np.stack([x, x], 1),
        x[:, 0],
        x.reshape(16, 4, 2, 3).transpose(0, 2, 1, 3),
        np.stack([flat[:, 3 + k :: 6][:, :4] for k in range(2)], 1),
        x[3:4],
    )
    for got, value in zip(compute(body, x), expected, strict=True):
        np.testing.assert_array_equal(got, value)


def test_bits_seen_as_another_type() -> None:
    x = normal(16, 6)

    def body(x: Any) -> Any:
        results = [new(16, 6, dtype="uint32"), new(16, 12, dtype="uint16"), new(16, 4, dtype="uint8")]
        nisa.tensor_copy(results[0], x.view(nl.uint32))
        nisa.tensor_copy(results[1], x.ap([[12, 16], [1, 12]], dtype=nl.uint16))
        nisa.tensor_copy(results[2], x.view(nl.uint8)[:, 4:8])
        return tuple(results)

    for got, kind, part in zip(
        compute(body, x), (np.uint32, np.uint16, np.uint8), (slice(None), slice(None), slice(4, 8)), strict=True
    ):
        np.testing.assert_array_equal(got, x.view(kind)[:, part])


def test_loops_of_the_hardware() -> None:
    x, count = normal(6, 4), np.array([[5]], np.int32)

    def body(x: Any, count: Any) -> Any:
        source, total, row, left = hbm_copy(x), new(1, 4), new(1, 4), new(1, 1, dtype="int32")
        nisa.memset(total, 0.0)
        limit = nisa.register_alloc()
        nisa.register_load(limit, count)

        def add(i: Any) -> None:
            nisa.dma_copy(row, source[nl.ds(i, 1), :], name="load")
            nisa.tensor_tensor(total, total, row, nl.add, name="sum")

        nl.fori_loop(1, limit, add, step=2)
        nisa.memset(left, 0)
        one = new(1, 1, dtype="int32")
        nisa.memset(one, 1)

        def countdown(r: Any) -> Any:
            nisa.register_store(row_index := new(1, 1, dtype="int32"), r)
            nisa.tensor_tensor(left, left, row_index, nl.add)
            nisa.tensor_tensor(row_index, row_index, one, nl.subtract)
            nisa.register_load(r, row_index)
            return r

        nl.while_loop(limit, countdown)
        return total, left

    total, left = compute(body, x, count)
    same(total, [x[1] + x[3]], 1e-6)
    same(left, [[15]])


def test_constants_and_helpers() -> None:
    def body() -> Any:
        constant = nl.shared_constant(np.arange(6, dtype=np.float32).reshape(2, 3))
        identity = nl.shared_identity_matrix(8, dtype=nl.bfloat16)
        full = nl.full((4, 4), 2.0, nl.float32)
        like = nl.zeros_like(full)
        tile = nl.load(constant)
        out = nl.ndarray((2, 3), nl.float32, buffer=nl.shared_hbm)
        nl.store(out, tile)
        return constant, identity, full, like, out, nl.ones((1, 2), nl.int32)

    expected = (np.arange(6).reshape(2, 3), np.eye(8), np.full((4, 4), 2), np.zeros((4, 4)))
    results = compute(body)
    for got, value in zip(results, (*expected, expected[0], [[1, 1]]), strict=True):
        same(got, value)


def test_functions_of_the_language() -> None:
    x, y = normal(16, 3, 4), normal(16, 3, 4)

    def body(x: Any, y: Any) -> Any:
        row = nl.broadcast_to(x[0:1, :, :], (16, 3, 4))
        return nl.add(x, y), nl.subtract(1.0, x), nl.multiply(x, 3.0), nl.exp(x), nl.sum(x, [1, 2]), nl.max(x, 2), row

    expected = (x + y, 1 - x, 3 * x, np.exp(x), x.sum((1, 2))[:, None, None], x.max(2), np.repeat(x[:1], 16, 0))
    for got, value in zip(compute(body, x, y), expected, strict=True):
        same(got, value, 1e-6)


def test_two_cores_exchange() -> None:
    x = normal(2, 8, 4)

    @nki.jit
    def kernel(x: Any) -> Any:
        me = nl.program_id(0)
        out = nl.ndarray((2, 8, 4), x.dtype, buffer=nl.shared_hbm)
        shared = nl.ndarray((2, 8, 4), x.dtype, buffer=nl.shared_hbm)
        mine, theirs, read = new(8, 4), new(8, 4), new(8, 4)
        nisa.dma_copy(mine, x[me])
        nisa.sendrecv(mine, theirs, 1 - me, 1 - me, 0)
        nisa.dma_copy(shared[me], theirs)
        nisa.core_barrier(shared, (0, 1))
        nisa.dma_copy(read, shared[1 - me])
        nisa.tensor_tensor(mine, read, theirs, nl.subtract)
        nisa.dma_copy(out[me], mine)
        return out

    for first in (0, 1):
        same(run(kernel[2], x, first_core=first, target="gen3").outputs, np.stack([x[0] - x[1], x[1] - x[0]]))
    assert nki.simulate(kernel)[2](x).shape == (2, 8, 4)


def test_inputs_are_changed_in_place_and_come_back_in_their_kind() -> None:
    def kernel(x: Any) -> Any:
        tile = loaded(x)
        nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
        nisa.dma_copy(x, tile)
        return x

    for x in (torch.randn(4, 6).bfloat16(), torch.randn(6, 4).t(), torch.randn(4, 6)):
        before = x.clone()
        result = run(kernel, x).outputs
        assert result.dtype == x.dtype and torch.equal(result, 2 * before) and torch.equal(x, 2 * before)
