"""The loop around the flash core: all query tiles of all heads meet the keys that they see.

An item is one kv head of one batch element. Its keys and values are read once, for all query heads of its group. With
two cores, each core takes every other item. If one item is left over, the cores share it: each takes one query tile of
each pair, and both use the plan of the pair, so that both issue the same instructions.
"""

from typing import Any, NamedTuple

import nki.isa as nisa
import nki.language as nl

from neuron_attn_rewrite.kernels.nki.core import (
    ROWS,
    KeyRange,
    Loaded,
    QueryTile,
    State,
    flash_step,
    log_sum_exp,
    normalised,
    parked,
)
from neuron_attn_rewrite.kernels.nki.load import load_transposed, load_values, mean_of_values


class Source(NamedTuple):
    """Keys and values in HBM, and what the query rows see of them.

    `k` is [items * kv_len, head_dim], `v` [items * kv_len, v_dim]. With the heads side by side in a row, `k` is
    [batch * kv_len, kv_heads * head_dim], `v` [batch * kv_len, kv_heads * v_dim].
    """

    k: Any
    v: Any
    k_heads: int
    v_heads: int
    """How many heads lie side by side in a row of `k` and of `v`."""
    kv_len: int
    bounds: Any
    """[1 | batch, rows, 2 * tiles] float32: the interval [lo, hi) of keys that each row of each tile sees."""
    key_bias: Any
    """[1 | batch, 1 | heads, kv_len] to add to the scores of all rows, or None."""
    section: int
    """How many keys are in SBUF at a time."""


class Query(NamedTuple):
    """The query rows of all heads, and what is added to their scores."""

    q: Any
    """[items * group * q_len, head_dim], or [batch * q_len, heads * head_dim]."""
    q_heads: int
    out_heads: int
    """How many heads lie side by side in a row of `q` and of the output."""
    group: int
    q_len: int
    kv_heads: int
    bias: Any
    """[1 | batch, 1 | heads, q_len, 1 | kv_len], or None."""
    sink: Any
    """[heads, rows] float32, or None."""
    scale: float
    softcap: float | None
    chunk: int
    """How many keys one step of the flash core takes."""


