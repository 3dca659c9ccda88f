"""The NKI kernels of prefill, decoding and prefix caching, and one step of them as a kernel of its own.

`prepare` makes every tensor argument from the operands of the op. The rows of several heads are on one axis of HBM, one
head after the other.
"""

from typing import Any

import nki
import nki.isa as nisa
import nki.language as nl

from neuron_attn_rewrite.kernels.nki.core import KeyRange, Loaded, QueryTile, State, flash_step, parked
from neuron_attn_rewrite.kernels.nki.load import load_transposed, load_values
from neuron_attn_rewrite.kernels.nki.loop import Query, Source, attention


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

    q is [items * group * q_len, head_dim], k [items * kv_len, head_dim], v [items * kv_len, v_dim], all of them in
    bfloat16, float16 or float32. If `q_heads`, `k_heads`, `v_heads` or `out_heads` is not 1, each row of that tensor
    has so many heads side by side. `k_prior` and `v_prior` come before k and v, and have their own bounds.

    tiles: `((start,), key_ranges)` for each query tile: its first row, and the keys that it sees of k and of k_prior,
    each as the numbers of a `core.KeyRange`. pairs: `((start, start), key_ranges)` for each two query tiles, one for
    each of two cores.

    Gives the output [items * group * q_len, v_dim] in the dtype of q. With `with_lse` it also gives the log-sum-exp of
    the scores, [items * group * q_len, 1] in float32.
    """
    kv_len = k.shape[0] * k_heads // items
    sources = [Source(k, v, k_heads, v_heads, kv_len, bounds, key_bias, section)]
    if k_prior is not None:
        prior_len = k_prior.shape[0] // items
        sources.append(Source(k_prior, v_prior, 1, 1, prior_len, bounds_prior, key_bias_prior, section))
    q_len = q.shape[0] * q_heads // (items * group)
    query = Query(q, q_heads, out_heads, group, q_len, kv_heads, bias, sink, scale, softcap, chunk)
    return attention(query, sources, items, tiles, pairs, block, mean_rows, with_lse)


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
    """`flash_fwd` with the tile size of the sliding window kernel of NxD Inference: 128 rows, 2048 or 512 keys.

    Of the `seq_tile_size` keys, a tile takes only those in its window. All other arguments are those of `flash_fwd`.
    """
    assert seq_tile_size == 2048 or seq_tile_size == 512, "seq_tile_size must be 2048 or 512"
    kv_len = k.shape[0] * k_heads // items
    sources = [Source(k, v, k_heads, v_heads, kv_len, bounds, key_bias, section)]
    q_len = q.shape[0] * q_heads // (items * group)
    query = Query(q, q_heads, out_heads, group, q_len, kv_heads, None, sink, scale, softcap, seq_tile_size)
    return attention(query, sources, items, tiles, pairs, block, mean_rows, False)


@nki.jit
def flash_attention_core(
    q: Any,
    k: Any,
    v: Any,
    bounds: Any,
    bias: Any = None,
    acc: Any = None,
    neg_max: Any = None,
    total: Any = None,
    key_range: Any = (),
    scale: float = 1.0,
    softcap: float | None = None,
) -> Any:
    """One step of flash attention: a tile of query rows sees a tile of keys, and the caller keeps the state.

    q is [rows, head_dim] with at most 128 rows, k [keys, head_dim], v [keys, v_dim]. bounds [rows, 2] float32 is the
    interval of these keys that each row sees. bias [rows, keys] is added to the scores. key_range is
    `(first, full_start, full_stop, stop)`, as in `core.KeyRange`. acc [rows, v_dim], neg_max [rows, 1] and total
    [rows, 1], all float32, are the state that the step before gave; the first step has none.

    Gives the new `(acc, neg_max, total)`. The output is acc / total, the log-sum-exp log(total) - neg_max.
    """
    rows = q.shape[0]
    bounds_sb = _copied(bounds)
    tile = QueryTile(load_transposed(q, 0, rows), bounds_sb[:, 0:1], bounds_sb[:, 1:2])
    loaded = Loaded(0, load_transposed(k, 0, k.shape[0]), load_values(v, 0, v.shape[0]), None, None)
    part = KeyRange(key_range[0], key_range[1], key_range[2], key_range[3])
    bias_sb = None
    if bias is not None:
        bias_sb = _copied(bias)[:, part.first : part.stop]
    state = None
    if acc is not None:
        state = State(_copied(acc), _copied(neg_max), _copied(total))
    after = flash_step(tile, loaded, part, bias_sb, scale, softcap, state)
    if state is None:
        after = parked(after)
    new_acc = nl.ndarray(after.acc.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    new_max = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    new_total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=new_acc, src=after.acc)
    nisa.dma_copy(dst=new_max, src=after.neg_max)
    nisa.dma_copy(dst=new_total, src=after.total)
    return new_acc, new_max, new_total


def _copied(source: Any) -> Any:
    """A tensor of HBM as a tile in SBUF."""
    tile = nl.ndarray(source.shape, dtype=source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source)
    return tile
