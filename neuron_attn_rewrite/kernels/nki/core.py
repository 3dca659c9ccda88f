"""The flash core: what every attention kernel here does with one query tile and a run of keys.

A query tile is up to 128 rows of one head, on the partitions of its scores. Keys are columns. Nothing here knows where
the keys came from, and a mask costs at boundary tiles alone: `Run` says which columns every row of the tile sees.

Written for NKI 0.6 and 0.7: inside what both the parser and the tracer accept.
"""

from typing import Any, NamedTuple

import nki.isa as nisa
import nki.language as nl

ROWS = 128
"""Rows of a query tile, and keys of a block of P^T and V: the partitions of the engines."""
BANK = 512
"""Columns of a score tile: the float32 elements of one PSUM bank."""
EXP_COLUMNS = 2048
"""Columns of one exponential: wide enough to hide its start, narrow enough to feed the transposes early."""
TURNS = (("scalar", 0, 3), ("vector", 3, 5), ("dma", 5, 8))
"""Of each 8 blocks of P, who transposes which: the PE, with the engine named emptying PSUM, or a DMA. This keeps all
engines of trn2 about as busy; all by DMA, the DMA would take twice as long as any other engine."""
TURNS_GEN4 = (("scalar", 0, 1), ("vector", 1, 3), ("dma", 3, 8))
"""The same for trn3, whose DMA is faster and whose scalar engine is not."""
TURN_BLOCKS = 8
MASKED = -3.4028234663852886e38
"""What range_select puts where a key is hidden; its hardware knows no other value."""
LOWEST = -1.0e30
"""No score counts as lower. A row that sees nothing has its top here, and its exponentials are exactly zero."""
LARGEST_SINK = 40.0
"""Exponent at which a sink leaves nothing of a row; more would leave the range of the logarithm."""


class Run(NamedTuple):
    """The keys [first, stop) of one step. Every row of the tile sees those of [full_start, full_stop)."""

    first: int
    full_start: int
    full_stop: int
    stop: int


class Loaded(NamedTuple):
    """Keys and values in SBUF, from key `base` on; a run begins a multiple of 128 keys after it."""

    base: int
    k_t: Any
    """The keys transposed: a list of tiles [<=128 features, keys]."""
    values: Any
    """[128, blocks, v_dim], 128 keys a block."""
    key_bias: Any
    """[1, keys] to add to the products of all rows, or None: in units of the scores before the factor."""
    ones: Any
    """[1, 128] of ones in the dtype of `key_bias`, or None."""


class Rows(NamedTuple):
    """A query tile in SBUF, and what it may see."""

    q_t: Any
    """The rows transposed: a list of tiles [<=128 features, rows]."""
    lo: Any
    hi: Any
    """[rows, 1] float32: a row sees the keys of [lo, hi)."""


class State(NamedTuple):
    """What a query tile has gathered, float32."""

    acc: Any
    """[rows, v_dim]: the values, each weighted by its exponential."""
    neg_top: Any
    """[rows, 1]: minus the largest exponent."""
    total: Any
    """[rows, 1]: the sum of the exponentials."""


def flash_step(
    tile: Rows, loaded: Loaded, run: Run, bias: Any, scale: float, softcap: float | None, state: State | None
) -> State:
    """The state of a query tile once it has also seen the keys of a run; None is that before the first.

    bias: [rows, stop - first] to add to the scores, or None. After a first run the state's `acc` lies in PSUM.
    """
    q_t = tile.q_t
    k_t = loaded.k_t
    key_bias = loaded.key_bias
    first = run.first
    stop = run.stop
    rows = q_t[0].shape[1]
    width = stop - first
    # What the exponential multiplies the scores with.
    factor = scale
    if softcap is not None:
        factor = softcap
    inner = factor
    if bias is not None:
        factor = 1.0

    scores = nl.ndarray((rows, width), dtype=nl.float32, buffer=nl.sbuf)
    top = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
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
        # The columns [a, b) are cut where some row stops to see all of them.
        cuts = [a, min(max(run.full_start, a), b), min(max(run.full_stop, a), b), b]
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
                    top,
                    x == first,
                    y == stop,
                )

    neg_top = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    floor = -factor * LOWEST
    if state is not None:
        floor = state.neg_top
    nisa.tensor_scalar(dst=neg_top, data=top, op0=nl.multiply, operand0=-factor, op1=nl.minimum, operand1=floor)

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
            bias=neg_top,
            scale=factor,
            reduce_op=nl.add,
            reduce_res=result,
            reduce_cmd=nisa.reduce_cmd.reset_reduce if x == 0 else nisa.reduce_cmd.reduce,
        )
    acc = nl.ndarray((rows, loaded.values.shape[2]), dtype=nl.float32, buffer=nl.psum)
    _weighted_sum(acc, weights, loaded.values, (first - loaded.base) // ROWS)
    if state is None:
        return State(acc, neg_top, total)

    fade = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=fade, op=nl.exp, data=state.neg_top, bias=neg_top, scale=-1.0)
    new_acc = nl.ndarray(acc.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(dst=new_acc, data=state.acc, op0=nl.multiply, operand0=fade, op1=nl.add, operand1=acc)
    new_total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=new_total, data=state.total, op0=nl.multiply, operand0=fade, op1=nl.add, operand1=total
    )
    return State(new_acc, neg_top, new_total)


