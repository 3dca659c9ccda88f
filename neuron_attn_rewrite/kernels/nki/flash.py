"""The NKI kernels of prefill, decoding and prefix caching: one loop around the flash core.

Every tensor argument is what `prepare` makes of the op's operands; rows of several heads lie under each other, so
that a kernel indexes one axis of HBM. An item is one kv head of one batch element: its keys and values are read
once, for all query heads of its group. With two cores each takes every other item; what is left over is shared, each
core taking every other query tile of it, under one plan, so that both issue the same instructions.
"""

from typing import Any, NamedTuple

import nki
import nki.isa as nisa
import nki.language as nl

from neuron_attn_rewrite.kernels.nki.core import (
    ROWS,
    Loaded,
    Rows,
    Run,
    State,
    flash_step,
    load_transposed,
    load_values,
    log_sum_exp,
    mean_of_values,
    normalised,
    parked,
)


class Source(NamedTuple):
    """Keys in HBM: `k` [items * kv_len, head_dim], `v` [items * kv_len, v_dim]; or with the heads side by side in a
    row, `k` [batch * kv_len, kv_heads * head_dim], and so on.
    """

    k: Any
    v: Any
    k_heads: int
    v_heads: int
    """Heads in a row."""
    kv_len: int
    bounds: Any
    """[1 | batch, rows, 2 * tiles] float32: the interval of keys that each row of each tile sees."""
    key_bias: Any
    """[1 | batch, 1 | heads, kv_len] to add to all rows, or None."""
    section: int
    """Keys in SBUF at a time."""


class Query(NamedTuple):
    """The rows of all heads, and what is added to their scores."""

    q: Any
    """[items * group * q_len, head_dim], or [batch * q_len, heads * head_dim]"""
    q_heads: int
    out_heads: int
    """Heads in a row of it, and of the output."""
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
    """Keys of one step."""


@nki.jit
def flash_fwd(
    q: Any,
    k: Any,
    v: Any,
    bounds: Any,
    key_bias: Any = None,
    bias: Any = None,
    sink: Any = None,
    k_prior: Any = None,
    v_prior: Any = None,
    bounds_prior: Any = None,
    key_bias_prior: Any = None,
    tiles: Any = (),
    pairs: Any = (),
    items: int = 1,
    group: int = 1,
    kv_heads: int = 1,
    q_heads: int = 1,
    k_heads: int = 1,
    v_heads: int = 1,
    out_heads: int = 1,
    scale: float = 1.0,
    softcap: float | None = None,
    section: int = 8192,
    chunk: int = 8192,
    block: int = 32,
    mean_rows: bool = False,
    with_lse: bool = False,
) -> Any:
    """softmax(softcap(scale * q k^T) + bias, sink) v, for `items` kv heads with `group` query heads each.

    q: [items * group * q_len, head_dim]; k, v: [items * kv_len, head_dim | v_dim], bf16, fp16 or fp32; where
    `q_heads`, `k_heads`, `v_heads` or `out_heads` is not 1, so many heads lie side by side in each row. The prior ones
    are keys that come before, with bounds of their own. tiles: the plan, `(starts, runs)` for each query tile, where
    `starts` is its first row and `runs` the keys it sees of k and of k_prior, as `core.Run`; pairs: the same where
    each core takes one start of two. Gives the output [items * group * q_len, v_dim] in q's dtype, and with
    `with_lse` also the log-sum-exp of the scores [items * group * q_len, 1] in float32.
    """
    kv_len = k.shape[0] * k_heads // items
    sources = [Source(k, v, k_heads, v_heads, kv_len, bounds, key_bias, section)]
    if k_prior is not None:
        prior_len = k_prior.shape[0] // items
        sources.append(Source(k_prior, v_prior, 1, 1, prior_len, bounds_prior, key_bias_prior, section))
    q_len = q.shape[0] * q_heads // (items * group)
    query = Query(q, q_heads, out_heads, group, q_len, kv_heads, bias, sink, scale, softcap, chunk)
    return _attention(query, sources, items, tiles, pairs, block, mean_rows, with_lse)


