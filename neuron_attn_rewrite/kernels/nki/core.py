"""The flash core: what every attention kernel here does with one query tile and a range of keys.

A query tile is up to 128 query rows of one head. The rows lie on the partitions, the keys on the columns. The core does
not know where the keys come from. `KeyRange` says which columns every row of the tile sees, and only the other columns
are masked.

The source keeps to what both NKI 0.6 (a parser) and NKI 0.7 (a tracer) accept.
"""

from typing import Any, NamedTuple

import nki.isa as nisa
import nki.language as nl

ROWS = 128
"""Rows of a query tile, and keys of a block of P^T and of V: the engines have so many partitions."""
BANK = 512
"""Columns of a score tile: the float32 elements of one PSUM bank."""
EXP_COLUMNS = 2048
"""Columns of one exponential: enough to hide its start-up cost, and few enough that the transposes can start early."""
TRANSPOSERS = (("scalar", 0, 3), ("vector", 3, 5), ("dma", 5, 8))
"""Who transposes blocks [start, stop) of each 8 blocks of P: the DMA, or the tensor engine, whose result the scalar or
the vector engine then copies out of PSUM. With these shares all engines of trn2 are about equally busy. If the DMA
transposed all blocks, it would take twice as long as any other engine."""
TRANSPOSERS_GEN4 = (("scalar", 0, 1), ("vector", 1, 3), ("dma", 3, 8))
"""The same for trn3, whose DMA is faster and whose scalar engine is not."""
TRANSPOSED_BLOCKS = 8
MASKED = -3.4028234663852886e38
"""What range_select writes for a hidden key. The hardware has no other value."""
LOWEST = -1.0e30
"""The lowest row maximum. A row that sees no key has this maximum, and its exponentials are exactly zero."""
LARGEST_SINK = 40.0
"""Largest exponent of a sink. It already makes the output zero; a larger one would leave the range of the logarithm."""


class KeyRange(NamedTuple):
    """The keys [first, stop) of one step. Every row of the tile sees the keys [full_start, full_stop)."""

    first: int
    full_start: int
    full_stop: int
    stop: int


class Loaded(NamedTuple):
    """Keys and values in SBUF, from key `base` on. A key range begins a multiple of 128 keys after it."""

    base: int
    k_t: Any
    """The keys transposed: a list of tiles [<=128 of head_dim, keys]."""
    values: Any
    """[128, blocks, v_dim], 128 keys a block."""
    key_bias: Any
    """[1, keys] to add to the products q k^T of all rows, before they are scaled; or None."""
    ones: Any
    """[1, 128] of ones in the dtype of `key_bias`, or None."""


class QueryTile(NamedTuple):
    """A query tile in SBUF, and the keys that its rows see."""

    q_t: Any
    """The rows transposed: a list of tiles [<=128 of head_dim, rows]."""
    lo: Any
    hi: Any
    """[rows, 1] float32: a row sees the keys [lo, hi)."""


class State(NamedTuple):
    """The running softmax of a query tile, float32."""

    acc: Any
    """[rows, v_dim]: the sum of the values, each times its exponential."""
    neg_max: Any
    """[rows, 1]: minus the largest exponent."""
    total: Any
    """[rows, 1]: the sum of the exponentials."""


