"""nkilib, SDK 2.27 and later."""

from __future__ import annotations

import torch

from tests.stand_ins.attention import FILL, gradients, sizes, softmax_v


def attention_cte_2_29(
    q,
    k,
    v,
    scale=1.0,
    causal_mask=True,
    k_prior=None,
    v_prior=None,
    prior_used_len=None,
    sink=None,
    sliding_window=None,
    tp_q=True,
    tp_k=False,
    tp_out=False,
    cache_softmax=False,
    softmax_dtype=torch.float32,
    mm_out_dtype=torch.float32,
    cp_offset=None,
    global_cp_deg=None,
    cp_strided_q_slicing=False,
    bound_min=None,
    bound_max=None,
):
    """nkilib 2.29, attention_cte.py: one core's worth of it, all folded heads at once."""
    return _cte(**locals(), position_bias=None)


def attention_cte_2_31(
    q,
    k,
    v,
    scale=1.0,
    causal_mask=True,
    k_prior=None,
    v_prior=None,
    prior_used_len=None,
    sink=None,
    sliding_window=None,
    tp_q=True,
    tp_k=False,
    tp_out=False,
    cache_softmax=False,
    softmax_dtype=torch.float32,
    mm_out_dtype=torch.float32,
    cp_offset=None,
    global_cp_deg=None,
    cp_strided_q_slicing=False,
    bound_min=None,
    bound_max=None,
    cp_striped_input=False,
    skip_output_normalization=False,
    position_bias=None,
    bias_layout="dense",
    bias_band_params=None,
):
    """nkilib 2.31: bounds for each folded head, and a bias."""
    arguments = dict(locals())
    for name in ("cp_striped_input", "skip_output_normalization", "bias_layout", "bias_band_params"):
        arguments.pop(name)
    return _cte(**arguments, per_head_bounds=True)