def _evict(dst: Any, source: Any, tile: Rows, ragged: bool, start: int, top: Any, first: bool, last: bool) -> None:
    """Scores out of PSUM, hidden where `ragged`, while their running maximum stays in the engine until the last."""
    command = nisa.reduce_cmd.reset_reduce if first else nisa.reduce_cmd.reduce
    result = top if last else None
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
    """acc [rows, v_dim] = weights [rows, width] times the values from block `block` on."""
    rows, width = weights.shape
    turns = TURNS
    if nisa.get_nc_version() == nisa.nc_version.gen4:
        turns = TURNS_GEN4
    for x in range(0, width, TURN_BLOCKS * ROWS):
        y = min(x + TURN_BLOCKS * ROWS, width)
        blocks = (y - x + ROWS - 1) // ROWS
        turned = nl.ndarray((ROWS, blocks, rows), dtype=weights.dtype, buffer=nl.sbuf)
        for i in range(len(turns)):
            who, start, stop = turns[i]
            a = x + start * ROWS
            b = min(x + stop * ROWS, y)
            if a < b and who == "dma" and weights.dtype != nl.float32:
                _turn_by_dma(turned, weights, start, a, b)
            elif a < b:
                _turn_by_pe(turned, weights, start, a, b, nisa.engine.vector if who == "vector" else nisa.engine.scalar)
        for i in range(blocks):
            keys = min(ROWS, y - x - i * ROWS)
            nisa.nc_matmul(
                dst=acc,
                stationary=turned[0:keys, i, :],
                moving=values[0:keys, block + x // ROWS + i, :],
                accumulate=x + i > 0,
            )


def _turn_by_pe(dst: Any, weights: Any, first: int, a: int, b: int, engine: Any) -> None:
    """Blocks of dst [128, blocks, rows] from `first` on: each 128 columns of weights[:, a:b] transposed."""
    rows, _ = weights.shape
    whole = (b - a) // ROWS
    rest = b - a - whole * ROWS
    turned = nl.ndarray((ROWS, whole + 1, rows), dtype=weights.dtype, buffer=nl.psum)
    for i in range(whole):
        c = a + i * ROWS
        nisa.nc_transpose(dst=turned[:, i, :], data=weights[:, c : c + ROWS], engine=nisa.engine.tensor)
    if whole > 0:
        _empty(dst[:, first : first + whole, :], turned[:, 0:whole, :], engine)
    if rest > 0:
        nisa.nc_transpose(dst=turned[0:rest, whole, :], data=weights[:, b - rest : b], engine=nisa.engine.tensor)
        _empty(dst[0:rest, first + whole, :], turned[0:rest, whole, :], engine)


def _empty(dst: Any, source: Any, engine: Any) -> None:
    """PSUM into SBUF."""
    if engine == nisa.engine.vector:
        nisa.tensor_copy(dst=dst, src=source, engine=nisa.engine.vector)
    else:
        nisa.activation(dst=dst, op=nl.copy, data=source)


def _turn_by_dma(dst: Any, weights: Any, first: int, a: int, b: int) -> None:
    """As `_turn_by_pe`, for 16-bit weights."""
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
    """The state after a first run with `acc` in SBUF, where it may wait for the next one."""
    acc = nl.ndarray(state.acc.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=acc, src=state.acc)
    return State(acc, state.neg_top, state.total)


def normalised(state: State, sink: Any, mean: Any, dtype: Any) -> Any:
    """The output tile [rows, v_dim] in SBUF: acc over the sum of the exponentials, the sink's among them.

    sink: [rows, 1], None without one. mean: [rows, v_dim] for the rows that see nothing, None for zeros.
    """
    acc = state.acc
    total = state.total
    rows, v_dim = acc.shape
    share = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    whole = total
    if sink is not None:
        weight = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(
            dst=weight, data=sink, op0=nl.add, operand0=state.neg_top, op1=nl.minimum, operand1=LARGEST_SINK
        )
        nisa.activation(dst=weight, op=nl.exp, data=weight)
        whole = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=whole, data1=total, data2=weight, op=nl.add)
    # A row that sees a key has a total of at least one half: its top key counts 1.
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
    """[rows, 1] float32: the log-sum-exp of the scores a row sees, without the sink; hugely negative if none."""
    rows = state.total.shape[0]
    lse = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=lse, data=state.total, op0=nl.maximum, operand0=1.0e-18)
    nisa.activation(dst=lse, op=nl.log, data=lse)
    nisa.tensor_tensor(dst=lse, data1=lse, data2=state.neg_top, op=nl.subtract)
    return lse


