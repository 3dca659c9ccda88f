"""nkilib, SDK 2.28 and later: open kernels, launched by `nki.jit(kernel)[lnc]`.

Sources: nki-library `nkilib/core/attention/attention_cte.py`, `attention_segmented_cte.py`, `attention_tkg.py` and
`attention_bwd.py`; SDK documentation nki/library/api/attention-cte, attention-segmented-cte and attention-tkg.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.kernels.orders import AS_GIVEN, PLAIN, Accepted, turned
from neuron_attn_rewrite.kernels.reference import Terms, visible
from neuron_attn_rewrite.kernels.vendor.adapter import Adapter, How, TwoSources, nki_jit
from neuron_attn_rewrite.kernels.vendor.layouts import (
    Mask,
    column,
    folded,
    mask_in,
    multiple,
    padded,
    row_bounds,
    scaled,
)

STRIDED = FlashAttentionStrategy.STRIDED_CONTEXT_PARALLEL_KERNEL.name
QUERY_GROUP = 128
"""Bounds and bias come in groups of this many query rows."""
KEY_TILE = 128
"""Each core of attention_tkg takes a multiple of this many keys."""
BLOCK = 128
"""Keys in a block of attention_segmented_cte. Lengths that it takes must be multiples of this."""
SEGMENTS = (8192, 4096, 2048, 1024, 512)
"""How many earlier keys attention_segmented_cte can be built to take at a time."""
PASS = 1024
"""The fixed time of a segment, by the cost model, as a number of keys that take as long."""
HIDDEN = -1e30
"""What a hidden key adds to a score: far below any score, and finite in bfloat16 (not in float16)."""
MOST_HIDDEN = -3e38
"""The lowest bias that the kernel may add. The kernel itself hides keys with the lowest float32."""


def _attention_cte(adapter: Adapter, query: Tensor, key: Tensor, value: Tensor, terms: Terms, how: How) -> Tensor:
    """query, key and output are [batch * heads, length, dim], or [batch * heads, dim, length] by the kernel's flags.

    Grouped heads are not repeated. The scale is folded into the query.
    """
    orders = how.orders
    query, key, value = orders.to(AS_GIVEN, query, key, value)
    batch, heads, q_len, _ = query.shape
    kv_len, v_dim = value.shape[2:]
    mask = mask_in(terms, q_len, kv_len)
    query = scaled(query, terms.scale)
    if terms.key_padding is not None:
        # Key padding as one more feature: 1 in the query, a huge negative number in the keys that are hidden.
        hidden = torch.where(terms.key_padding, 0.0, HIDDEN).to(key.dtype)
        query = torch.cat([query, torch.ones_like(query[..., :1])], -1)
        key = torch.cat([key, hidden[:, None, :, None].expand(*key.shape[:3], 1)], -1)
    dim = max(query.shape[3], v_dim)
    query, key, value = (padded(t, -1, dim) for t in (query, key, value))
    arguments: dict[str, Any] = {
        "scale": 1.0,
        "causal_mask": mask.kind in ("causal", "prior"),
        "tp_q": orders.query == PLAIN,
        "tp_k": orders.key == PLAIN,
        "tp_out": orders.result != PLAIN,
        "sliding_window": mask.window,
        "sink": column(terms.sink, batch),
    }
    strided = how.strategy == STRIDED and terms.bias is None
    if strided:
        arguments |= _of_a_rank(terms, q_len, kv_len)
    elif mask.kind == "rows" or terms.bias is not None:
        query = padded(query, 2, multiple(q_len, QUERY_GROUP))
    rows = query.shape[2]
    if mask.kind == "rows" and not strided:
        arguments |= _bounds(adapter, row_bounds(terms, q_len, kv_len, query.device), batch, heads, q_len, rows)
    if mask.kind == "prior":
        used = torch.full((1,), mask.offset, dtype=torch.int32, device=query.device)
        k_prior = turned(key[:, :, : mask.offset], PLAIN, orders.key)
        arguments |= {
            "k_prior": folded(k_prior).contiguous(),
            "v_prior": folded(value[:, :, : mask.offset]),
            "prior_used_len": used,
        }
        # No row sees the keys after the end of the band.
        key, value = (t[:, :, mask.offset : mask.offset + q_len] for t in (key, value))
    if terms.bias is not None:
        # The kernel computes scale * (q k^T + bias), and its scale is 1 here.
        full = terms.bias.to(torch.float32).clamp_min(MOST_HIDDEN).expand(batch, heads, q_len, kv_len)
        arguments["position_bias"] = folded(padded(full, 2, rows))
    query, key, value = AS_GIVEN.to(orders, query, key, value)
    tensors = {"q": folded(query).contiguous(), "k": folded(key).contiguous(), "v": folded(value)}
    out: Tensor = adapter(how.lnc, **tensors, **arguments)
    out = turned(out.reshape(batch, heads, *out.shape[1:]), orders.result, PLAIN)
    return turned(out[:, :, :q_len, :v_dim], PLAIN, orders.result)


def _cte_behind(adapter: Adapter, sources: TwoSources, lnc: int) -> Tensor:
    """As `_attention_cte`, with the cache as it lies. One length is for all batch elements."""
    batch, heads, q_len, _ = sources.query.shape
    v_dim = sources.value.shape[3]
    given = (
        scaled(sources.query, sources.terms.scale),
        sources.key,
        sources.value,
        sources.key_prior,
        sources.value_prior,
    )
    query, key, value, k_prior, v_prior = (
        folded(padded(t, -1, max(sources.query.shape[3], v_dim))).contiguous() for t in given
    )
    out: Tensor = adapter(
        lnc,
        q=query,
        k=key,
        v=value,
        scale=1.0,
        causal_mask=True,
        k_prior=k_prior,
        v_prior=v_prior,
        prior_used_len=sources.lengths.to(torch.int32),
        sink=column(sources.terms.sink, batch),
        sliding_window=sources.window,
        tp_q=True,
        tp_k=True,
        tp_out=False,
    )
    return out.reshape(batch, heads, q_len, -1)[..., :v_dim]


def segment(mask: Mask) -> int:
    """The size of segments that costs least. The kernel computes all keys of the last segment, also unused ones.

    A window is loaded without segments. But its blocks must fit into one segment, and the block table is padded to it.
    """
    if mask.window:
        return SEGMENTS[0]
    return min(SEGMENTS, key=lambda size: multiple(mask.offset, size) * (1 + PASS / size))


def _attention_segmented_cte(
    adapter: Adapter, query: Tensor, key: Tensor, value: Tensor, terms: Terms, how: How
) -> Tensor:
    """A kv head of a batch element is one request. Its keys are the blocks of a cache, without a copy.

    The new keys are the last of them. query and output are [requests * group, length, dim]. If the result is in the
    order BHDS, the output is [requests * group, dim, length].
    """
    batch, heads, q_len, dim = query.shape
    mask = mask_in(terms, q_len, key.shape[2])
    # No row sees the keys after the last row's own key.
    k_cache, v_cache = (t[:, :, : mask.offset + q_len].reshape(-1, 1, BLOCK, dim) for t in (key, value))
    requests = batch * key.shape[1]
    out: Tensor = adapter(
        how.lnc,
        q=folded(scaled(query, terms.scale)).contiguous(),
        k_cache=k_cache.contiguous(),
        v_cache=v_cache.contiguous(),
        block_tables=torch.arange(len(k_cache), dtype=torch.int32, device=key.device).reshape(requests, -1),
        prior_tokens=torch.full((1, 1), mask.offset, dtype=torch.int32, device=key.device),
        block_size=BLOCK,
        prior_seg_size=segment(mask),
        scale=1.0,
        tp_q=True,
        tp_out=how.orders.result != PLAIN,
        sliding_window=mask.window,
        sink=column(terms.sink, batch),
        num_q_heads=heads // key.shape[1],
    )
    return out.reshape(batch, heads, *out.shape[1:])


def _of_a_rank(terms: Terms, q_len: int, kv_len: int) -> dict[str, Any]:
    """The arguments for a rank with every `global_cp_deg`-th row of causal attention. Unlike bounds, they skip tiles.

    This strategy is only chosen if the bounds are proven to be these. So the first row gives the rank.
    """
    assert terms.bounds is not None
    return {
        "causal_mask": True,
        "global_cp_deg": kv_len // q_len,
        "cp_strided_q_slicing": True,
        "cp_offset": (terms.bounds[:1, :1, 1] - 1).to(torch.int32),
    }


def _bounds(
    adapter: Adapter, bounds: tuple[Tensor, Tensor], batch: int, heads: int, q_len: int, rows: int
) -> dict[str, Any]:
    """float32 [rows, 1], one for all heads; [batch * heads, rows, 1] where the kernel takes a bias too (2.31)."""
    # A row that was only added sees the first key, so that it is a number.
    first, end = (padded(b, 1, rows, fill=fill).float() for b, fill in zip(bounds, (0, 1), strict=True))
    if "position_bias" in adapter.parameters:
        first, end = (b[:, None].expand(-1, heads, -1).expand(batch, -1, -1).reshape(-1, rows, 1) for b in (first, end))
    else:
        first, end = first[0, :, None], end[0, :, None]
    return {"bound_min": first.contiguous(), "bound_max": end.contiguous()}


def _attention_tkg(adapter: Adapter, query: Tensor, key: Tensor, value: Tensor, terms: Terms, how: How) -> Tensor:
    """The last keys are the active ones. The result is [batch, heads, dim, rows]."""
    rows, kv_len = query.shape[2], key.shape[2]
    active, earlier = slice(kv_len - rows, kv_len), slice(0, kv_len - rows)
    (new_key, k_prior), (new_value, v_prior) = ((t[:, :, active], t[:, :, earlier]) for t in (key, value))
    return _tkg(adapter, query, new_key, new_value, k_prior, v_prior, terms, how.lnc)


def _tkg_behind(adapter: Adapter, s: TwoSources, lnc: int) -> Tensor:
    return _tkg(adapter, s.query, s.key, s.value, s.key_prior, s.value_prior, s.terms, lnc).mT


def _tkg(
    adapter: Adapter,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_prior: Tensor,
    v_prior: Tensor,
    terms: Terms,
    lnc: int,
) -> Tensor:
    """The query heads of a kv head as one batch element, and any mask as 0 and 1."""
    batch, heads, rows, dim = query.shape
    kv_heads, earlier = k_prior.shape[1:3]
    items, group, kv_len = batch * kv_heads, heads // kv_heads, earlier + rows
    keys = multiple(kv_len, KEY_TILE * lnc)
    query = scaled(query, terms.scale).reshape(items, group, rows, dim)
    seen = visible(terms, rows, kv_len, query.device).expand(batch, kv_heads, rows, kv_len)
    # What pads the keys comes before the active ones, which are the last.
    hidden = padded(seen[..., :earlier].to(torch.uint8), -1, keys - rows)
    mask = torch.cat([hidden, seen[..., earlier:].to(torch.uint8)], -1).reshape(items, 1, rows, keys)
    out: Tensor = adapter(
        lnc,
        q=query.permute(3, 0, 1, 2).reshape(dim, -1).contiguous(),
        k_active=folded(key).permute(2, 0, 1).reshape(dim, -1).contiguous(),
        v_active=folded(value)[:, None].contiguous(),
        k_prior=padded(folded(k_prior), 1, keys)[:, None].contiguous(),
        v_prior=padded(folded(v_prior), 1, keys)[:, None].contiguous(),
        mask=mask.expand(items, group, rows, keys).permute(3, 0, 1, 2).contiguous(),
        sink=column(terms.sink, 1),
    )
    return out.reshape(batch, heads, dim, rows)


def _attention_bwd(
    adapter: Adapter, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, terms: Terms, lnc: int
) -> tuple[Tensor, ...]:
    """Everything as [batch, heads, dim, length]; output and softmax statistics come from attention_cte once more."""
    batch, heads, q_len, dim = query.shape
    mask = mask_in(terms, q_len, key.shape[2])
    # Both kernels see the query scaled, and rounded, alike: the weights then sum to 1.
    query = scaled(query, terms.scale)
    assert adapter.forward is not None
    out, negated_top, reciprocal = adapter.forward(
        lnc,
        q=folded(query),
        k=folded(key),
        v=folded(value),
        scale=1.0,
        causal_mask=mask.kind == "causal",
        sliding_window=mask.window,
        sink=column(terms.sink, batch),
        tp_q=True,
        tp_k=True,
        tp_out=True,
        cache_softmax=True,
    )
    by_query, by_key, by_value, *by_sink = adapter(
        lnc if batch * key.shape[1] % lnc == 0 else 1,
        q_ref=query.mT.contiguous(),
        k_ref=key.mT.contiguous(),
        v_ref=value.mT.contiguous(),
        o_ref=out.reshape(batch, heads, dim, q_len),
        dy_ref=grad.mT.contiguous(),
        lse_ref=-(negated_top + reciprocal.log()).reshape(batch, heads, QUERY_GROUP, -1),
        sinks_ref=None if terms.sink is None else terms.sink.float().repeat(batch, 1),
        use_causal_mask=mask.kind == "causal",
        mixed_precision=True,
        softmax_scale=1.0,
        sliding_window=mask.window,
    )
    none = query.new_empty(0)
    return scaled(by_query.mT, terms.scale), by_key.mT, by_value.mT, none, by_sink[0].sum(0) if by_sink else none


ATTENTION_CTE = Adapter(
    name="attention_cte",
    places=(
        "nkilib.core.attention.attention_cte:attention_cte",
        "nkilib_standalone.nkilib.core.attention.attention_cte:attention_cte",
    ),
    needs="q k v scale causal_mask k_prior v_prior prior_used_len sink sliding_window tp_q tp_k tp_out",
    launch=nki_jit,
    run=_attention_cte,
    behind=_cte_behind,
    accepts=Accepted((PLAIN, "BHDS"), (PLAIN, "BHDS"), (PLAIN,), (PLAIN, "BHDS")),
)
ATTENTION_SEGMENTED_CTE = Adapter(
    name="attention_segmented_cte",
    places=("nkilib.core.attention.attention_segmented_cte:attention_segmented_cte",),
    # Releases up to 2.30, without fp8_packed, read uninitialised memory and use the sink of the first head for all.
    needs=(
        "q k_cache v_cache block_tables prior_tokens block_size prior_seg_size scale tp_q tp_out sliding_window sink "
        "num_q_heads fp8_packed"
    ),
    launch=nki_jit,
    run=_attention_segmented_cte,
    accepts=Accepted(result=(PLAIN, "BHDS")),
)
ATTENTION_TKG = Adapter(
    name="attention_tkg",
    places=("neuron_attn_rewrite.kernels.vendor.tkg_entry:attention_tkg_entry",),
    needs="q k_active v_active k_prior v_prior mask sink",
    launch=nki_jit,
    run=_attention_tkg,
    behind=_tkg_behind,
    accepts=Accepted(result=("BHDS",)),
)
ATTENTION_BWD = Adapter(
    name="attention_bwd",
    places=("nkilib.core.attention.attention_bwd:attention_bwd",),
    needs=(
        "q_ref k_ref v_ref o_ref dy_ref lse_ref sinks_ref use_causal_mask mixed_precision softmax_scale sliding_window"
    ),
    launch=nki_jit,
    run=_attention_bwd,
    forward=replace(ATTENTION_CTE, needs=ATTENTION_CTE.needs + " cache_softmax"),
)