def flash_step(
    tile: QueryTile,
    loaded: Loaded,
    key_range: KeyRange,
    bias: Any,
    scale: float,
    softcap: float | None,
    state: State | None,
) -> State:
    """The state of a query tile after it has also seen the keys of a range; `state` is None before the first range.

    bias: [rows, stop - first] to add to the scores, or None. After the first range, the state's `acc` lies in PSUM.
    """
    q_t = tile.q_t
    k_t = loaded.k_t
    key_bias = loaded.key_bias
    first = key_range.first
    stop = key_range.stop
    rows = q_t[0].shape[1]
    width = stop - first
    # The exponential multiplies the scores by this.
    factor = scale
    if softcap is not None:
        factor = softcap
    inner = factor
    if bias is not None:
        factor = 1.0

    scores = nl.ndarray((rows, width), dtype=nl.float32, buffer=nl.sbuf)
    row_max = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    for a in range(first, stop, BANK):
        b = min(a + BANK, stop)
        columns = slice(a - first, b - first)
        in_loaded = slice(a - loaded.base, b - loaded.base)
        product = nl.ndarray((rows, b - a), dtype=nl.float32, buffer=nl.psum)
        for c in range(len(q_t)):
            nisa.nc_matmul(dst=product, stationary=q_t[c], moving=k_t[c][:, in_loaded], accumulate=c > 0)
        if key_bias is not None and softcap is None:
            nisa.nc_matmul(
                dst=product, stationary=loaded.ones[:, 0:rows], moving=key_bias[:, in_loaded], accumulate=True
            )
        source = product
        if softcap is not None:
            nisa.activation(dst=scores[:, columns], op=nl.tanh, data=product, scale=scale / softcap)
            if key_bias is not None:
                added = nl.ndarray((rows, b - a), dtype=nl.float32, buffer=nl.psum)
                nisa.nc_matmul(
                    dst=added, stationary=loaded.ones[:, 0:rows], moving=key_bias[:, in_loaded], accumulate=False
                )
                nisa.tensor_tensor(dst=scores[:, columns], data1=scores[:, columns], data2=added, op=nl.add)
            source = scores[:, columns]
        if bias is not None:
            nisa.scalar_tensor_tensor(
                dst=scores[:, columns],
                data=source,
                op0=nl.multiply,
                operand0=inner,
                op1=nl.add,
                operand1=bias[:, columns],
            )
            source = scores[:, columns]
        # Masked columns, columns that every row sees, masked columns.
        cuts = [a, min(max(key_range.full_start, a), b), min(max(key_range.full_stop, a), b), b]
        for i in range(3):
            x = cuts[i]
            y = cuts[i + 1]
            if x < y:
                _evict(
                    scores[:, x - first : y - first],
                    source[:, x - a : y - a],
                    tile,
                    i != 1,
                    x,
                    row_max,
                    x == first,
                    y == stop,
                )

    neg_max = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    floor = -factor * LOWEST
    if state is not None:
        floor = state.neg_max
    nisa.tensor_scalar(dst=neg_max, data=row_max, op0=nl.multiply, operand0=-factor, op1=nl.minimum, operand1=floor)

    weights = nl.ndarray((rows, width), dtype=loaded.values.dtype, buffer=nl.sbuf)
    total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    for x in range(0, width, EXP_COLUMNS):
        y = min(x + EXP_COLUMNS, width)
        result = None
        if y == width:
            result = total
        nisa.activation(
            dst=weights[:, x:y],
            op=nl.exp,
            data=scores[:, x:y],
            bias=neg_max,
            scale=factor,
            reduce_op=nl.add,
            reduce_res=result,
            reduce_cmd=nisa.reduce_cmd.reset_reduce if x == 0 else nisa.reduce_cmd.reduce,
        )
    acc = nl.ndarray((rows, loaded.values.shape[2]), dtype=nl.float32, buffer=nl.psum)
    _weighted_sum(acc, weights, loaded.values, (first - loaded.base) // ROWS)
    if state is None:
        return State(acc, neg_max, total)

    fade = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=fade, op=nl.exp, data=state.neg_max, bias=neg_max, scale=-1.0)
    new_acc = nl.ndarray(acc.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(dst=new_acc, data=state.acc, op0=nl.multiply, operand0=fade, op1=nl.add, operand1=acc)
    new_total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=new_total, data=state.total, op0=nl.multiply, operand0=fade, op1=nl.add, operand1=total
    )
    return State(new_acc, neg_max, new_total)


def _evict(
    dst: Any, source: Any, tile: QueryTile, ragged: bool, start: int, row_max: Any, first: bool, last: bool
) -> None:
    """Copy scores out of PSUM, masked if `ragged`. The engine keeps the row maximum, and writes it after the last."""
    command = nisa.reduce_cmd.reset_reduce if first else nisa.reduce_cmd.reduce
    result = row_max if last else None
    if ragged:
        nisa.range_select(
            dst=dst,
            on_true_tile=source,
            comp_op0=nl.greater_equal,
            comp_op1=nl.less,
            bound0=tile.lo,
            bound1=tile.hi,
            reduce_cmd=command,
            reduce_res=result,
            reduce_op=nl.maximum,
            range_start=start,
            on_false_value=MASKED,
        )
    else:
        nisa.tensor_scalar_reduce(
            dst=dst,
            data=source,
            op0=nl.multiply,
            operand0=1.0,
            reduce_op=nl.maximum,
            reduce_res=result,
            reduce_cmd=command,
        )