@nki.jit
def sliding_window_fwd(
    q: Any,
    k: Any,
    v: Any,
    bounds: Any,
    key_bias: Any = None,
    sink: Any = None,
    tiles: Any = (),
    pairs: Any = (),
    items: int = 1,
    group: int = 1,
    kv_heads: int = 1,
    q_heads: int = 1,
    k_heads: int = 1,
    v_heads: int = 1,
    out_heads: int = 1,
    scale: float = 1.0,
    softcap: float | None = None,
    seq_tile_size: int = 2048,
    section: int = 8192,
    block: int = 32,
    mean_rows: bool = False,
) -> Any:
    """`flash_fwd` in the tiling of NxD Inference's kernel of this kind: 128 rows by `seq_tile_size` keys, 2048 or 512.

    Of those keys a tile takes the ones in its window alone; all other arguments are those of `flash_fwd`.
    """
    assert seq_tile_size == 2048 or seq_tile_size == 512, "seq_tile_size must be 2048 or 512"
    kv_len = k.shape[0] * k_heads // items
    sources = [Source(k, v, k_heads, v_heads, kv_len, bounds, key_bias, section)]
    q_len = q.shape[0] * q_heads // (items * group)
    query = Query(q, q_heads, out_heads, group, q_len, kv_heads, None, sink, scale, softcap, seq_tile_size)
    return _attention(query, sources, items, tiles, pairs, block, mean_rows, False)


@nki.jit
def flash_attention_core(
    q: Any,
    k: Any,
    v: Any,
    bounds: Any,
    bias: Any = None,
    acc: Any = None,
    neg_top: Any = None,
    total: Any = None,
    run: Any = (),
    scale: float = 1.0,
    softcap: float | None = None,
) -> Any:
    """One step of flash attention by itself: a tile of rows sees a tile of keys, and its state goes on.

    q [rows, head_dim], up to 128 rows; k, v [keys, head_dim | v_dim]; bounds [rows, 2] float32, the interval of these
    keys that each row sees; bias [rows, keys] to add to the scores. run: `(first, full_start, full_stop, stop)` as
    `core.Run`. acc [rows, v_dim], neg_top and total [rows, 1], all float32: the state that an earlier step gave, absent
    in the first. Gives the new `(acc, neg_top, total)`: the output is acc / total, the log-sum-exp
    log(total) - neg_top.
    """
    rows = q.shape[0]
    bounds_sb = _copied(bounds)
    tile = Rows(load_transposed(q, 0, rows), bounds_sb[:, 0:1], bounds_sb[:, 1:2])
    loaded = Loaded(0, load_transposed(k, 0, k.shape[0]), load_values(v, 0, v.shape[0]), None, None)
    part = Run(run[0], run[1], run[2], run[3])
    bias_sb = None
    if bias is not None:
        bias_sb = _copied(bias)[:, part.first : part.stop]
    state = None
    if acc is not None:
        state = State(_copied(acc), _copied(neg_top), _copied(total))
    after = flash_step(tile, loaded, part, bias_sb, scale, softcap, state)
    if state is None:
        after = parked(after)
    new_acc = nl.ndarray(after.acc.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    new_top = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    new_total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=new_acc, src=after.acc)
    nisa.dma_copy(dst=new_top, src=after.neg_top)
    nisa.dma_copy(dst=new_total, src=after.total)
    return new_acc, new_top, new_total


def _copied(source: Any) -> Any:
    """A tensor of HBM in SBUF, as it is."""
    tile = nl.ndarray(source.shape, dtype=source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source)
    return tile