def attention(
    query: Query, sources: Any, items: int, tiles: Any, pairs: Any, block: int, mean_rows: bool, with_lse: bool
) -> Any:
    cores = 1
    core = 0
    if nl.program_ndim() > 0:
        cores = nl.num_programs(0)
        core = nl.program_id(0)
    count = items * query.group * query.q_len
    v_dim = sources[0].v.shape[1] // sources[0].v_heads
    width = query.out_heads * v_dim
    out = nl.ndarray((count // query.out_heads, width), dtype=query.q.dtype, buffer=nl.shared_hbm)
    lse = None
    if with_lse:
        lse = nl.ndarray((count, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    alone = items // cores
    for i in range(alone):
        _item(i * cores + core, query, sources, tiles, 0, block, mean_rows, out, lse)
    for item in range(alone * cores, items):
        _item(item, query, sources, pairs if cores > 1 else tiles, core, block, mean_rows, out, lse)
    if with_lse:
        return out, lse
    return out


def _item(
    item: int, query: Query, sources: Any, tiles: Any, core: int, block: int, mean_rows: bool, out: Any, lse: Any
) -> None:
    """All query rows of one kv head, `block` query tiles at a time: the states of so many tiles fit into SBUF."""
    batch = item // query.kv_heads
    bounds = []
    for source in sources:
        count, rows, width = source.bounds.shape
        tile = nl.ndarray((rows, width), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=source.bounds[min(batch, count - 1)])
        bounds.append(tile)
    sinks = []
    for g in range(query.group):
        sinks.append(_load_sink(query, item % query.kv_heads * query.group + g))
    mean = None
    if mean_rows:
        s = sources[0]
        mean = mean_of_values(s.v, item // s.v_heads * s.kv_len, s.kv_len, _column(s.v, item, s.v_heads), s.v_heads)
    for first in range(0, len(tiles), block):
        _block(item, query, sources, bounds, tiles, first, min(first + block, len(tiles)), core, sinks, mean, out, lse)


def _column(tensor: Any, head: int, heads: int) -> Any:
    """The first column of a head in a tensor with `heads` heads side by side in a row."""
    return head % heads * (tensor.shape[1] // heads)


def _load_sink(query: Query, head: int) -> Any:
    if query.sink is None:
        return None
    rows = query.sink.shape[1]
    tile = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=query.sink.ap([[1, rows], [1, 1]], offset=head * rows))
    return tile


def _block(
    item: int,
    query: Query,
    sources: Any,
    bounds: Any,
    tiles: Any,
    first: int,
    last: int,
    core: int,
    sinks: Any,
    mean: Any,
    out: Any,
    lse: Any,
) -> None:
    """Query tiles [first, last): each section of keys is loaded once, for all of them."""
    states: Any = []
    for _ in range((last - first) * query.group):
        states.append(None)
    visits = _visits(sources, tiles, first, last)
    for i in range(len(visits)):
        s, start, stop = visits[i]
        loaded = _load(item, query, sources[s], start, stop)
        final = i == len(visits) - 1
        for t in range(first, last):
            key_range = _cut(tiles[t][1][s], start, stop)
            if key_range.first < key_range.stop:
                _see(
                    item,
                    query,
                    bounds[s],
                    loaded,
                    tiles[t][0][core],
                    key_range,
                    states,
                    (t - first) * query.group,
                    final,
                )
            if final:
                for g in range(query.group):
                    at = (t - first) * query.group + g
                    _store(item, g, query, tiles[t][0][core], states[at], sinks[g], mean, out, lse)
                    states[at] = None
    if len(visits) == 0:
        for t in range(first, last):
            for g in range(query.group):
                _store(item, g, query, tiles[t][0][core], None, sinks[g], mean, out, lse)


def _visits(sources: Any, tiles: Any, first: int, last: int) -> Any:
    """The sections of keys that at least one of the tiles sees: a list of (source, start, stop)."""
    visits = []
    for s in range(len(sources)):
        start = sources[s].kv_len
        stop = 0
        for t in range(first, last):
            key_range = tiles[t][1][s]
            if key_range[0] < key_range[3]:
                start = min(start, key_range[0])
                stop = max(stop, key_range[3])
        for a in range(start, stop, sources[s].section):
            visits.append((s, a, min(a + sources[s].section, stop)))
    return visits


def _cut(key_range: Any, start: int, stop: int) -> KeyRange:
    """The part of a key range within [start, stop)."""
    a = max(key_range[0], start)
    b = min(key_range[3], stop)
    full_start = min(max(key_range[1], a), b)
    return KeyRange(a, full_start, max(min(key_range[2], b), full_start), b)


def _load(item: int, query: Query, source: Source, start: int, stop: int) -> Any:
    """The keys and values [start, stop), once for each query head of the group. Only the key bias may differ."""
    k, v = source.k, source.v
    k_row = item // source.k_heads * source.kv_len + start
    v_row = item // source.v_heads * source.kv_len + start
    k_t = load_transposed(k, k_row, stop - start, _column(k, item, source.k_heads), source.k_heads)
    values = load_values(v, v_row, stop - start, _column(v, item, source.v_heads), source.v_heads)
    ones = None
    row = None
    if source.key_bias is not None:
        ones = nl.ndarray((1, ROWS), dtype=source.key_bias.dtype, buffer=nl.sbuf)
        nisa.memset(dst=ones, value=1.0)
    loaded = []
    for g in range(query.group):
        if source.key_bias is not None and (g == 0 or source.key_bias.shape[1] > 1):
            batches, heads, kv_len = source.key_bias.shape
            b = min(item // query.kv_heads, batches - 1)
            h = min(item % query.kv_heads * query.group + g, heads - 1)
            row = nl.ndarray((1, stop - start), dtype=source.key_bias.dtype, buffer=nl.sbuf)
            nisa.dma_copy(
                dst=row,
                src=source.key_bias.ap([[kv_len, 1], [1, stop - start]], offset=(b * heads + h) * kv_len + start),
            )
        loaded.append(Loaded(start, k_t, values, row, ones))
    return loaded


def _see(
    item: int,
    query: Query,
    bounds: Any,
    loaded: Any,
    row: int,
    key_range: KeyRange,
    states: Any,
    at: int,
    final: bool,
) -> None:
    """One query tile of each head of the group sees a range of the loaded keys. Its states are states[at + g]."""
    rows = min(ROWS, query.q_len)
    # Each tile begins at a multiple of 128, except the last one, which ends with the last row.
    column = (row + ROWS - 1) // ROWS * 2
    q_tiles = []
    for g in range(query.group):
        head = item * query.group + g
        start = head // query.q_heads * query.q_len + row
        q_t = load_transposed(query.q, start, rows, _column(query.q, head, query.q_heads), query.q_heads)
        q_tiles.append(QueryTile(q_t, bounds[:, column : column + 1], bounds[:, column + 1 : column + 2]))
    for a in range(key_range.first, key_range.stop, query.chunk):
        part = _cut(key_range, a, min(a + query.chunk, key_range.stop))
        bias = None
        for g in range(query.group):
            if query.bias is not None and (g == 0 or query.bias.shape[1] > 1):
                bias = _load_bias(item, g, query, row, part)
            state = flash_step(q_tiles[g], loaded[g], part, bias, query.scale, query.softcap, states[at + g])
            if states[at + g] is None and not (final and part.stop == key_range.stop):
                state = parked(state)
            states[at + g] = state


def _load_bias(item: int, g: int, query: Query, row: int, key_range: KeyRange) -> Any:
    """The bias of a query tile as an SBUF tile [rows, keys]; its batch, heads and keys may broadcast."""
    batches, heads, q_len, kv_len = query.bias.shape
    rows = min(ROWS, q_len)
    b = min(item // query.kv_heads, batches - 1)
    h = min(item % query.kv_heads * query.group + g, heads - 1)
    width = key_range.stop - key_range.first
    tile = nl.ndarray((rows, width), dtype=query.bias.dtype, buffer=nl.sbuf)
    offset = ((b * heads + h) * q_len + row) * kv_len
    if kv_len == 1:
        nisa.dma_copy(dst=tile, src=query.bias.ap([[1, rows], [0, width]], offset=offset))
    else:
        nisa.dma_copy(dst=tile, src=query.bias.ap([[kv_len, rows], [1, width]], offset=offset + key_range.first))
    return tile


def _store(item: int, g: int, query: Query, row: int, state: Any, sink: Any, mean: Any, out: Any, lse: Any) -> None:
    """Write the output of a query tile of one head. A state of None has seen no key."""
    rows = min(ROWS, query.q_len)
    head = item * query.group + g
    v_dim = out.shape[1] // query.out_heads
    if state is None:
        state = _nothing(rows, v_dim, query)
    start = head // query.out_heads * query.q_len + row
    column = _column(out, head, query.out_heads)
    nisa.dma_copy(dst=out[start : start + rows, column : column + v_dim], src=normalised(state, sink, mean, out.dtype))
    if lse is not None:
        start = head * query.q_len + row
        nisa.dma_copy(dst=lse[start : start + rows, :], src=log_sum_exp(state))


def _nothing(rows: int, v_dim: int, query: Query) -> State:
    acc = nl.ndarray((rows, v_dim), dtype=nl.float32, buffer=nl.sbuf)
    neg_max = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=acc, value=0.0)
    nisa.memset(dst=neg_max, value=1.0e30)
    nisa.memset(dst=total, value=0.0)
    return State(acc, neg_max, total)
