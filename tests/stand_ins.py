"""Stand-ins for the SDK's kernels: the public signature, the documented shape checks, and the documented meaning in
float32. A wrong layout, a double scaling or a wrong window gives a wrong number or an AssertionError.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

FILL = torch.finfo(torch.float32).min


@dataclass
class Recorded:
    """A kernel that can be launched on a grid, and remembers how it was."""

    func: Callable[..., Any]
    calls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            assert not args, "positions of arguments move between releases"
            self.calls.append((grid, kwargs))
            return self.func(**kwargs)

        return launch

    def __call__(self, **kwargs: Any) -> Any:
        return self[None](**kwargs)


def put(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A module under this name, with its parents."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules or not isinstance(sys.modules[path], types.ModuleType):
            module = types.ModuleType(path)
            module.__spec__ = types.SimpleNamespace(name=path)  # type: ignore[assignment]
            module.__path__ = []  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, path, module)
    for key, value in attributes.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def sizes(layouts: str, *tensors: Tensor | None) -> tuple[int, ...]:
    """The size of each letter, in the order in which they are first met: "G q d, G k d" for two tensors.

    A dim is a letter, a number or a product of letters that are known. What fits no layout is an AssertionError.
    """
    known: dict[str, int] = {}
    for layout, tensor in zip(layouts.split(", "), tensors, strict=True):
        if tensor is not None:
            assert tensor.dim() == len(layout.split()), f"[{layout}] is not {list(tensor.shape)}"
            for name, size in zip(layout.split(), tensor.shape, strict=True):
                if name.isalpha():
                    known.setdefault(name, size)
                factors = (int(factor) if factor.isdigit() else known[factor] for factor in name.split("*"))
                assert math.prod(factors) == size, f"[{layout}] is not {list(tensor.shape)}, where {known}"
    return tuple(known.values())


def softmax_v(scores: Tensor, seen: Tensor, v: Tensor, sink: Tensor | None = None) -> Tensor:
    """scores [.., q, k] with the finite fill of the kernels where not seen."""
    scores = torch.where(seen, scores, FILL)
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, :].expand(-1, scores.shape[1], -1)], -1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return weights[..., : v.shape[-2]] @ v


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
    return _gradients(
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
    return _gradients(*arguments)


def _gradients(q, k, v, o, dy, lse, causal, scale, window, sinks=None):
    layouts = "B H d q, B h d k, B h d k, B H d q, B H d q, B H 128 g, B H"
    batch, heads, d, q_len, kv_heads, kv_len, groups = sizes(layouts, q, k, v, o, dy, lse, sinks)
    assert heads % kv_heads == 0 and q_len == 128 * groups and kv_len % (512 if kv_len >= 512 else 128) == 0
    assert q.dtype == k.dtype == v.dtype == o.dtype == dy.dtype
    assert window <= 0 or causal
    scale = scale or d**-0.5
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    seen = seen & (j <= i) if causal else seen
    seen = seen & (j > i - window) if window > 0 else seen
    query, dy, o = (t.float().mT for t in (q, dy, o))
    k, v = (t.float().repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    lse = lse.mT.reshape(batch, heads, q_len, 1)
    weights = torch.where(seen, (query @ k * scale - lse).exp(), 0)
    mean = (dy * o).sum(-1, keepdim=True)
    by_scores = weights * (dy @ v - mean) * scale

    def summed(grad):
        return grad.reshape(batch, kv_heads, -1, *grad.shape[2:]).sum(2).to(q.dtype)

    grads = (by_scores @ k.mT).mT.to(q.dtype), summed(query.mT @ by_scores), summed(dy.mT @ weights)
    if sinks is None:
        return grads
    return *grads, -((sinks[..., None] - lse[..., 0]).exp() * mean[..., 0]).sum(-1)


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


def install(monkeypatch: pytest.MonkeyPatch, cte: Callable[..., Any] = attention_cte_2_31) -> dict[str, Recorded]:
    """Every stand-in under the SDK's import paths."""
    kernels = {
        "attention_cte": Recorded(cte),
        "attention_segmented_cte": Recorded(attention_segmented_cte),
        "attention_tkg": Recorded(attention_tkg_entry),
        "attention_isa_kernel": Recorded(attention_isa_kernel),
        "neuronxcc_flash_fwd": Recorded(neuronxcc_flash_fwd),
        "sliding_window_flash_fwd": Recorded(sliding_window_flash_fwd),
        "attention_bwd": Recorded(attention_bwd),
        "flash_attn_bwd": Recorded(flash_attn_bwd),
        "flash_paged_attention_with_schedule": Recorded(flash_paged_attention_with_schedule),
    }
    put(monkeypatch, "nki", jit=lambda kernel: kernel)
    put(monkeypatch, "nkilib.core.attention.attention_cte", attention_cte=kernels["attention_cte"])
    place, name = "nkilib.core.attention.attention_segmented_cte", "attention_segmented_cte"
    put(monkeypatch, place, **{name: kernels[name]})
    name = "flash_paged_attention_with_schedule"
    place = "neuronx_distributed_inference.modules.chunked_prefill.flash_pa_with_schedule"
    put(monkeypatch, place, **{name: kernels[name]})
    put(monkeypatch, "nkilib.core.attention.attention_bwd", attention_bwd=kernels["attention_bwd"])
    entry = types.ModuleType("neuron_attn_rewrite.kernels.vendor.tkg_entry")
    entry.attention_tkg_entry = kernels["attention_tkg"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, entry.__name__, entry)
    put(monkeypatch, "torch_neuronx.xla_impl.ops", nki_jit=lambda: lambda kernel: kernel)
    put(monkeypatch, "neuronxcc.nki.language", nc=Cores)
    put(
        monkeypatch,
        "neuronxcc.nki._private_kernels.attention",
        attention_isa_kernel=kernels["attention_isa_kernel"],
    )
    put(
        monkeypatch,
        "neuronxcc.nki.kernels.attention",
        flash_fwd=kernels["neuronxcc_flash_fwd"],
        flash_attn_bwd=kernels["flash_attn_bwd"],
        FlashConfig=FlashConfig,
    )
    put(
        monkeypatch,
        "neuronx_distributed_inference.modules.sliding_window.attention",
        flash_fwd=kernels["sliding_window_flash_fwd"],
        FlashConfig=FlashConfig,
    )
    return kernels


@dataclass(frozen=True)
class Cores:
    """neuronxcc.nki.language.nc: physical cores, as a factor of a grid axis."""

    count: int
    axis: int = 1

    def __mul__(self, axis: int) -> Cores:
        return Cores(self.count, axis)