def _cte(
    q,
    k,
    v,
    scale,
    causal_mask,
    k_prior,
    v_prior,
    prior_used_len,
    sink,
    sliding_window,
    tp_q,
    tp_k,
    tp_out,
    cache_softmax,
    softmax_dtype,
    mm_out_dtype,
    cp_offset,
    global_cp_deg,
    cp_strided_q_slicing,
    bound_min,
    bound_max,
    position_bias,
    per_head_bounds=False,
):
    dtype = q.dtype
    q, k, k_prior = (t if t is None or plain else t.mT for t, plain in ((q, tp_q), (k, tp_k), (k_prior, tp_k)))
    layouts = "G q d, H k d, H k d, G 1, G q k, H p d, H p d"
    groups, q_len, d, kv_groups, kv_len, *prior_len = sizes(layouts, q, k, v, sink, position_bias, k_prior, v_prior)
    assert 0 < groups <= 512 and 0 < d <= 128 and groups % kv_groups == 0
    assert (k_prior is None) == (v_prior is None) == (prior_used_len is None)
    assert (bound_min is None) == (bound_max is None)
    if sliding_window or k_prior is not None or global_cp_deg or bound_min is not None:
        assert scale == 1.0
    assert causal_mask or not (sliding_window or global_cp_deg)
    assert not (bound_min is not None and (k_prior is not None or global_cp_deg))
    q, k, v = q.float(), k.float(), v.float()
    i = torch.arange(q_len)[:, None]
    j = torch.arange(kv_len)[None]
    offset = 0
    if global_cp_deg:
        assert cp_offset.shape == (1, 1) and 1 <= global_cp_deg <= 32
        i = i * (global_cp_deg if cp_strided_q_slicing else 1) + cp_offset
    active = j <= i if causal_mask else torch.ones(q_len, kv_len, dtype=torch.bool)
    if k_prior is not None:
        assert prior_used_len.shape == (1,)
        offset = int(prior_used_len)
        k = torch.cat([k_prior.float(), k], 1)
        v = torch.cat([v_prior.float(), v], 1)
        prior = torch.arange(*prior_len)[None].expand(q_len, -1)
        active = torch.cat([prior < offset, active], 1)
        j = torch.cat([torch.arange(*prior_len), torch.arange(kv_len) + offset])[None]
    if sliding_window:
        active = active & (j > i + offset - sliding_window)
    seen = active[None]
    if bound_min is not None:
        sizes("G q d, G q 1, G q 1" if per_head_bounds else "G q d, q 1, q 1", q, bound_min, bound_max)
        assert q_len % 128 == 0
        lo, hi = (b if per_head_bounds else b[None] for b in (bound_min, bound_max))
        # With causal_mask the upper side is min(row, bound_max), inclusive.
        upper = (j <= hi) & (j <= i) if causal_mask else j < hi
        seen = seen & (j >= lo) & upper
    k, v = (t.repeat_interleave(groups // kv_groups, 0) for t in (k, v))
    scores = q @ k.mT
    if position_bias is not None:
        assert q_len % 128 == 0 and k_prior is None
        scores = scores + position_bias.float()
    assert sink is None or sink.dtype == torch.float32
    out = softmax_v(scores * scale, seen, v, sink).to(dtype)
    out = out.mT.contiguous() if tp_out else out
    if not cache_softmax:
        return out
    assert q_len % 128 == 0
    scores = torch.where(seen, scores * scale, FILL)
    scores = scores if sink is None else torch.cat([scores, sink[:, None].expand(-1, q_len, 1)], -1)
    top = scores.amax(-1)
    total = (scores - top[..., None]).exp().sum(-1)
    # Row i lies at [i % 128, i // 128].
    by_partition = [t.reshape(groups, -1, 128).mT.contiguous() for t in (-top, 1 / total)]
    return out, *by_partition


def attention_segmented_cte(
    q,
    k_cache,
    v_cache,
    block_tables,
    prior_tokens,
    block_size,
    prior_seg_size,
    scale=1.0,
    tp_q=True,
    tp_out=False,
    sliding_window=None,
    sink=None,
    num_q_heads=1,
    k_pre_transposed=False,
    fp8_packed=False,
    k_scale=None,
    v_scale=None,
    kvp_q_offset=None,
    kvp_rank_id=None,
    kvp_group_size=0,
    kvp_cp_offset_int=0,
    kvp_seg_block_offset_int=0,
    kvp_prior_load_blocks=0,
    kvp_prior_fully_visible=False,
):
    """nkilib 2.31 and 2.32: the new keys are the blocks behind the prior ones, and one prior length is for all.

    What lies behind them, in the table or because it is padded to one segment more than whole ones, is never seen.
    """
    dtype = q.dtype
    groups, q_len, d, blocks, kv_heads, size, requests, width = sizes(
        "G q d, N H b d, N H b d, B w, 1 1, G 1",
        q if tp_q else q.mT,
        k_cache,
        v_cache,
        block_tables,
        prior_tokens,
        sink,
    )
    prior = int(prior_tokens)
    assert not (k_pre_transposed or fp8_packed) and k_scale is v_scale is kvp_q_offset is kvp_rank_id is None
    assert size == block_size and d <= 128 and block_tables.dtype == prior_tokens.dtype == torch.int32
    assert groups == requests * num_q_heads and num_q_heads % kv_heads == 0 and requests <= 128
    assert sink is None or sink.dtype == torch.float32
    assert q_len % 128 == q_len % block_size == prior_seg_size % block_size == prior % block_size == 0
    assert block_size & (block_size - 1) == 0 and 512 % block_size == 0 and prior_seg_size % 512 == 0
    assert width * block_size >= prior + q_len and scale == 1.0
    if sliding_window:
        loaded, padded = max(sliding_window, 512) // block_size, width * block_size // prior_seg_size + 1
        assert sliding_window % block_size == 0 and loaded <= padded * (prior_seg_size // block_size)
    table = block_tables[:, : (prior + q_len) // block_size].long()
    assert int(table.min()) >= 0 and int(table.max()) < blocks
    # [requests * num_q_heads, keys, d], each with its kv head.
    heads = torch.arange(num_q_heads) * kv_heads // num_q_heads
    k, v = (c.float()[table].transpose(1, 2).flatten(2, 3)[:, heads].flatten(0, 1) for c in (k_cache, v_cache))
    i, j = prior + torch.arange(q_len)[:, None], torch.arange(prior + q_len)
    seen = (j <= i) & (j > i - (sliding_window or prior + q_len + 1))
    out = softmax_v((q if tp_q else q.mT).float() @ k.mT, seen, v, sink).to(dtype)
    return out.mT.contiguous() if tp_out else out


def attention_tkg_entry(q, k_active, v_active, k_prior, v_prior, mask, sink=None):
    """Our entry to nkilib's attention_tkg, which scales nothing and takes the active keys for the last of the prior."""
    keys, batch, heads, rows, d = sizes(
        "k B H q, d B*H*q, d B*q, B 1 q d, B 1 k d, B 1 k d, H 1", mask, q, k_active, v_active, k_prior, v_prior, sink
    )
    assert d <= 128 and keys % 128 == 0 and mask.dtype == torch.uint8
    query = q.float().reshape(d, batch, heads, rows).permute(1, 2, 3, 0)
    key, value = k_prior[:, 0].float().clone(), v_prior[:, 0].float().clone()
    key[:, keys - rows :] = k_active.float().reshape(d, batch, rows).permute(1, 2, 0)
    value[:, keys - rows :] = v_active[:, 0].float()
    scores = (query @ key[:, None].mT).reshape(batch * heads, rows, keys)
    seen = mask.bool().permute(1, 2, 3, 0).reshape(batch * heads, rows, keys)
    column = None if sink is None else sink.repeat(batch, 1)
    out = softmax_v(scores, seen, value.repeat_interleave(heads, 0), column)
    return out.reshape(batch, heads, rows, d).mT.to(q.dtype)


def attention_bwd(
    q_ref,
    k_ref,
    v_ref,
    o_ref,
    dy_ref,
    lse_ref,
    sinks_ref=None,
    bound_min=None,
    bound_max=None,
    use_causal_mask=False,
    mixed_precision=False,
    softmax_scale=None,
    sliding_window=None,
):
    """nkilib 2.29, attention_bwd.py. Weights come from the log-sum-exp, their mean gradient from the output."""
    assert not use_causal_mask or q_ref.shape[3] == k_ref.shape[3]
    assert bound_min is None and bound_max is None and mixed_precision
    return gradients(
        q_ref,
        k_ref,
        v_ref,
        o_ref,
        dy_ref,
        lse_ref,
        use_causal_mask,
        softmax_scale,
        sliding_window or 0,
        sinks_ref,
    )