def _weighted_sum(acc: Any, weights: Any, values: Any, block: int) -> None:
    """acc [rows, v_dim] = weights [rows, width] times the values, from block `block` on."""
    rows, width = weights.shape
    transposers = TRANSPOSERS
    if nisa.get_nc_version() == nisa.nc_version.gen4:
        transposers = TRANSPOSERS_GEN4
    for x in range(0, width, TRANSPOSED_BLOCKS * ROWS):
        y = min(x + TRANSPOSED_BLOCKS * ROWS, width)
        blocks = (y - x + ROWS - 1) // ROWS
        transposed = nl.ndarray((ROWS, blocks, rows), dtype=weights.dtype, buffer=nl.sbuf)
        for i in range(len(transposers)):
            who, start, stop = transposers[i]
            a = x + start * ROWS
            b = min(x + stop * ROWS, y)
            if a < b and who == "dma" and weights.dtype != nl.float32:
                _transpose_by_dma(transposed, weights, start, a, b)
            elif a < b:
                _transpose_by_pe(
                    transposed, weights, start, a, b, nisa.engine.vector if who == "vector" else nisa.engine.scalar
                )
        for i in range(blocks):
            keys = min(ROWS, y - x - i * ROWS)
            nisa.nc_matmul(
                dst=acc,
                stationary=transposed[0:keys, i, :],
                moving=values[0:keys, block + x // ROWS + i, :],
                accumulate=x + i > 0,
            )


def _transpose_by_pe(dst: Any, weights: Any, first: int, a: int, b: int, engine: Any) -> None:
    """Transpose each 128 columns of weights[:, a:b] into one block of dst [128, blocks, rows], from `first` on."""
    rows, _ = weights.shape
    whole = (b - a) // ROWS
    rest = b - a - whole * ROWS
    transposed = nl.ndarray((ROWS, whole + 1, rows), dtype=weights.dtype, buffer=nl.psum)
    for i in range(whole):
        c = a + i * ROWS
        nisa.nc_transpose(dst=transposed[:, i, :], data=weights[:, c : c + ROWS], engine=nisa.engine.tensor)
    if whole > 0:
        _copy_from_psum(dst[:, first : first + whole, :], transposed[:, 0:whole, :], engine)
    if rest > 0:
        nisa.nc_transpose(dst=transposed[0:rest, whole, :], data=weights[:, b - rest : b], engine=nisa.engine.tensor)
        _copy_from_psum(dst[0:rest, first + whole, :], transposed[0:rest, whole, :], engine)


def _copy_from_psum(dst: Any, source: Any, engine: Any) -> None:
    """dst in SBUF = source in PSUM, copied by the scalar or the vector engine."""
    if engine == nisa.engine.vector:
        nisa.tensor_copy(dst=dst, src=source, engine=nisa.engine.vector)
    else:
        nisa.activation(dst=dst, op=nl.copy, data=source)


def _transpose_by_dma(dst: Any, weights: Any, first: int, a: int, b: int) -> None:
    """The same as `_transpose_by_pe`, for 16-bit weights."""
    rows, width = weights.shape
    stride = dst.shape[1] * rows
    whole = (b - a) // ROWS
    rest = b - a - whole * ROWS
    if whole > 0:
        nisa.dma_transpose(
            dst=dst.ap([[stride, ROWS], [1, 1], [rows, whole], [1, rows]], offset=first * rows),
            src=weights.ap([[width, rows], [1, 1], [ROWS, whole], [1, ROWS]], offset=a),
            axes=(3, 1, 2, 0),
        )
    if rest > 0:
        nisa.dma_transpose(
            dst=dst.ap([[stride, rest], [1, 1], [rows, 1], [1, rows]], offset=(first + whole) * rows),
            src=weights.ap([[width, rows], [1, 1], [ROWS, 1], [1, rest]], offset=a + whole * ROWS),
            axes=(3, 1, 2, 0),
        )


def parked(state: State) -> State:
    """The state after the first key range with `acc` in SBUF, where it can stay until the next range."""
    acc = nl.ndarray(state.acc.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=acc, src=state.acc)
    return State(acc, state.neg_max, state.total)


def normalised(state: State, sink: Any, mean: Any, dtype: Any) -> Any:
    """The output tile [rows, v_dim] in SBUF: acc / (sum of the exponentials, that of the sink included).

    sink: [rows, 1], or None. mean: [rows, v_dim], the output of rows that see no key; None if it is zero.
    """
    acc = state.acc
    total = state.total
    rows, v_dim = acc.shape
    share = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    whole = total
    if sink is not None:
        weight = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(
            dst=weight, data=sink, op0=nl.add, operand0=state.neg_max, op1=nl.minimum, operand1=LARGEST_SINK
        )
        nisa.activation(dst=weight, op=nl.exp, data=weight)
        whole = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=whole, data1=total, data2=weight, op=nl.add)
    # The total of a row that sees a key is at least one half: the exponential of its maximum is 1.
    nisa.tensor_scalar(dst=share, data=whole, op0=nl.maximum, operand0=1.0e-30)
    nisa.reciprocal(dst=share, data=share)
    out = nl.ndarray((rows, v_dim), dtype=dtype, buffer=nl.sbuf)
    if mean is None:
        nisa.activation(dst=out, op=nl.copy, data=acc, scale=share)
        return out
    seen = nl.ndarray((rows, v_dim), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=seen, op=nl.copy, data=acc, scale=share)
    empty = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=empty, data=total, op0=nl.equal, operand0=0.0)
    nisa.scalar_tensor_tensor(dst=out, data=mean[0:rows, :], op0=nl.multiply, operand0=empty, op1=nl.add, operand1=seen)
    return out


def log_sum_exp(state: State) -> Any:
    """[rows, 1] float32: the log-sum-exp of the scores that a row sees, without the sink. About -1e30 if none."""
    rows = state.total.shape[0]
    lse = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=lse, data=state.total, op0=nl.maximum, operand0=1.0e-18)
    nisa.activation(dst=lse, op=nl.log, data=lse)
    nisa.tensor_tensor(dst=lse, data1=lse, data2=state.neg_max, op=nl.subtract)
    return lse
