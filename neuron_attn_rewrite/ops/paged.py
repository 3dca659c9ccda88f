"""`neuron_attn::flash_paged`: the rows of several requests against a cache in blocks and their own new keys.

    query [1, num_heads, q_len, head_dim]: the new tokens of all requests, one request behind the other
    key, value              [1, num_kv_heads, q_len, head_dim | v_head_dim], of the new tokens
    key_cache, value_cache  [blocks, num_kv_heads, block_size, head_dim | v_head_dim]
    tile_q, tile_kv, kv_blocks, tile_bounds, active_bounds: the schedule, see `schedule.Schedule`

A row sees, of each tile of the schedule that is about it, the columns within its bounds, and of the new keys those
within its active bounds, never one behind it. scale, softcap, sink, lnc, the dtypes and the result are those of
`flash_fwd`; a row that sees nothing gives zeros. `kernel_name` is ours or one of `kernels.vendor.PAGED`, and changes no
number. `schedule.make_schedule` makes the schedule from lengths and tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels import cpu, reference, vendor
from neuron_attn_rewrite.kernels.nki import prepare
from neuron_attn_rewrite.kernels.nki.prepare import Launch
from neuron_attn_rewrite.kernels.nki.tiling import ROWS
from neuron_attn_rewrite.kernels.reference import Terms, positive_scale

NAME = "flash_paged"
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor tile_q, Tensor tile_kv, "
    "Tensor kv_blocks, Tensor tile_bounds, Tensor active_bounds, *, float scale, float? softcap=None, "
    'Tensor? sink=None, int lnc=1, str kernel_name="flash_paged") -> Tensor'
)


def check(
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
    kernel_name: str = NAME,
    **others: Any,
) -> None:
    """Raise InputError for arguments beyond those of `flash_fwd` that do not fit."""
    if kernel_name != NAME and kernel_name not in vendor.PAGED:
        raise InputError(
            f"flash_paged: kernel_name must be one of {', '.join((NAME, *vendor.PAGED))}, not {kernel_name!r}."
        )
    q_len = query.shape[2]
    if query.shape[0] != 1:
        raise _error("query", "must have a batch of 1: requests lie one behind the other", query)
    if key.shape[2] != q_len:
        raise _error("key", f"must have query's length {q_len}", key)
    for name, cache, new in (("key_cache", key_cache, key), ("value_cache", value_cache, value)):
        if (
            cache.dim() != 4
            or cache.dtype != new.dtype
            or cache.shape[1] != new.shape[1]
            or cache.shape[3] != new.shape[3]
        ):
            raise _error(name, f"must be [blocks, {new.shape[1]}, block_size, {new.shape[3]}], {new.dtype}", cache)
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise _error("value_cache", f"must have key_cache's blocks, {list(key_cache.shape[:3])}", value_cache)
    for name, tensor, shape in (
        ("tile_q", tile_q, (tile_q.numel(),)),
        ("tile_kv", tile_kv, (tile_q.numel(),)),
        ("kv_blocks", kv_blocks, (*kv_blocks.shape[:1], *kv_blocks.shape[1:2])),
        ("tile_bounds", tile_bounds, (tile_q.numel(), ROWS, 2)),
        ("active_bounds", active_bounds, (q_len, 2)),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
            raise _error(name, f"must be int32 {list(shape)}", tensor)
    keys = kv_blocks.shape[1] * key_cache.shape[2]
    if not tile_q.numel() or keys == 0 or keys % ROWS:
        raise _error("kv_blocks", f"must hold tiles of a multiple of {ROWS} keys, and there must be one", kv_blocks)


def _error(name: str, rule: str, tensor: Tensor) -> InputError:
    return InputError(f"flash_paged: {name} {rule}, but it is {list(tensor.shape)}, {tensor.dtype}.")


def decomposed(query: Tensor, *tensors: Tensor, lnc: int = 1, kernel_name: str = NAME, **options: Any) -> Tensor:
    """All tiles at once, and every row against every key: the plain meaning, without a look at any value."""
    key, value, key_cache, value_cache, tile_q, tile_kv, kv_blocks, tile_bounds, active_bounds = tensors
    q_len, (tiles, columns) = query.shape[2], (len(tile_q), kv_blocks.shape[1] * key_cache.shape[2])
    blocks = kv_blocks.clamp_min(0)[tile_kv]
    keys, values = (c[blocks].permute(2, 0, 1, 3, 4).flatten(1, 3)[None] for c in (key_cache, value_cache))
    i = torch.arange(q_len, device=query.device)
    j = torch.arange(columns, device=query.device)
    bounds = tile_bounds[:, i % ROWS]
    seen = (bounds[:, :, :1] <= j) & (j < bounds[:, :, 1:]) & (tile_q[:, None] == i // ROWS)[:, :, None]
    prior = seen.permute(1, 0, 2).reshape(q_len, tiles * columns)
    new = (active_bounds[:, :1] <= i) & (i < active_bounds[:, 1:]) & (i <= i[:, None])
    terms = _terms(torch.cat([prior, new], 1), **options)
    return reference.attention(query, torch.cat([keys, key], 2), torch.cat([values, value], 2), terms)


def on_cpu(query: Tensor, *tensors: Tensor, lnc: int = 1, kernel_name: str = NAME, **options: Any) -> Tensor:
    """A tile of rows at a time, against the tiles of keys that it meets and the new keys before its end."""
    key, value, key_cache, value_cache, tile_q, tile_kv, kv_blocks, tile_bounds, active_bounds = tensors
    out = query.new_empty(*query.shape[:3], value.shape[3])
    j = torch.arange(kv_blocks.shape[1] * key_cache.shape[2])
    for start in range(0, query.shape[2], ROWS):
        rows = slice(start, min(start + ROWS, query.shape[2]))
        tiles = (tile_q == start // ROWS).nonzero()[:, 0]
        blocks = kv_blocks.clamp_min(0)[tile_kv[tiles]].flatten()
        keys, values = (c[blocks].transpose(0, 1).flatten(1, 2)[None] for c in (key_cache, value_cache))
        lo, hi = tile_bounds[tiles, : rows.stop - start].unbind(2)
        prior = ((lo[:, :, None] <= j) & (j < hi[:, :, None])).permute(1, 0, 2).flatten(1)
        i = torch.arange(rows.stop)
        lo, hi = active_bounds[rows].unbind(1)
        new = (lo[:, None] <= i) & (i < hi[:, None]) & (i <= i[rows, None])
        keys, values = torch.cat([keys, key[:, :, : rows.stop]], 2), torch.cat([values, value[:, :, : rows.stop]], 2)
        out[:, :, rows] = cpu.attention(query[:, :, rows], keys, values, _terms(torch.cat([prior, new], 1), **options))
    return out


def _terms(seen: Tensor, *, scale: float, softcap: float | None = None, sink: Tensor | None = None) -> Terms:
    hidden = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
    return Terms(scale, bias=hidden[None, None], softcap=softcap, sink=sink)


def launch(
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
    *,
    scale: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
    lnc: int = 1,
    kernel_name: str = NAME,
    target: str = "gen3",
) -> Launch:
    """The launch of the op. A row of a cache is one token of one head."""
    if target == "gen2":
        raise InputError("the NKI kernel of flash_paged needs range_select, which gen2 does not have.")
    prepare.refuse(query, value)
    _, heads, q_len, head_dim = query.shape
    blocks, kv_heads, block_size, v_dim = value_cache.shape
    query, scale = positive_scale(query, scale)
    padded = -(-q_len // ROWS) * ROWS
    query, key, value = (pad(t, (0, 0, 0, padded - q_len)) for t in (query, key, value))
    behind = torch.arange(1, q_len + 1, dtype=torch.int32, device=query.device)
    active_bounds = torch.stack([active_bounds[:, 0], torch.minimum(active_bounds[:, 1], behind)], 1)
    active_bounds = pad(active_bounds, (0, 0, 0, padded - q_len))
    p = torch.arange(ROWS, dtype=torch.int32, device=query.device)
    head = torch.arange(heads, dtype=torch.int32, device=query.device)
    q_rows = head[:, None, None] * padded + p[:, None] + tile_q * ROWS
    # Out of range where there is no block, or where the keys are those of the tile before.
    repeated = torch.cat([tile_kv.new_zeros(1, dtype=torch.bool), tile_kv[1:] == tile_kv[:-1]])
    there = kv_blocks[tile_kv].masked_fill(repeated[:, None], -1)[:, :, None]
    offset = torch.arange(block_size, dtype=torch.int32, device=query.device)
    kv_rows = ((there * kv_heads + head[:kv_heads, None, None, None]) * block_size + offset).masked_fill(
        there < 0, blocks * kv_heads * block_size
    )
    kv_rows = kv_rows.reshape(kv_heads, len(tile_q), -1, ROWS).transpose(2, 3)
    section = prepare.section(query, value)
    tensors = {
        "q": query.reshape(-1, head_dim),
        "k": key.reshape(-1, head_dim),
        "v": value.reshape(-1, v_dim),
        "k_cache": key_cache.reshape(-1, head_dim),
        "v_cache": value_cache.reshape(-1, v_dim),
        "q_rows": q_rows,
        "kv_rows": kv_rows.to(torch.int32),
        "tile_bounds": tile_bounds.transpose(0, 1).flatten(1).float(),
        "active_bounds": active_bounds.view(-1, ROWS, 2).transpose(0, 1).flatten(1).float(),
    }
    if sink is not None:
        tensors["sink"] = sink.float()[:, None].expand(heads, ROWS)
    return Launch(
        module="neuron_attn_rewrite.kernels.nki.paged",
        kernel="flash_paged",
        tensors={name: tensor.contiguous() for name, tensor in tensors.items()},
        static={
            "group": heads // kv_heads,
            "kv_heads": kv_heads,
            "scale": scale,
            "softcap": softcap,
            "section": section,
        },
        lnc=lnc,
        finish=lambda out: out.reshape(1, heads, padded, v_dim)[:, :, :q_len],
    )
