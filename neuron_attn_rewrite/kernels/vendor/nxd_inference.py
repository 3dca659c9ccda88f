"""NxD Inference: its own kernels, for causal windows (2.26 to 2.28) and for a cache in blocks (2.24 to 2.27).

Sources: modules/sliding_window/attention.py; modules/chunked_prefill/flash_pa_with_schedule.py and scheduler.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels.orders import Accepted
from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.kernels.vendor.adapter import Adapter, How, flash_config, own_grid
from neuron_attn_rewrite.kernels.vendor.layouts import mask_in, padded, repeated, scaled


def _sliding_window(adapter: Adapter, query: Tensor, key: Tensor, value: Tensor, terms: Terms, how: How) -> Tensor:
    """As the first `flash_fwd`, but its left window does not count the token itself, and heads are repeated."""
    batch, heads, _, q_len = query.shape
    kv_len = key.shape[3]
    window = mask_in(terms, q_len, kv_len).window
    assert window is not None
    key, value = repeated(key, heads), repeated(value, heads)
    out: Tensor = adapter.kernel[batch, heads](
        q=query.contiguous(),
        k=key.contiguous(),
        v=value.contiguous(),
        softmax_scale=terms.scale,
        use_causal_mask=True,
        window_size=(window - 1, -1),
        mixed_precision=True,
        config=flash_config(adapter, kv_len),
    )
    return out


SLIDING_WINDOW = Adapter(
    name="sliding_window_flash_fwd",
    places=("neuronx_distributed_inference.modules.sliding_window.attention:flash_fwd",),
    needs="q k v softmax_scale use_causal_mask window_size mixed_precision config",
    launch=own_grid,
    run=_sliding_window,
    accepts=Accepted(("BHDS",), ("BHDS",)),
)


PARTITIONS = 128
SKIPPED = 1000
"""Times the number of blocks: a block number so far out of range that its load is left out."""


def _paged(
    adapter: Adapter,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tile_q: Tensor,
    tile_kv: Tensor,
    kv_blocks: Tensor,
    tile_bounds: Tensor,
    active_bounds: Tensor,
    terms: Terms,
    lnc: int,
) -> Tensor:
    """query and key as [1, heads, dim, length], value as [1, heads, length, dim]; bounds written out as 0 and 1.

    Raises:
        InputError: the kernel can't compute this.
    """
    q_len, dim = query.shape[2:]
    blocks, kv_heads, block_size, v_dim = value_cache.shape
    per_tile = kv_blocks.shape[1]
    keys = per_tile * block_size
    for demand, holds in (
        (
            f"head_dim {dim} must be v_head_dim {v_dim}, and 16, 32, 64 or 128",
            dim == v_dim and dim in (16, 32, 64, 128),
        ),
        (f"{keys} keys in a tile must be a multiple of 512", keys % 512 == 0),
        (f"{per_tile} blocks in a tile must be a power of 2", per_tile & (per_tile - 1) == 0),
        ("it has no softcap and takes no sink", terms.softcap is None and terms.sink is None),
    ):
        if not holds:
            raise InputError(f"flash_paged_attention_with_schedule: {demand}.")
    rows = max(PARTITIONS, 1 << (q_len - 1).bit_length())
    j = torch.arange(keys, device=query.device)
    seen = (tile_bounds[..., :1] <= j) & (j < tile_bounds[..., 1:])
    # Keys lie on 128 partitions, each with a run of them; the kernel's columns go over the partitions first.
    run = keys // max(PARTITIONS, per_tile)
    masks = seen.reshape(*seen.shape[:2], -1, PARTITIONS, run).transpose(3, 4).flatten(2)
    i = torch.arange(rows, device=query.device)
    first, end = padded(active_bounds, 0, rows).unbind(1)
    active = (first[:, None] <= i) & (i < end[:, None]) & (i <= i[:, None])
    # Nothing is loaded where there is no block, or where the keys are those of the tile before.
    again = torch.cat([tile_kv.new_zeros(1, dtype=torch.bool), tile_kv[1:] == tile_kv[:-1]])
    table = kv_blocks[tile_kv]
    out: Tensor = adapter.kernel[1, kv_heads](
        query=padded(scaled(query, terms.scale), 2, rows).mT.contiguous(),
        key=padded(key, 2, rows).mT.contiguous(),
        value=padded(value, 2, rows).contiguous(),
        key_cache=key_cache.contiguous(),
        value_cache=value_cache.contiguous(),
        tile_q_indices=tile_q,
        tile_block_tables=table.masked_fill((table < 0) | again[:, None], blocks * SKIPPED),
        tile_masks=masks.to(torch.int32),
        active_mask=active.to(torch.int32),
        softmax_scale=1.0,
        mixed_precision=True,
    )
    # A row that sees nothing gives zeros; the kernel gives it some mean.
    some = torch.zeros(rows // PARTITIONS, PARTITIONS, dtype=torch.int32, device=query.device)
    some = some.index_add(0, tile_q.long(), seen.any(2).to(torch.int32)).flatten() + active.any(1)
    return out.where(some[:, None] > 0, 0)[:, :, :q_len].contiguous()


FLASH_PAGED = Adapter(
    name="flash_paged_attention_with_schedule",
    places=(
        "neuronx_distributed_inference.modules.chunked_prefill.flash_pa_with_schedule:"
        "flash_paged_attention_with_schedule",
    ),
    needs=(
        "query key value key_cache value_cache tile_q_indices tile_block_tables tile_masks active_mask softmax_scale "
        "mixed_precision"
    ),
    launch=own_grid,
    run=_paged,
)