def load_transposed(source: Any, offset: int, count: int, column: int = 0, heads: int = 1) -> Any:
    """Rows [offset, offset + count) of HBM [rows, heads * head_dim], from `column` on, as SBUF tiles
    [<=128 features, count], a list.

    The DMA transposes 16-bit rows on their way; float32 goes through the PE.
    """
    width = source.shape[1]
    head_dim = width // heads
    tiles = []
    for c in range(0, head_dim, ROWS):
        features = min(ROWS, head_dim - c)
        tile = nl.ndarray((features, count), dtype=source.dtype, buffer=nl.sbuf)
        for a in range(0, count, BANK if source.dtype != nl.float32 else ROWS):
            b = min(a + BANK, count)
            if source.dtype == nl.float32:
                b = min(a + ROWS, count)
                rows = nl.ndarray((b - a, features), dtype=source.dtype, buffer=nl.sbuf)
                nisa.dma_copy(dst=rows, src=source[offset + a : offset + b, column + c : column + c + features])
                turned = nl.ndarray((features, b - a), dtype=source.dtype, buffer=nl.psum)
                nisa.nc_transpose(dst=turned, data=rows, engine=nisa.engine.tensor)
                nisa.activation(dst=tile[:, a:b], op=nl.copy, data=turned)
            else:
                nisa.dma_transpose(
                    dst=tile.ap([[count, features], [1, 1], [1, 1], [1, b - a]], offset=a),
                    src=source.ap(
                        [[width, b - a], [1, 1], [1, 1], [1, features]],
                        offset=(offset + a) * width + column + c,
                    ),
                    axes=(3, 1, 2, 0),
                )
        tiles.append(tile)
    return tiles


def load_values(source: Any, offset: int, count: int, column: int = 0, heads: int = 1) -> Any:
    """Rows [offset, offset + count) of HBM [rows, heads * v_dim], from `column` on, as SBUF [128, blocks, v_dim], 128
    keys a block.
    """
    width = source.shape[1]
    v_dim = width // heads
    whole = count // ROWS
    blocks = (count + ROWS - 1) // ROWS
    tile = nl.ndarray((ROWS, blocks, v_dim), dtype=source.dtype, buffer=nl.sbuf)
    if whole > 0:
        nisa.dma_copy(
            dst=tile[:, 0:whole, :],
            src=source.ap([[width, ROWS], [ROWS * width, whole], [1, v_dim]], offset=offset * width + column),
        )
    if whole < blocks:
        start = offset + whole * ROWS
        nisa.dma_copy(
            dst=tile[0 : count - whole * ROWS, whole, :],
            src=source[start : offset + count, column : column + v_dim],
        )
    return tile


def mean_of_values(source: Any, offset: int, count: int, column: int = 0, heads: int = 1) -> Any:
    """SBUF [128, v_dim] float32: the mean of rows [offset, offset + count) of HBM [rows, heads * v_dim], from `column`
    on, in each row.
    """
    v_dim = source.shape[1] // heads
    ones = nl.ndarray((ROWS, ROWS), dtype=source.dtype, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)
    total = nl.ndarray((ROWS, v_dim), dtype=nl.float32, buffer=nl.psum)
    for a in range(0, count, ROWS):
        b = min(a + ROWS, count)
        values = nl.ndarray((b - a, v_dim), dtype=source.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=values, src=source[offset + a : offset + b, column : column + v_dim])
        nisa.nc_matmul(dst=total, stationary=ones[0 : b - a, :], moving=values, accumulate=a > 0)
    mean = nl.ndarray((ROWS, v_dim), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=mean, op=nl.copy, data=total, scale=1.0 / count)
    return mean
