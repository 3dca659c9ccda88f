"""`neuron_attn::flash_paged`: the rows of several requests against a cache in blocks and their own new keys.

The new tokens of all requests lie one behind the other. Of each tile of the schedule that contains it, a row sees the
columns within its bounds. Of the new keys it sees those within its active bounds, up to its own. A row that sees
nothing gives zeros. scale, softcap, sink, lnc, the dtypes and the result are those of `flash_fwd`.
`schedule.make_schedule` makes the schedule from lengths and block tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels import cpu, reference, vendor
from neuron_attn_rewrite.kernels.nki import prepare
from neuron_attn_rewrite.kernels.nki.prepare import Launch
from neuron_attn_rewrite.kernels.nki.tiling import ROWS
from neuron_attn_rewrite.kernels.orders import PLAIN
from neuron_attn_rewrite.kernels.reference import Terms, positive_scale
from neuron_attn_rewrite.kernels.schedule import Schedule
from neuron_attn_rewrite.ops.arguments import out_of_range

NAME = "flash_paged"


@dataclass(frozen=True, eq=False)
class FlashPaged:
    """The arguments of `flash_paged`, and what is computed of them. The schedule is that of `schedule.Schedule`."""

    query: Tensor
    """[1, num_heads, q_len, head_dim], the new tokens of all requests."""
    key: Tensor
    """[1, num_kv_heads, q_len, head_dim], of the new tokens."""
    value: Tensor
    """[1, num_kv_heads, q_len, v_head_dim], of the new tokens."""
    key_cache: Tensor
    """[blocks, num_kv_heads, block_size, head_dim]."""
    value_cache: Tensor
    """[blocks, num_kv_heads, block_size, v_head_dim]."""
    tile_q: Tensor
    tile_kv: Tensor
    kv_blocks: Tensor
    tile_bounds: Tensor
    active_bounds: Tensor
    _: KW_ONLY
    scale: float
    softcap: float | None = None
    sink: Tensor | None = None
    """Float [num_heads]."""
    lnc: int = 1
    kernel_name: str = NAME
    """Ours, or a name in `kernels.vendor.PAGED`. It changes no number."""

    def check(self) -> None:
        """Check what `arguments.checked_terms` does not.

        Raises:
            InputError: an argument does not fit; the message names it.
        """
        if self.kernel_name != NAME and self.kernel_name not in vendor.PAGED:
            raise InputError(
                f"flash_paged: kernel_name must be one of {', '.join((NAME, *vendor.PAGED))}, not {self.kernel_name!r}."
            )
        q_len = self.query.shape[2]
        if self.query.shape[0] != 1:
            raise _error("query", "must have a batch of 1: requests lie one behind the other", self.query)
        if self.key.shape[2] != q_len:
            raise _error("key", f"must have query's length {q_len}", self.key)
        for name, cache, new in (
            ("key_cache", self.key_cache, self.key),
            ("value_cache", self.value_cache, self.value),
        ):
            if (
                cache.dim() != 4
                or cache.dtype != new.dtype
                or cache.shape[1] != new.shape[1]
                or cache.shape[3] != new.shape[3]
            ):
                raise _error(name, f"must be [blocks, {new.shape[1]}, block_size, {new.shape[3]}], {new.dtype}", cache)
        if self.value_cache.shape[:3] != self.key_cache.shape[:3]:
            raise _error(
                "value_cache", f"must have key_cache's blocks, {list(self.key_cache.shape[:3])}", self.value_cache
            )
        for name, tensor, shape in (
            ("tile_q", self.tile_q, (self.tile_q.numel(),)),
            ("tile_kv", self.tile_kv, (self.tile_q.numel(),)),
            ("kv_blocks", self.kv_blocks, (*self.kv_blocks.shape[:1], *self.kv_blocks.shape[1:2])),
            ("tile_bounds", self.tile_bounds, (self.tile_q.numel(), ROWS, 2)),
            ("active_bounds", self.active_bounds, (q_len, 2)),
        ):
            if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
                raise _error(name, f"must be int32 {list(shape)}", tensor)
        if self.kv_blocks.dim() != 2:
            raise _error("kv_blocks", "must be int32 [kv_tiles, blocks of a tile]", self.kv_blocks)
        if self.key_cache.shape[0] == 0:
            raise _error("key_cache", "must have at least one block", self.key_cache)
        keys = self.kv_blocks.shape[1] * self.key_cache.shape[2]
        if not self.tile_q.numel() or keys == 0 or keys % ROWS:
            raise _error(
                "kv_blocks", f"must hold tiles of a multiple of {ROWS} keys, and there must be one", self.kv_blocks
            )

    def check_values(self) -> None:
        """Check the values of the schedule.

        Raises:
            InputError: the schedule names rows, tiles, columns or blocks that do not exist.
        """
        tiles, per_tile = self.kv_blocks.shape
        blocks, columns = self.key_cache.shape[0], per_tile * self.key_cache.shape[2]
        for name, values, least, end in (
            ("tile_q", self.tile_q, 0, max(1, -(-self.query.shape[2] // ROWS))),
            ("tile_kv", self.tile_kv, 0, tiles),
            ("kv_blocks", self.kv_blocks, -1, blocks),
            ("tile_bounds", self.tile_bounds, 0, columns + 1),
        ):
            wrong = out_of_range(values, least, end)
            if wrong is not None:
                raise InputError(
                    f"flash_paged: {name} must lie in [{least}, {end - 1}] for this query and cache, and one is "
                    f"{wrong}: make the schedule for the same requests and the same cache."
                )
        if (
            self._columns_seen(columns)
            & (self.kv_blocks < 0)[self.tile_kv].repeat_interleave(self.key_cache.shape[2], 1)
        ).any():
            raise InputError(
                "flash_paged: tile_bounds must not contain columns of absent blocks (-1 in kv_blocks): make the "
                "schedule for the same requests and the same cache."
            )

    def _columns_seen(self, columns: int) -> Tensor:
        """Bool [tiles, columns]: whether some row of the tile sees the column."""
        lo, hi = self.tile_bounds.long().unbind(2)
        changes = torch.zeros(len(lo), columns + 1, dtype=torch.int32)
        some = (lo < hi).int()
        changes.scatter_add_(1, lo, some).scatter_add_(1, hi, -some)
        return changes.cumsum(1)[:, :-1] > 0

    def decomposed(self) -> Tensor:
        """The result by plain torch operators: all tiles at once, every row against every key, and no value is read."""
        q_len, (tiles, columns) = (
            self.query.shape[2],
            (len(self.tile_q), self.kv_blocks.shape[1] * self.key_cache.shape[2]),
        )
        blocks = self.kv_blocks.clamp_min(0)[self.tile_kv]
        keys, values = (
            c[blocks].permute(2, 0, 1, 3, 4).flatten(1, 3)[None] for c in (self.key_cache, self.value_cache)
        )
        i = torch.arange(q_len, device=self.query.device)
        j = torch.arange(columns, device=self.query.device)
        bounds = self.tile_bounds[:, i % ROWS]
        seen = (bounds[:, :, :1] <= j) & (j < bounds[:, :, 1:]) & (self.tile_q[:, None] == i // ROWS)[:, :, None]
        prior = seen.permute(1, 0, 2).reshape(q_len, tiles * columns)
        new = (self.active_bounds[:, :1] <= i) & (i < self.active_bounds[:, 1:]) & (i <= i[:, None])
        terms = self._terms(torch.cat([prior, new], 1))
        return reference.attention(
            self.query, torch.cat([keys, self.key], 2), torch.cat([values, self.value], 2), terms
        )

    def on_cpu(self) -> Tensor:
        """The result on the CPU: one run of rows at a time, against the columns and the new keys that it sees."""
        out = self.query.new_empty(*self.query.shape[:3], self.value.shape[3])
        for start in range(0, self.query.shape[2], ROWS):
            tiles = (self.tile_q == start // ROWS).nonzero()[:, 0]
            bounds, active = self.tile_bounds[tiles], self.active_bounds[start : start + ROWS]
            bounds = bounds[:, : len(active)]
            blocks = self.kv_blocks[self.tile_kv[tiles]]
            for run in _runs(bounds, active, start):
                rows = slice(start + run.start, start + run.stop)
                out[:, :, rows] = self._run(rows, blocks, bounds[:, run], active[run])
        return out

    def _run(self, rows: slice, blocks: Tensor, bounds: Tensor, active: Tensor) -> Tensor:
        """The result of some rows, from the blocks [tiles, per_tile] and the bounds [tiles, rows, 2] of their tiles."""
        lo, hi = bounds.unbind(2)
        end = torch.minimum(active[:, 1], torch.arange(rows.start + 1, rows.stop + 1))
        first, last = _span(active[:, 0], end)
        keys, values = [self.key[:, :, first:last]], [self.value[:, :, first:last]]
        j = torch.arange(first, last)
        seen = [(active[:, :1] <= j) & (j < end[:, None])]
        size = self.key_cache.shape[2]
        alike = True
        for t in (lo < hi).any(1).nonzero()[:, 0].tolist():
            a, b = _span(lo[t], hi[t])
            used = blocks[t, a // size : -(-b // size)]
            for cache, parts in ((self.key_cache, keys), (self.value_cache, values)):
                part = cache[used.clamp_min(0)].transpose(0, 1).flatten(1, 2)
                parts.insert(-1, part[None, :, a % size : a % size + b - a])
            j = torch.arange(a, b)
            seen.insert(-1, (lo[t][:, None] <= j) & (j < hi[t][:, None]))
            alike = alike and bool(seen[-2].all())
        query, prior = self.query[:, :, rows], sum(part.shape[1] for part in seen[:-1])
        key, value = (torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in (keys, values))
        if alike and bool((active[:, 0] == first).all() and (end == torch.arange(rows.start + 1, rows.stop + 1)).all()):
            # Every row sees all earlier columns, and the new keys up to its own.
            upper = None if rows.stop - rows.start == 1 else prior + rows.start - first
            terms = Terms(self.scale, band_upper=upper, softcap=self.softcap, sink=self.sink)
            return cpu.attention(query, key, value, terms)
        return cpu.attention(query, key, value, self._terms(torch.cat(seen, 1)))

    def _terms(self, seen: Tensor) -> Terms:
        hidden = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
        return Terms(self.scale, bias=hidden[None, None], softcap=self.softcap, sink=self.sink)

    def launch(self, target: str = "gen3") -> Launch:
        """The launch of our NKI kernel. A row of a cache is one token of one head."""
        prepare.refuse(self.query, self.value)
        q_len = self.query.shape[2]
        behind = torch.arange(1, q_len + 1, dtype=torch.int32, device=self.query.device)
        active = torch.stack([self.active_bounds[:, 0], torch.minimum(self.active_bounds[:, 1], behind)], 1)
        schedule = Schedule(self.tile_q, self.tile_kv, self.kv_blocks, self.tile_bounds, active)
        new, caches = (self.key, self.value), (self.key_cache, self.value_cache)
        terms = Terms(self.scale, softcap=self.softcap, sink=self.sink)
        return launch_tiles(self.query, new, caches, schedule, terms, lnc=self.lnc, target=target)


def launch_tiles(
    query: Tensor,
    new: tuple[Tensor, Tensor] | None,
    caches: tuple[Tensor, Tensor],
    schedule: Schedule,
    terms: Terms,
    *,
    lnc: int,
    target: str,
    order: str = PLAIN,
) -> Launch:
    """The launch of the kernel of a schedule.

    Args:
        query: [1, num_heads, q_len, head_dim].
        new: key and value of the new rows. Without them, `active_bounds` is not read.
        caches: of keys and values, each [blocks, num_kv_heads, block_size, dim], or in another `order` of its dims.
        schedule: with active bounds that end before the next row.
        terms: scale, softcap and sink.
        lnc: physical cores.
        target: the NeuronCore.
        order: the letters B, H and S, in the order of these dims, and D. A row of the cache is one token of one head.
    """
    if target == "gen2":
        raise InputError("the NKI kernel of flash_paged needs range_select, which gen2 does not have.")
    tile_q, tile_kv = schedule.tile_q, schedule.tile_kv
    _, heads, q_len, head_dim = query.shape
    blocks, kv_heads, block_size, v_dim = (caches[1].shape[order.index(letter)] for letter in PLAIN)
    apart = {letter: prod(caches[1].shape[i + 1 : 3]) for i, letter in enumerate(order)}
    query, scale = positive_scale(query, terms.scale)
    padded = -(-q_len // ROWS) * ROWS
    query = pad(query, (0, 0, 0, padded - q_len))
    p = torch.arange(ROWS, dtype=torch.int32, device=query.device)
    head = torch.arange(heads, dtype=torch.int32, device=query.device)
    # Out of range where there is no block, or where the keys are those of the tile before.
    repeated = torch.cat([tile_kv.new_zeros(1, dtype=torch.bool), tile_kv[1:] == tile_kv[:-1]])
    there = schedule.kv_blocks[tile_kv].masked_fill(repeated[:, None], -1)[:, :, None]
    offset = torch.arange(block_size, dtype=torch.int32, device=query.device)
    kv_rows = there * apart["B"] + head[:kv_heads, None, None, None] * apart["H"] + offset * apart["S"]
    kv_rows = kv_rows.masked_fill(there < 0, blocks * kv_heads * block_size)
    tensors = {
        "q": query.reshape(-1, head_dim),
        "k_cache": caches[0].reshape(-1, head_dim),
        "v_cache": caches[1].reshape(-1, v_dim),
        "q_rows": head[:, None, None] * padded + p[:, None] + tile_q * ROWS,
        "kv_rows": kv_rows.reshape(kv_heads, len(tile_q), -1, ROWS).transpose(2, 3).to(torch.int32),
        "tile_bounds": schedule.tile_bounds.transpose(0, 1).flatten(1).float(),
    }
    if new is not None:
        active = pad(schedule.active_bounds, (0, 0, 0, padded - q_len)).view(-1, ROWS, 2).transpose(0, 1)
        key, value = (pad(t, (0, 0, 0, padded - q_len)) for t in new)
        tensors |= {"k": key.reshape(-1, head_dim), "v": value.reshape(-1, v_dim)}
        tensors["active_bounds"] = active.flatten(1).float()
    if terms.sink is not None:
        tensors["sink"] = terms.sink.float()[:, None].expand(heads, ROWS)
    return Launch(
        module="neuron_attn_rewrite.kernels.nki.paged",
        kernel="flash_paged",
        tensors={name: tensor.contiguous() for name, tensor in tensors.items()},
        static={
            "group": heads // kv_heads,
            "kv_heads": kv_heads,
            "scale": scale,
            "softcap": terms.softcap,
            "section": prepare.section(query, caches[1]),
        },
        lnc=lnc,
        finish=lambda out: out.reshape(1, heads, padded, v_dim)[:, :, :q_len],
    )


def _runs(bounds: Tensor, active: Tensor, start: int) -> Iterator[slice]:
    """Neighbouring rows that are to be computed together: in each tile, what they see ends at the same column.

    A row that sees no earlier new key begins a request, and a run. `bounds` is [tiles, rows, 2].
    """
    ends = bounds[..., 1].where(bounds[..., 0] < bounds[..., 1], 0)
    new = (ends[:, 1:] != ends[:, :-1]).any(0) | (active[1:, 0] == torch.arange(start + 1, start + len(active)))
    cuts = [0, *(new.nonzero()[:, 0] + 1).tolist(), len(active)]
    return (slice(a, b) for a, b in pairwise(cuts))


def _span(lo: Tensor, hi: Tensor) -> tuple[int, int]:
    """The smallest interval that holds all intervals [lo, hi) of a list. (0, 0) if they are empty."""
    some = lo < hi
    return (int(lo[some].min()), int(hi[some].max())) if some.any() else (0, 0)


def _error(name: str, rule: str, tensor: Tensor) -> InputError:
    return InputError(f"flash_paged: {name} {rule}, but it is {list(tensor.shape)}, {tensor.dtype}.")
