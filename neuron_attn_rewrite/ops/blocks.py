"""`neuron_attn::flash_blocks`: attention to keys and values that lie in the blocks of a cache.

A block table names the blocks of each batch element, in order: key j of element b is row `j % block_size` of block
`block_table[b, j // block_size]`. The op computes what `flash_fwd` does with `cache[block_table]` as key and value,
and no copy of them is made on a device. It needs no schedule: that is made from the table, whose size is fixed.

Query row i of element b sees key j if `i + band_lower <= j <= i + band_upper` and
`bounds[b, i, 0] <= j < bounds[b, i, 1]`, as far as they are given. A row that sees no key gives zeros. scale, softcap,
sink, lnc, the dtypes and the result are those of `flash_fwd`.

`neuron_attn::checked_blocks` checks a table before anything is computed from it.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from itertools import permutations
from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels import cpu, reference
from neuron_attn_rewrite.kernels.nki import prepare
from neuron_attn_rewrite.kernels.nki.prepare import Launch
from neuron_attn_rewrite.kernels.nki.tiling import ROWS
from neuron_attn_rewrite.kernels.orders import PLAIN
from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.kernels.schedule import NO_BLOCK, Schedule, kv_tile_of
from neuron_attn_rewrite.kernels.vendor.layouts import multiple, row_bounds
from neuron_attn_rewrite.ops.arguments import BOUNDS_DTYPES, out_of_range, readable
from neuron_attn_rewrite.ops.paged import launch_tiles

NAME = "flash_blocks"
CACHE_ORDERS = tuple(f"{''.join(letters)}D" for letters in permutations("BHS"))
"""The orders of the dims of a cache: blocks (B), heads (H), the rows of a block (S), and last the size of a row (D)."""


@dataclass(frozen=True, eq=False)
class FlashBlocks:
    """The arguments of `flash_blocks`, and what is computed of them."""

    query: Tensor
    """[batch, num_heads, q_len, head_dim]."""
    key_cache: Tensor
    """[blocks, num_kv_heads, block_size, head_dim], or in another `cache_order`."""
    value_cache: Tensor
    """[blocks, num_kv_heads, block_size, v_head_dim], or in another `cache_order`."""
    block_table: Tensor
    """Int [1 | batch, blocks of an element]. -1 stands for no block, and no row may see it. Checked on the CPU."""
    _: KW_ONLY
    scale: float
    band_lower: int | None = None
    band_upper: int | None = None
    bounds: Tensor | None = None
    """Int [1 | batch, q_len, 2]."""
    softcap: float | None = None
    sink: Tensor | None = None
    """Float [num_heads]."""
    lnc: int = 1
    cache_order: str = PLAIN
    """One of `CACHE_ORDERS`."""

    @property
    def key(self) -> Tensor:
        """A tensor with the shape of the keys that the table names. It has no memory of its own."""
        return self._named(self.key_cache)

    @property
    def value(self) -> Tensor:
        """A tensor with the shape of the values that the table names. It has no memory of its own."""
        return self._named(self.value_cache)

    def _named(self, cache: Tensor) -> Tensor:
        self._check_form()
        _, heads, size, dim = _plain(cache, self.cache_order).shape
        shape = self.query.shape[0], heads, self.block_table.shape[1] * size, dim
        return cache.new_empty(()).expand(shape)

    def _check_form(self) -> None:
        """Check what the shapes of keys and values follow from."""
        if self.cache_order not in CACHE_ORDERS:
            raise InputError(
                f"{NAME}: cache_order must be one of {', '.join(CACHE_ORDERS)}, not {self.cache_order!r:.80}."
            )
        for name, cache in (("key_cache", self.key_cache), ("value_cache", self.value_cache)):
            if cache.dim() != 4:
                raise _error(name, "must have the dims blocks, num_kv_heads, block_size and size", cache)
        if self.query.dim() != 4:
            raise _error("query", "must be [batch, num_heads, q_len, head_dim]", self.query)
        table, batch = self.block_table, self.query.shape[0]
        if table.dtype not in BOUNDS_DTYPES or table.dim() != 2 or table.shape[0] not in (1, batch):
            raise _error("block_table", f"must be int [1 | {batch}, blocks of an element]", table)

    def check(self) -> None:
        """Check what `arguments.checked_terms` does not.

        Raises:
            InputError: an argument does not fit; the message names it.
        """
        key, value = (_plain(c, self.cache_order).shape for c in (self.key_cache, self.value_cache))
        if key[:3] != value[:3]:
            raise _error("value_cache", f"must have key_cache's blocks, {list(key[:3])}", self.value_cache)

    def check_values(self) -> None:
        """Check the values of the table.

        Raises:
            InputError: a block does not exist, or a row sees a key in no block.
        """
        table, (blocks, _, size, _) = self.block_table, _plain(self.key_cache, self.cache_order).shape
        _check_numbers(table, NO_BLOCK, blocks)
        if not (table < 0).any():
            return
        first, end = self._bounds()
        absent = pad((table < 0).long().cumsum(1), (1, 0)).expand(len(self.query), -1)
        some = first < end
        seen = absent.gather(1, (end - 1).clamp_min(0) // size + 1) - absent.gather(1, first // size)
        if (some & (seen > 0)).any():
            raise InputError(f"{NAME}: a row sees a key of block_table's -1, which is no block.")

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """First key and end of the keys that each row sees, int64 [batch, q_len] each, within the keys of the table."""
        batch, _, q_len, _ = self.query.shape
        kv_len = self.key.shape[2]
        found = row_bounds(self._terms(), q_len, kv_len, self.query.device)
        first, end = (t.clamp(0, kv_len).expand(batch, -1) for t in found)
        return first, end

    def _terms(self) -> Terms:
        return Terms(
            self.scale,
            band_lower=self.band_lower,
            band_upper=self.band_upper,
            bounds=self.bounds,
            softcap=self.softcap,
            sink=self.sink,
        )

    def _copied(self, cache: Tensor, table: Tensor) -> Tensor:
        """The keys or values of a table, [elements, heads, length, dim]."""
        pages = _plain(cache, self.cache_order)[table.clamp_min(0).long()]
        return pages.transpose(1, 2).flatten(2, 3)

    def as_one(self) -> tuple[Tensor, Tensor, Tensor, Terms]:
        """The same with copies of all keys and values: query, key, value and terms."""
        table = self.block_table.expand(len(self.query), -1)
        key, value = (self._copied(cache, table) for cache in (self.key_cache, self.value_cache))
        return self.query, key, value, self._terms()

    def decomposed(self) -> Tensor:
        """The result by plain torch operators, from copies of all keys and values."""
        return reference.attention(*self.as_one())

    def on_cpu(self) -> Tensor:
        """The result on the CPU: one batch element at a time, from copies of the blocks that its rows see."""
        batch, heads, q_len, _ = self.query.shape
        out = self.query.new_zeros(batch, heads, q_len, self.value.shape[3])
        if not out.numel():
            return out
        size, terms = _plain(self.key_cache, self.cache_order).shape[2], self._terms()
        lows, ends = self._bounds()
        empty = lows >= ends
        firsts = lows.masked_fill(empty, torch.iinfo(lows.dtype).max).amin(1).tolist()
        for b, (first, end) in enumerate(zip(firsts, ends.masked_fill(empty, 0).amax(1).tolist(), strict=True)):
            if first >= end:
                continue
            start = first // size
            used = self.block_table[b if len(self.block_table) > 1 else 0, start : -(-end // size)][None]
            key, value = (self._copied(c, used)[:, :, : end - start * size] for c in (self.key_cache, self.value_cache))
            element, keys = slice(b, b + 1), slice(start * size, end)
            part = terms.part(element, slice(0, heads), slice(0, q_len), keys)
            out[element] = cpu.attention(self.query[element], key, value, part)
        return out

    def launch(self, target: str = "gen3") -> Launch:
        """The launch of the NKI kernel of `flash_paged`. Its schedule has tiles for each part of a row of the table."""
        prepare.refuse(self.query, self.value_cache)
        batch, heads, q_len, head_dim = self.query.shape
        size, count = _plain(self.key_cache, self.cache_order).shape[2], self.block_table.shape[1]
        per_tile = min(multiple(count, lcm(ROWS, size) // size), kv_tile_of(size) // size)
        tiles = -(-count // per_tile)
        table = pad(self.block_table.to(torch.int32), (0, tiles * per_tile - count), value=NO_BLOCK)
        shared = len(table) == 1
        pairs = [
            (e * tiles + t, q)
            for e in range(len(table))
            for t in range(tiles)
            for q in range(0 if shared else e * q_len // ROWS, -(-(batch if shared else e + 1) * q_len // ROWS))
        ]
        tile_kv, tile_q = torch.tensor(pairs, dtype=torch.int32, device=self.query.device).T
        query = self.query.transpose(0, 1).reshape(1, heads, batch * q_len, head_dim)
        schedule = Schedule(
            tile_q.contiguous(),
            tile_kv.contiguous(),
            table.reshape(-1, per_tile),
            self._tile_bounds(tile_q, tile_kv, tiles, per_tile * size),
            torch.empty(0, 2, dtype=torch.int32, device=query.device),
        )
        caches = self.key_cache, self.value_cache
        terms = self._terms()
        made = launch_tiles(query, None, caches, schedule, terms, lnc=self.lnc, target=target, order=self.cache_order)

        def finish(out: Any) -> Any:
            return made.finish(out).reshape(heads, batch, q_len, -1).transpose(0, 1)

        return replace(made, finish=finish)

    def _tile_bounds(self, tile_q: Tensor, tile_kv: Tensor, tiles: int, keys: int) -> Tensor:
        """The columns that the rows of each tile see, int32 [tiles, 128, 2]: of the keys of their own element."""
        batch, _, q_len, _ = self.query.shape
        rows = tile_q.long()[:, None] * ROWS + torch.arange(ROWS, device=tile_q.device)
        element = rows // q_len
        own = element < batch
        if len(self.block_table) > 1:
            own = own & (element == (tile_kv // tiles)[:, None])
        at = rows.clamp_max(batch * q_len - 1)
        start = (tile_kv % tiles * keys)[:, None]
        columns = [(bound.flatten()[at] - start).clamp(0, keys).where(own, 0) for bound in self._bounds()]
        return torch.stack(columns, -1).to(torch.int32)


def _plain(cache: Tensor, order: str) -> Tensor:
    """A view of a cache as [blocks, heads, block_size, dim]."""
    return cache if order == PLAIN else cache.permute([order.index(letter) for letter in PLAIN])


def checked_blocks(block_table: Tensor, blocks: int, wraps: bool = False) -> Tensor:
    """The numbers of a table as int32, in [0, blocks).

    Args:
        block_table: int, of any shape.
        blocks: how many there are.
        wraps: whether a negative number counts from the end, as in an index.

    Raises:
        InputError: a number is out of range. On other devices than the CPU that is not checked.
    """
    if readable(block_table):
        _check_numbers(block_table, -blocks if wraps else 0, blocks)
    numbers = block_table.to(torch.int32)
    # The result of an op must not be its operand.
    return torch.where(numbers < 0, numbers + blocks, numbers) if wraps else numbers.clone()


def fake_checked_blocks(block_table: Tensor, blocks: int, wraps: bool = False) -> Tensor:
    """The result of `checked_blocks` without its values."""
    return torch.empty_like(block_table, dtype=torch.int32)


def _check_numbers(table: Tensor, least: int, blocks: int) -> None:
    wrong = out_of_range(table, least, blocks)
    if wrong is not None:
        raise InputError(
            f"{NAME}: block_table must name blocks from {least} to {blocks - 1} of this cache, and one is {wrong}."
        )


def _error(name: str, rule: str, tensor: Tensor) -> InputError:
    return InputError(f"{NAME}: {name} {rule}, but it is {list(tensor.shape)}, {tensor.dtype}.")