def _attention(
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
    """All rows of one kv head, a block of tiles at a time: as many as may wait while the keys pass by."""
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
    """Where a head begins in the rows of a tensor with so many side by side."""
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
    """Tiles [first, last): each section of keys is loaded once and shown to all of them."""
    states: Any = []
    for _ in range((last - first) * query.group):
        states.append(None)
    visits = _visits(sources, tiles, first, last)
    for i in range(len(visits)):
        s, start, stop = visits[i]
        loaded = _load(item, query, sources[s], start, stop)
        final = i == len(visits) - 1
        for t in range(first, last):
            run = _cut(tiles[t][1][s], start, stop)
            if run.first < run.stop:
                _see(item, query, bounds[s], loaded, tiles[t][0][core], run, states, (t - first) * query.group, final)
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
    """The sections of keys that some of the tiles see: a list of (source, start, stop)."""
    visits = []
    for s in range(len(sources)):
        start = sources[s].kv_len
        stop = 0
        for t in range(first, last):
            run = tiles[t][1][s]
            if run[0] < run[3]:
                start = min(start, run[0])
                stop = max(stop, run[3])
        for a in range(start, stop, sources[s].section):
            visits.append((s, a, min(a + sources[s].section, stop)))
    return visits


def _cut(run: Any, start: int, stop: int) -> Run:
    """The part of a run within [start, stop)."""
    a = max(run[0], start)
    b = min(run[3], stop)
    full_start = min(max(run[1], a), b)
    return Run(a, full_start, max(min(run[2], b), full_start), b)


def _load(item: int, query: Query, source: Source, start: int, stop: int) -> Any:
    """The keys and values [start, stop), for each query head of the group: they differ in the key bias alone."""
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
    run: Run,
    states: Any,
    at: int,
    final: bool,
) -> None:
    """One tile of all heads of the group sees a run of the loaded keys; its states are those from `at` on."""
    rows = min(ROWS, query.q_len)
    # Tiles begin at multiples of 128, but the last, which ends with the rows.
    column = (row + ROWS - 1) // ROWS * 2
    q_tiles = []
    for g in range(query.group):
        head = item * query.group + g
        start = head // query.q_heads * query.q_len + row
        q_t = load_transposed(query.q, start, rows, _column(query.q, head, query.q_heads), query.q_heads)
        q_tiles.append(Rows(q_t, bounds[:, column : column + 1], bounds[:, column + 1 : column + 2]))
    for a in range(run.first, run.stop, query.chunk):
        part = _cut(run, a, min(a + query.chunk, run.stop))
        bias = None
        for g in range(query.group):
            if query.bias is not None and (g == 0 or query.bias.shape[1] > 1):
                bias = _load_bias(item, g, query, row, part)
            state = flash_step(q_tiles[g], loaded[g], part, bias, query.scale, query.softcap, states[at + g])
            if states[at + g] is None and not (final and part.stop == run.stop):
                state = parked(state)
            states[at + g] = state


def _load_bias(item: int, g: int, query: Query, row: int, run: Run) -> Any:
    """SBUF [rows, keys] of a bias that may be the same for all batch elements, heads or keys."""
    batches, heads, q_len, kv_len = query.bias.shape
    rows = min(ROWS, q_len)
    b = min(item // query.kv_heads, batches - 1)
    h = min(item % query.kv_heads * query.group + g, heads - 1)
    width = run.stop - run.first
    tile = nl.ndarray((rows, width), dtype=query.bias.dtype, buffer=nl.sbuf)
    offset = ((b * heads + h) * q_len + row) * kv_len
    if kv_len == 1:
        nisa.dma_copy(dst=tile, src=query.bias.ap([[1, rows], [0, width]], offset=offset))
    else:
        nisa.dma_copy(dst=tile, src=query.bias.ap([[kv_len, rows], [1, width]], offset=offset + run.first))
    return tile


def _store(item: int, g: int, query: Query, row: int, state: Any, sink: Any, mean: Any, out: Any, lse: Any) -> None:
    """Finish a tile of one head. A state of None has seen nothing."""
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
    neg_top = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=acc, value=0.0)
    nisa.memset(dst=neg_top, value=1.0e30)
    nisa.memset(dst=total, value=0.0)
    return State(acc, neg_top, total)
