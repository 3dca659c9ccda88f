"""The schedule of paged attention: which tile of query rows is computed with which tile of cached keys.

The rows of all requests are one axis, and the blocks of their caches are another. Tiles of 128 rows and `kv_tile` keys
cover the plane. Tiles in which no row sees a key are skipped. The others are sorted by their keys, so that each tile of
keys is loaded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from operator import index
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels.nki.tiling import ROWS

MOST = 2**31 - 1
"""The largest number in a schedule, whose tensors are int32."""
KV_TILE = 512
"""Keys of a tile, at least, if nothing else is asked for."""
NO_BLOCK = -1
"""The block number of a place in a tile of keys that has no block."""


@dataclass(frozen=True)
class Schedule:
    """What `neuron_attn::flash_paged` takes besides its tensors, all int32."""

    tile_q: Tensor
    """[tiles]: tile t has the query rows `128 * tile_q[t]` to `128 * tile_q[t] + 127`."""
    tile_kv: Tensor
    """[tiles]: tile t has the keys of the blocks `kv_blocks[tile_kv[t]]`."""
    kv_blocks: Tensor
    """[kv_tiles, kv_tile / block_size]: numbers of blocks in the cache, -1 for none."""
    tile_bounds: Tensor
    """[tiles, 128, 2]: the columns [lo, hi) of the tile that each row sees."""
    active_bounds: Tensor
    """[q_len, 2]: the new keys [lo, hi) that each row sees. The last one is its own key."""

    @property
    def loads(self) -> int:
        """Tiles of keys that are loaded."""
        return int((self.tile_kv[1:] != self.tile_kv[:-1]).sum()) + int(len(self.tile_kv) > 0)


def kv_tile_of(block_size: int) -> int:
    """The keys of a tile for blocks of this size: at least `KV_TILE`, a multiple of 128 and of the size."""
    unit = lcm(ROWS, block_size)
    return -(-KV_TILE // unit) * unit


def make_schedule(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    *,
    kv_tile: int = KV_TILE,
    window: int | None = None,
    q_len: int | None = None,
    tiles: int | None = None,
    kv_tiles: int | None = None,
) -> Schedule:
    """The schedule of a batch of requests.

    Request r has `query_lens[r]` new tokens after `context_lens[r]` cached ones, the latter in the blocks
    `block_tables[r]` of `block_size` tokens. With a `window` a token sees the last `window` tokens, itself among them.
    q_len, tiles and kv_tiles fix the sizes, for kernels that are compiled before the requests are known; the rest
    is padding, which sees nothing and loads nothing.

    Raises:
        InputError: a number is no integer or out of range, lengths do not fit each other, or sizes do not suffice.
    """
    query_lens, context_lens = _numbers("query_lens", query_lens), _numbers("context_lens", context_lens)
    block_tables = [_numbers("block_tables", table) for table in _listed("block_tables", block_tables)]
    block_size, kv_tile = _number("block_size", block_size, 1), _number("kv_tile", kv_tile, 1)
    window = None if window is None else _number("window", window, 1, None)
    window = None if window is None or window > MOST else window  # such a window hides nothing
    q_len, tiles, kv_tiles = (
        None if size is None else _number(name, size, 1)
        for name, size in (("q_len", q_len), ("tiles", tiles), ("kv_tiles", kv_tiles))
    )
    total = sum(query_lens)
    q_len = total if q_len is None else q_len
    if not len(query_lens) == len(context_lens) == len(block_tables):
        raise InputError("make_schedule: query_lens, context_lens and block_tables must have one entry a request.")
    if total + sum(context_lens) > MOST:
        raise InputError(f"make_schedule: all requests together must have at most {MOST} tokens.")
    if not q_len:
        raise InputError("make_schedule: the requests must have at least one row. Set q_len for padding alone.")
    if kv_tile % ROWS or kv_tile % block_size:
        raise InputError(
            f"make_schedule: kv_tile={kv_tile} must be a multiple of {ROWS} and of block_size={block_size}."
        )
    if q_len < total:
        raise InputError(f"make_schedule: q_len={q_len} is less than the {total} rows of the requests.")
    blocks: list[int] = []
    lo, hi = torch.zeros(2, q_len, dtype=torch.int32)
    active = torch.zeros(q_len, 2, dtype=torch.int32)
    row = 0
    for r, (new, context, table) in enumerate(zip(query_lens, context_lens, block_tables, strict=True)):
        used = -(-context // block_size)
        if len(table) < used:
            raise InputError(f"make_schedule: request {r} has {context} cached tokens in {len(table)} blocks.")
        rows, i = slice(row, row + new), torch.arange(new, dtype=torch.int32)
        start = len(blocks) * block_size
        first = torch.zeros_like(i) if window is None else (context + i + 1 - window).clamp_min(0)
        lo[rows], hi[rows] = start + first.clamp_max(context), start + context
        active[rows, 0] = row + (first - context).clamp_min(0)
        active[rows, 1] = row + i + 1
        blocks += table[:used]
        row += new
    per_tile = kv_tile // block_size
    needed = -(-len(blocks) // per_tile)
    kv_tiles = max(needed, 1) if kv_tiles is None else kv_tiles
    if kv_tiles < needed:
        raise InputError(f"make_schedule: kv_tiles={kv_tiles} is less than the {needed} that the requests need.")
    kv_blocks = torch.full((kv_tiles * per_tile,), NO_BLOCK, dtype=torch.int32)
    kv_blocks[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    pairs, bounds = _tiles(lo, hi, kv_tile, needed)
    count = max(len(pairs), 1) if tiles is None else tiles
    if count < len(pairs):
        raise InputError(f"make_schedule: tiles={count} is less than the {len(pairs)} that the requests need.")
    spare = count - len(pairs)
    last = pairs[-1][0] if pairs else 0
    pairs += [(last, 0)] * spare
    kv, q = torch.tensor(pairs, dtype=torch.int32).T
    padding = torch.zeros(spare, ROWS, 2, dtype=torch.int32)
    return Schedule(
        q.contiguous(), kv.contiguous(), kv_blocks.view(kv_tiles, per_tile), torch.cat([bounds, padding]), active
    )


def _listed(name: str, values: Any) -> Sequence[Any]:
    """The entries of a list, a tuple, or a tensor."""
    values = values.tolist() if isinstance(values, Tensor) and not values.is_meta else values
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise InputError(f"make_schedule: {name} must be a list with one entry a request, not {values!r:.80}.")
    return values


def _numbers(name: str, values: Any) -> list[int]:
    return [_number(name, value, 0) for value in _listed(name, values)]


def _number(name: str, value: Any, least: int, most: int | None = MOST) -> int:
    """The value as an integer of Python, if it is one and in range."""
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least or (most is not None and number > most):
        words = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"make_schedule: {name} must hold integers {words}, and one is {value!r:.80}.")
    return number


def _tiles(lo: Tensor, hi: Tensor, kv_tile: int, kv_tiles: int) -> tuple[list[tuple[int, int]], Tensor]:
    """The pairs (kv tile, q tile) in which some row sees a key, sorted by kv tile, and the keys that their rows see."""
    q_tiles = -(-len(lo) // ROWS)
    start = (torch.arange(kv_tiles, dtype=torch.int32) * kv_tile)[:, None, None]
    rows = torch.zeros(2, q_tiles * ROWS, dtype=torch.int32)
    rows[:, : len(lo)] = torch.stack([lo, hi])
    bounds = (rows.view(2, q_tiles, ROWS)[:, None] - start).clamp(0, kv_tile)
    seen = (bounds[0] < bounds[1]).any(2).nonzero()
    pairs = [(kv, q) for kv, q in seen.tolist()]
    return pairs, bounds.permute(1, 2, 3, 0)[seen[:, 0], seen[:, 1]]
