"""The NKI kernel of paged attention: the flash core over a schedule of tiles that is known only at run time.

Which query rows meet which rows of the cache is data: row indices for the DMA, and bounds for the mask. So the states
of all query rows lie in HBM, and each tile of the schedule loads and stores the ones that it needs. Keys and values
stay in SBUF from tile to tile: where a row index is out of range, the row that an earlier tile has loaded stays.
"""

from typing import Any

import nki
import nki.isa as nisa
import nki.language as nl

from neuron_attn_rewrite.kernels.nki.core import (
    LOWEST,
    ROWS,
    KeyRange,
    Loaded,
    QueryTile,
    State,
    flash_step,
    normalised,
)
from neuron_attn_rewrite.kernels.nki.load import load_transposed, load_values


@nki.jit
def flash_paged(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    q_rows: Any,
    kv_rows: Any,
    tile_bounds: Any,
    k: Any = None,
    v: Any = None,
    active_bounds: Any = None,
    sink: Any = None,
    group: int = 1,
    kv_heads: int = 1,
    scale: float = 1.0,
    softcap: float | None = None,
    section: int = 8192,
) -> Any:
    """The query rows of several requests see a paged cache, tile by tile of a schedule, and then the new keys.

    q is [kv_heads * group * q_len, head_dim], where q_len is a multiple of 128. The new keys and values are
    k [kv_heads * q_len, head_dim] and v [kv_heads * q_len, v_dim], or None. The cache is k_cache [cache_rows, head_dim]
    and v_cache [cache_rows, v_dim].

    q_rows int32 [heads, 128, tiles]: the rows of q of each tile of the schedule. kv_rows int32
    [kv_heads, tiles, 128, kv_tile / 128]: the rows of the cache, key 128 * b + p at [p, b]; an index out of range keeps
    the row of an earlier tile. tile_bounds float32 [128, 2 * tiles]: the interval of a tile's keys that each row sees.
    active_bounds float32 [128, 2 * q_len / 128]: the interval of the new keys that each row sees.

    Gives the output [kv_heads * group * q_len, v_dim] in the dtype of q.
    """
    cores = 1
    core = 0
    if nl.program_ndim() > 0:
        cores = nl.num_programs(0)
        core = nl.program_id(0)
    v_dim = v_cache.shape[1]
    out = nl.ndarray((q.shape[0], v_dim), dtype=q.dtype, buffer=nl.shared_hbm)
    # Each core has states of its own. If the cores cannot share the heads equally, both compute all of them.
    states = nl.ndarray((q.shape[0], v_dim + 2), dtype=nl.float32, buffer=nl.private_hbm)
    tile_bounds_sb = nl.ndarray(tile_bounds.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile_bounds_sb, src=tile_bounds)
    active_bounds_sb = None
    if active_bounds is not None:
        active_bounds_sb = nl.ndarray(active_bounds.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=active_bounds_sb, src=active_bounds)
    q_len = q.shape[0] // (kv_heads * group)
    mine = kv_heads
    step = 1
    first = 0
    if kv_heads % cores == 0:
        mine = kv_heads // cores
        step = cores
        first = core
    for i in range(mine):
        head = i * step + first
        _clear(states, head * group * q_len, group * q_len, scale, softcap)
        _prior(q, k_cache, v_cache, states, q_rows, kv_rows, tile_bounds_sb, head, group, scale, softcap)
        if k is None:
            for row in range(head * group * q_len, (head + 1) * group * q_len, ROWS):
                _store(_loaded(states, row), row, sink, row // q_len, out)
        else:
            _active(q, k, v, states, active_bounds_sb, sink, head, group, kv_heads, scale, softcap, section, out)
    return out


def _clear(states: Any, start: int, count: int, scale: float, softcap: Any) -> None:
    """Set the states of these rows to that of a row that has seen no key."""
    width = states.shape[1]
    tile = nl.ndarray((ROWS, width), dtype=nl.float32, buffer=nl.sbuf)
    factor = scale
    if softcap is not None:
        factor = softcap
    nisa.memset(dst=tile, value=0.0)
    nisa.memset(dst=tile[:, width - 2 : width - 1], value=-factor * LOWEST)
    for row in range(start, start + count, ROWS):
        nisa.dma_copy(dst=states[row : row + ROWS, :], src=tile)


def _state(tile: Any) -> State:
    """A tile [128, v_dim + 2] as a state: acc, then neg_max, then total."""
    v_dim = tile.shape[1] - 2
    return State(tile[:, 0:v_dim], tile[:, v_dim : v_dim + 1], tile[:, v_dim + 1 : v_dim + 2])


def _loaded(states: Any, row: int) -> State:
    """The states of 128 rows."""
    tile = nl.ndarray((ROWS, states.shape[1]), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=states[row : row + ROWS, :])
    return _state(tile)


def _packed(state: State) -> Any:
    rows, v_dim = state.acc.shape
    tile = nl.ndarray((rows, v_dim + 2), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile[:, 0:v_dim], src=state.acc)
    nisa.tensor_copy(dst=tile[:, v_dim : v_dim + 1], src=state.neg_max)
    nisa.tensor_copy(dst=tile[:, v_dim + 1 : v_dim + 2], src=state.total)
    return tile


def _gathered(source: Any, rows: Any) -> Any:
    """Rows of HBM [rows, width] as an SBUF tile [128, width]. `rows` is int32 [128, 1] in SBUF."""
    width = source.shape[1]
    tile = nl.ndarray((ROWS, width), dtype=source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source.ap([[width, ROWS], [1, width]], vector_offset=rows, indirect_dim=0))
    return tile


def _transpose_into(tile: Any, into: Any, start: int) -> None:
    """Transpose an SBUF tile [128, size] into the tiles [<=128, n] of `into`, from column `start` on."""
    for c in range(len(into)):
        features = into[c].shape[0]
        transposed = nl.ndarray((features, ROWS), dtype=tile.dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=transposed, data=tile[:, c * ROWS : c * ROWS + features], engine=nisa.engine.tensor)
        nisa.activation(dst=into[c][:, start : start + ROWS], op=nl.copy, data=transposed)


def _feature_tiles(size: int, count: int, dtype: Any) -> Any:
    tiles = []
    for c in range(0, size, ROWS):
        tiles.append(nl.ndarray((min(ROWS, size - c), count), dtype=dtype, buffer=nl.sbuf))
    return tiles


def _prior(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    states: Any,
    q_rows: Any,
    kv_rows: Any,
    bounds: Any,
    head: int,
    group: int,
    scale: float,
    softcap: Any,
) -> None:
    """One kv head: the tiles of the schedule."""
    tiles = kv_rows.shape[1]
    blocks = kv_rows.shape[3]
    head_dim = k_cache.shape[1]
    v_dim = v_cache.shape[1]
    keys = nl.ndarray((ROWS, blocks, head_dim), dtype=k_cache.dtype, buffer=nl.sbuf)
    values = nl.ndarray((ROWS, blocks, v_dim), dtype=v_cache.dtype, buffer=nl.sbuf)
    # The mask hides skipped rows of the first tile, but their products must be numbers.
    nisa.memset(dst=keys, value=0.0)
    nisa.memset(dst=values, value=0.0)
    q_index = []
    for g in range(group):
        index = nl.ndarray((ROWS, tiles), dtype=nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=index, src=q_rows[head * group + g])
        q_index.append(index)
    for t in range(tiles):
        kv_index = nl.ndarray((ROWS, blocks), dtype=nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=kv_index, src=kv_rows[head, t])
        k_t = _feature_tiles(head_dim, blocks * ROWS, k_cache.dtype)
        for b in range(blocks):
            at = kv_index[:, b : b + 1]
            nisa.dma_copy(
                dst=keys[:, b, :],
                src=k_cache.ap([[head_dim, ROWS], [1, head_dim]], vector_offset=at, indirect_dim=0),
                oob_mode=nisa.oob_mode.skip,
            )
            nisa.dma_copy(
                dst=values[:, b, :],
                src=v_cache.ap([[v_dim, ROWS], [1, v_dim]], vector_offset=at, indirect_dim=0),
                oob_mode=nisa.oob_mode.skip,
            )
            _transpose_into(keys[:, b, :], k_t, b * ROWS)
        loaded = Loaded(0, k_t, values, None, None)
        key_range = KeyRange(0, blocks * ROWS, blocks * ROWS, blocks * ROWS)
        for g in range(group):
            at = q_index[g][:, t : t + 1]
            q_t = _feature_tiles(head_dim, ROWS, q.dtype)
            _transpose_into(_gathered(q, at), q_t, 0)
            tile = QueryTile(q_t, bounds[:, 2 * t : 2 * t + 1], bounds[:, 2 * t + 1 : 2 * t + 2])
            state = flash_step(tile, loaded, key_range, None, scale, softcap, _state(_gathered(states, at)))
            nisa.dma_copy(
                dst=states.ap([[v_dim + 2, ROWS], [1, v_dim + 2]], vector_offset=at, indirect_dim=0),
                src=_packed(state),
            )


def _active(
    q: Any,
    k: Any,
    v: Any,
    states: Any,
    bounds: Any,
    sink: Any,
    head: int,
    group: int,
    kv_heads: int,
    scale: float,
    softcap: Any,
    section: int,
    out: Any,
) -> None:
    """One kv head: the new keys, then the output."""
    q_len = k.shape[0] // kv_heads
    for start in range(0, q_len, section):
        stop = min(start + section, q_len)
        loaded = Loaded(
            start,
            load_transposed(k, head * q_len + start, stop - start),
            load_values(v, head * q_len + start, stop - start),
            None,
            None,
        )
        for row in range(start, q_len, ROWS):
            # No row sees a key after its own position.
            last = min(row + ROWS, stop)
            column = row // ROWS * 2
            for g in range(group):
                at = (head * group + g) * q_len + row
                tile = QueryTile(
                    load_transposed(q, at, ROWS), bounds[:, column : column + 1], bounds[:, column + 1 : column + 2]
                )
                before = _loaded(states, at)
                state = flash_step(tile, loaded, KeyRange(start, last, last, last), None, scale, softcap, before)
                if stop < row + ROWS:
                    nisa.dma_copy(dst=states[at : at + ROWS, :], src=_packed(state))
                else:
                    _store(state, at, sink, head * group + g, out)


def _store(state: State, row: int, sink: Any, head: int, out: Any) -> None:
    """Write the output of 128 rows of a query head."""
    sink_sb = None
    if sink is not None:
        sink_sb = nl.ndarray((ROWS, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=sink_sb, src=sink.ap([[1, ROWS], [1, 1]], offset=head * ROWS))
    nisa.dma_copy(dst=out[row : row + ROWS, :], src=normalised(state, sink_sb, None, out.dtype))
