"""neuronx-cc and NxD Inference, up to SDK 2.28."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tests.stand_ins.attention import FILL, gradients, sizes, softmax_v


def attention_isa_kernel(q, k, v, scale, out, kernel_name, use_dma_transpose=False):
    """neuronxcc's closed kernel as NxD Inference 2.26 calls it: q, k, out [G, d, S], v [G, S, d]; no grouped heads."""
    _, d, q_len, kv_len = sizes("G d q, G d k, G k d, G d q", q, k, v, out)
    assert d <= 128 and q_len >= 512 and kv_len > d and q_len > d
    causal = {"AttentionMMSoftmaxMMWithoutSwap": False, "CausalAttentionMMSoftmaxMMWithoutSwap": True}[kernel_name]
    assert not causal or q_len == kv_len
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    out.copy_(softmax_v(q.float().mT @ k.float() * scale, seen, v.float()).mT)


@dataclass
class FlashConfig:
    """Of the first `flash_fwd`."""

    seq_tile_size: int = 2048
    attn_core_tile_size: int = 256
    training: bool = True
    should_transpose_v: bool = False
    lse_dtype: str = ""


def neuronxcc_flash_fwd(
    q,
    k,
    v,
    seed,
    logit_bias=None,
    softmax_scale=None,
    use_causal_mask=True,
    sliding_window=-1,
    mixed_precision=True,
    dropout_p=0.0,
    config=None,
):
    """neuronxcc.nki.kernels.attention.flash_fwd: the window counts the token itself."""
    assert seed is None and dropout_p == 0.0
    assert logit_bias is None or sliding_window < 0
    if sliding_window > 0:
        assert use_causal_mask
    return _flash(q, k, v, logit_bias, softmax_scale, use_causal_mask, sliding_window, config)


def sliding_window_flash_fwd(
    q, k, v, softmax_scale=None, use_causal_mask=True, window_size=(-1, -1), mixed_precision=True, config=None
):
    """NxD Inference's: the left window does not count the token itself, and without a window it fails."""
    left, right = window_size
    assert right < 0 and left > 0
    config = replace(config or FlashConfig(), training=False)
    return _flash(q, k, v, None, softmax_scale, True, left + 1, config)


def flash_attn_bwd(
    q_ref,
    k_ref,
    v_ref,
    o_ref,
    dy_ref,
    lse_ref,
    seed_ref,
    logit_bias_ref=None,
    use_causal_mask=False,
    mixed_precision=False,
    dropout_p=0.0,
    softmax_scale=None,
    sliding_window=-1,
    sinks=None,
):
    """neuronxcc.nki.kernels.attention.flash_attn_bwd."""
    assert seed_ref is None and dropout_p == 0.0 and logit_bias_ref is None and sinks is None and mixed_precision
    arguments = q_ref, k_ref, v_ref, o_ref, dy_ref, lse_ref, use_causal_mask, softmax_scale, sliding_window
    return gradients(*arguments)


def flash_paged_attention_with_schedule(
    query,
    key,
    value,
    key_cache,
    value_cache,
    tile_q_indices,
    tile_block_tables,
    tile_masks,
    active_mask,
    softmax_scale=None,
    mixed_precision=True,
):
    """NxD Inference 2.26's: what is not loaded stays as the tile before left it; masked scores are -9984."""
    heads, d, q_len, kv_heads, blocks, block_size, tiles, per_tile, q_tile = sizes(
        "1 H d q, 1 h d q, 1 h q d, N h b d, N h b d, t p, t r b*p, q q",
        query,
        key,
        value,
        key_cache,
        value_cache,
        tile_block_tables,
        tile_masks,
        active_mask,
    )
    kv_tile = per_tile * block_size
    assert d in (16, 32, 64, 128) and q_len & (q_len - 1) == 0
    assert q_len % q_tile == 0 and q_tile % 128 == 0 and kv_tile % 512 == 0 and per_tile & (per_tile - 1) == 0
    assert tile_masks.dtype == active_mask.dtype == tile_block_tables.dtype == torch.int32
    buffers = torch.zeros(2, per_tile, kv_heads, block_size, d)
    run = kv_tile // max(128, per_tile)
    q = query.float().mT[0] * (softmax_scale or d**-0.5)
    row_scores = [[torch.full((heads, q_tile, 1), -2 * 9984.0)] for _ in range(q_len // q_tile)]
    row_values = [[torch.zeros(heads, 1, d)] for _ in row_scores]
    for t in range(tiles):
        for slot, block in enumerate(tile_block_tables[t].tolist()):
            if block < blocks:
                buffers[0, slot], buffers[1, slot] = key_cache[block].float(), value_cache[block].float()
        # [kv heads, keys, d], in the order in which the partitions hold them.
        k, v = (b.transpose(0, 1).reshape(kv_heads, -1, 128, run, d).transpose(2, 3).flatten(1, 3) for b in buffers)
        k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        rows = int(tile_q_indices[t])
        scores = q[:, rows * q_tile : (rows + 1) * q_tile] @ k.mT
        row_scores[rows].append(torch.where(tile_masks[t].bool(), scores, -9984.0))
        row_values[rows].append(v)
    k, v = (x[0].float().repeat_interleave(heads // kv_heads, 0) for x in (key, value))
    active = torch.where(active_mask.bool() & torch.ones(q_len, q_len).tril().bool(), q @ k, -9984.0)
    out = [
        torch.cat([*s, active[:, i * q_tile : (i + 1) * q_tile]], 2).softmax(-1) @ torch.cat([*values, v], 1)
        for i, (s, values) in enumerate(zip(row_scores, row_values, strict=True))
    ]
    return torch.cat(out, 1)[None].to(query.dtype)


def _flash(q, k, v, bias, scale, causal, window, config):
    batch, heads, d, q_len, kv_heads, kv_len = sizes("B H d q, B h d k, B h k d, 1 1 q k", q, k, v, bias)
    assert d <= 128 and heads % kv_heads == 0
    assert config.seq_tile_size >= 512 and kv_len % config.seq_tile_size == 0 and q_len % 128 == 0
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal:
        seen = seen & (j <= i)
    if window > 0:
        seen = seen & (j > i - window)
    k, v = (t.float().repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = q.float().mT @ k * (scale or d**-0.5)
    scores = scores if bias is None else scores + bias
    out = softmax_v(scores, seen, v).to(q.dtype)
    if not config.training:
        return out
    lse = torch.where(seen, scores, FILL).logsumexp(-1)
    return out, lse.reshape(batch, heads, -1, 128).mT.contiguous()
