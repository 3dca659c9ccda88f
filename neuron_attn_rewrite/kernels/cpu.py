"""The attention ops on the CPU, with linear memory.

Band, bounds and key padding become one interval of keys for each query row. A tile of rows reads only the keys that
some of its rows see, and needs a mask only where its rows differ. Each tile is one call of PyTorch's flash kernel.
Softcap, which that kernel lacks, is computed here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from neuron_attn_rewrite.kernels import reference
from neuron_attn_rewrite.kernels.reference import Terms, narrow, positive_scale, work_dtype

FLASH = torch._scaled_dot_product_flash_attention_for_cpu
TILE_ROWS = 256
"""Query rows of a tile. Fewer rows skip more keys; more rows make larger matrix products."""
TILE_SCORES = 2**21
"""Elements of a tile of scores, if scores are stored: 8 MB in float32."""
WORTH_A_CALL = 2**25
"""A batch element with at least this many multiplications gets its own call, with only the keys that it sees."""
MANY_BOUNDS = 256
"""More than these are not looked at one by one."""
FEW_ROWS = 16
"""With at most this many rows, it is faster to compute the rows of a group of heads together."""
GROUPED_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
"""Whether PyTorch's flash kernel takes fewer heads in key and value than in query."""
EVERY = slice(None)


def attention(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
    """As `reference.attention`."""
    batch, heads, q_len, _ = query.shape
    kv_len, v_dim = value.shape[2:]
    if not (query.numel() and key.numel() and value.numel()):
        return query.new_zeros(batch, heads, q_len, v_dim)
    if (keys := _in_all_bounds(terms, kv_len)) is not None:
        padding = None if terms.key_padding is None else terms.key_padding[:, keys]
        hides_nothing = padding is None or bool(padding.all())
        are_few = q_len <= FEW_ROWS and batch > 1 and len(_batch_parts(query, key, terms)) == 1
        if hides_nothing or (are_few and terms.empty_rows == "zero"):
            mask = None if padding is None or hides_nothing else _additive(padding[:, None, None], query.dtype)
            out = _flash(query, _span(key, keys), _span(value, keys), mask, terms.scale, False)[0].contiguous()
            if mask is None or not math.isnan(out.sum().item()):  # see `_attend`
                return out
    if _is_causal(terms):
        return _flash(query, key, value, None, terms.scale, causal=True)[0].contiguous()
    parts = _batch_parts(query, key, terms)
    if len(parts) == 1:
        return _attend(query, key, value, terms)
    out = query.new_empty(batch, heads, q_len, v_dim)
    for b in parts:
        part = terms.part(b, slice(0, heads), slice(0, q_len), slice(0, kv_len))
        _attend(query[b], key[b], value[b], part, out[b])
    return out


def attention_to_parts(
    query: Tensor, parts: Sequence[tuple[Tensor, Tensor, Terms]], sink: Tensor | None = None
) -> Tensor | None:
    """As `attention` to the keys of all parts together, which are read as they lie.

    A row that sees no key gives zeros.

    Args:
        query: [batch, num_heads, q_len, head_dim].
        parts: the keys and values of each part and their terms, without a sink and a bias.
        sink: as in `Terms`, for all parts.

    Returns:
        None if some result is NaN: a hidden key may have made it so.
    """
    batch, heads, q_len, _ = query.shape
    kind, v_dim = work_dtype(query.dtype), parts[0][1].shape[3]
    outs = query.new_zeros(len(parts), batch, heads, q_len, v_dim)
    lses = query.new_full((len(parts), batch, heads, q_len), float("-inf"), dtype=kind)
    for (key, value, terms), out, lse in zip(parts, outs, lses, strict=True):
        for b in _batch_parts(query, key, terms) if value.numel() and query.numel() else ():
            part = terms.part(b, slice(0, heads), slice(0, q_len), slice(0, key.shape[2]))
            for tile in _tiles(query[b], key[b], part):
                result, total = _of_tile(query[b], key[b], value[b], part, tile)
                if math.isnan(result.sum().item()):
                    return None
                out[b, :, tile.rows] = result
                is_empty = False if tile.mask is None else tile.mask.amax(-1) == float("-inf")
                lse[b, :, tile.rows] = torch.where(torch.as_tensor(is_empty), float("-inf"), total.to(kind))
    logits = lses if sink is None else torch.cat([lses, sink.to(kind)[:, None].expand_as(lses[:1])])
    weights = (logits - logits.amax(0).clamp_min(torch.finfo(kind).min)).exp()
    weights = weights[: len(parts)] / weights.sum(0).masked_fill_((weights == 0).all(0), 1)
    return (outs * weights[..., None]).sum(0).to(query.dtype)


def _in_all_bounds(terms: Terms, kv_len: int) -> slice | None:
    """The keys that each row sees but for padding, if it sees no others and the scores are all that counts.

    In a step of generation this is quick to find out, and the rest takes more time than the attention itself.
    """
    others = (terms.band_lower, terms.band_upper, terms.bias, terms.softcap, terms.sink)
    if any(other is not None for other in others):
        return None
    lo, hi = 0, kv_len
    if terms.bounds is not None:
        if terms.bounds.numel() > MANY_BOUNDS:
            return None
        (low, high), *more = terms.bounds.flatten(0, 1).tolist()
        if any(pair != [low, high] for pair in more):
            return None
        lo, hi = max(low, 0), min(high, kv_len)
    return slice(lo, hi) if lo < hi else None


def _is_causal(terms: Terms) -> bool:
    """Whether it is causal attention aligned at the top left, without other terms."""
    others = (terms.band_lower, terms.key_padding, terms.bounds, terms.bias, terms.softcap, terms.sink)
    return terms.band_upper == 0 and all(other is None for other in others)


def _batch_parts(query: Tensor, key: Tensor, terms: Terms) -> list[slice]:
    """The whole batch as one part, or one part for each element if the elements are large and see different keys."""
    batch, heads, q_len, head_dim = query.shape
    differ = any(t is not None and t.shape[0] > 1 for t in (terms.key_padding, terms.bounds, terms.bias))
    if differ and heads * q_len * key.shape[2] * head_dim >= WORTH_A_CALL:
        return [slice(b, b + 1) for b in range(batch)]
    return [slice(0, batch)]


def _attend(query: Tensor, key: Tensor, value: Tensor, terms: Terms, out: Tensor | None = None) -> Tensor:
    """Attention tile by tile, into `out` if given."""
    batch, heads, q_len, _ = query.shape
    empty_row: Tensor | float = 0.0
    if terms.empty_rows == "mean":
        empty_row = value.mean(2, keepdim=True, dtype=work_dtype(value.dtype)).to(value.dtype)
        empty_row = empty_row.repeat_interleave(heads // key.shape[1], 1)
    done = 0
    for tile in _tiles(query, key, terms):
        result, lse = _of_tile(query, key, value, terms, tile)
        if terms.sink is not None:
            shares = (lse - terms.sink.to(lse.dtype)[:, None]).sigmoid()
            result = (result * shares[..., None]).to(query.dtype)
        # Maybe of a hidden key: the flash kernel adds -inf to it, which hides no NaN.
        if math.isnan(result.sum().item()):
            result = _by_reference(query, key, value, terms, tile)
        if terms.empty_rows == "mean" and tile.mask is not None:
            result = torch.where(tile.mask.amax(-1, keepdim=True) == float("-inf"), empty_row, result)
        if out is None:
            if result.shape[2] == q_len:
                return result.contiguous()
            out = query.new_empty(batch, heads, q_len, value.shape[3])
        out[:, :, done : tile.rows.start] = empty_row
        out[:, :, tile.rows] = result
        done = tile.rows.stop
    if out is None:
        out = query.new_empty(batch, heads, q_len, value.shape[3])
    out[:, :, done:] = empty_row
    return out


def _of_tile(query: Tensor, key: Tensor, value: Tensor, terms: Terms, tile: _Tile) -> tuple[Tensor, Tensor]:
    """As `_flash`, without a sink."""
    q, k, v = _span(query, tile.rows), _span(key, tile.keys), _span(value, tile.keys)
    if terms.softcap is None:
        return _flash(q, k, v, tile.mask, terms.scale, tile.causal)
    return _softcapped(q, k, v, tile.mask, terms.scale, terms.softcap)


def _by_reference(query: Tensor, key: Tensor, value: Tensor, terms: Terms, tile: _Tile) -> Tensor:
    """The result of a tile, without the sum of a score and -inf. It holds the scores of some rows at a time."""
    batch, heads = query.shape[:2]
    keys, starts = tile.keys, range(tile.rows.start, tile.rows.stop, TILE_ROWS)
    results = []
    for rows in (slice(start, min(start + TILE_ROWS, tile.rows.stop)) for start in starts):
        part = terms.part(slice(0, batch), slice(0, heads), rows, keys)
        results.append(reference.attention(query[:, :, rows], key[:, :, keys], value[:, :, keys], part))
    return torch.cat(results, 2)


def _span(tensor: Tensor, part: slice) -> Tensor:
    """Part of dim 2. The whole dim needs no view, which saves time in small calls."""
    return tensor if part.stop - part.start == tensor.shape[2] else tensor[:, :, part]


@dataclass(frozen=True)
class _Tile:
    """Some rows and keys. `mask` and `causal` say which of the keys each row sees."""

    rows: slice
    keys: slice
    mask: Tensor | None
    """Added to the scores, -inf where nothing is seen: [batch | 1, num_heads | 1, rows | 1, keys]."""
    causal: bool = False
    """Aligned at the top left of the tile."""


def _tiles(query: Tensor, key: Tensor, terms: Terms) -> Iterator[_Tile]:
    """Tiles of the rows that see something; every other row is empty."""
    _, heads, q_len, _ = query.shape
    lo, hi, padding = _trimmed(terms, key.shape[2])
    if lo == hi:
        return
    others = (terms.band_lower, terms.bounds, terms.bias, terms.softcap, padding)
    if terms.band_upper is not None and terms.band_upper <= lo and all(other is None for other in others):
        # Row `lo - band_upper` is the first to see a key, and sees exactly one.
        start = min(lo - terms.band_upper, q_len)
        if start < q_len:
            yield _Tile(slice(start, q_len), slice(lo, hi), None, causal=True)
        return
    step = q_len
    operands = (terms.band_lower, terms.band_upper, terms.bounds)
    if any(o is not None for o in operands) or (terms.bias is not None and terms.bias.shape[2] > 1):
        step = TILE_ROWS
    if terms.softcap is not None:
        step = min(TILE_ROWS, max(TILE_SCORES * key.shape[1] // (heads * (hi - lo)), 16))
    dtype = query.dtype
    if terms.bias is not None and terms.bias.dtype != dtype:
        dtype = work_dtype(dtype)
    # Of one tile only the keys that it reads are converted: a cache may be long, and nearly empty.
    hidden = None if padding is None or step >= q_len else _additive(padding[:, None, None], dtype)
    strip, strip_start = None, 0
    for start in range(0, q_len, step):
        rows = slice(start, min(start + step, q_len))
        first, last, ragged, seen = _seen(terms, rows, lo, hi)
        if first >= last:
            continue
        keys = slice(first, last)
        parts = []
        if ragged:
            if strip is None:
                strip_start, strip = _band_strip(terms, q_len, step, lo, hi, dtype)
            offset = first - start - strip_start
            parts.append(strip[:, :, : rows.stop - start, offset : offset + last - first])
        if seen is not None:
            parts.append(_additive(seen, dtype))
        if hidden is not None:
            parts.append(hidden if last - first == hidden.shape[3] else hidden[..., keys])
        elif padding is not None:
            parts.append(_additive(padding[:, None, None, keys], dtype))
        mask = functools.reduce(torch.add, parts) if parts else None
        if terms.bias is not None:
            bias = narrow(terms.bias, EVERY, EVERY, rows, keys).to(dtype).expand(-1, -1, -1, last - first)
            # Where a key is hidden, the bias may be +inf or no number.
            mask = bias if mask is None else (mask + bias).masked_fill_(mask == float("-inf"), float("-inf"))
        yield _Tile(rows, keys, mask)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, -inf where False."""
    return torch.where(seen, 0.0, float("-inf")).to(dtype)


def _trimmed(terms: Terms, kv_len: int) -> tuple[int, int, Tensor | None]:
    """The keys [lo, hi) outside of which nothing is seen, and the padding if it hides some key among them."""
    key_padding = terms.key_padding
    if key_padding is None:
        return 0, kv_len, None
    if len(key_padding) > 1:
        # Small elements that share a call: the longest spoils trimming for all. Padding that hides nothing is worth
        # finding out only for the sake of a cheaper causal call.
        whole = terms.band_upper is not None and bool(key_padding.all())
        return 0, kv_len, None if whole else key_padding
    seen = key_padding[0].nonzero()
    if not len(seen):
        return 0, 0, None
    lo, hi = int(seen[0]), int(seen[-1]) + 1
    return lo, hi, key_padding if len(seen) < hi - lo else None


def _band(terms: Terms, q_len: int, lo: int, hi: int) -> tuple[int, int]:
    """Both sides of the band; an open side is one that hides nothing."""
    lower = lo - q_len if terms.band_lower is None else terms.band_lower
    return lower, hi if terms.band_upper is None else terms.band_upper


def _seen(terms: Terms, rows: slice, lo: int, hi: int) -> tuple[int, int, bool, Tensor | None]:
    """The keys [first, last) within [lo, hi) that the rows see by band and bounds.

    Then whether the band hides some of them from some row; and, if the bounds do, which are seen by the bounds: bool
    [batch | 1, 1, rows, last - first].
    """
    lower, upper = _band(terms, rows.stop, lo, hi)
    first, last = max(lo, rows.start + lower), min(hi, rows.stop + upper)
    seen = None
    if terms.bounds is not None and first < last:
        los, his = terms.bounds[:, rows].unbind(2)
        los, his = los.clamp_min(first), his.clamp_max(last)
        # An empty row must not widen the tile.
        empty = los >= his
        los, his = los.masked_fill(empty, last), his.masked_fill(empty, first)
        first, last = int(los.min()), int(his.max())
        if first < last and (int(los.max()) > first or int(his.min()) < last):
            j = torch.arange(first, last)
            seen = ((los[:, :, None] <= j) & (j < his[:, :, None]))[:, None]
    ragged = rows.stop - 1 + lower > first or rows.start + upper < last - 1
    return first, last, ragged, seen


def _band_strip(terms: Terms, q_len: int, step: int, lo: int, hi: int, dtype: torch.dtype) -> tuple[int, Tensor]:
    """The band's additive mask of every tile, as columns of one [1, 1, step, n].

    What row r of a tile sees of key j depends on `j - start of the tile` alone. The first column is the int returned.
    """
    lower, upper = _band(terms, q_len, lo, hi)
    last_start = (q_len - 1) // step * step
    first, last = max(lo - last_start, lower), min(hi, step + upper)
    i, j = torch.arange(step)[:, None], torch.arange(first, max(first, last))
    return first, _additive(((i + lower <= j) & (j <= i + upper))[None, None], dtype)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the scores [batch, num_heads, q_len]; zeros in a row that is all hidden."""
    query, scale = positive_scale(query, scale)
    batch, heads, q_len, head_dim = query.shape
    kv_heads, v_dim = key.shape[1], value.shape[3]
    if v_dim != head_dim:  # the kernel knows one size only
        query, key, value = (pad(t, (0, max(head_dim, v_dim) - t.shape[3])) for t in (query, key, value))
    query, key, value = _with_dense_rows(query), _with_dense_rows(key), _with_dense_rows(value)
    if mask is not None and mask.stride(3) > 1:
        mask = mask.contiguous()
    fold = (
        heads > kv_heads and q_len <= FEW_ROWS and not causal and (mask is None or mask.shape[1] == mask.shape[2] == 1)
    )
    if fold:  # all rows see the same keys: the rows of a group become rows of one head
        query = query.reshape(batch, kv_heads, heads // kv_heads * q_len, -1)
    elif heads > kv_heads and not GROUPED_HEADS:
        query, key, value, mask = _batch_of_groups(query, key, value, mask)
    out, lse = FLASH(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    if out.shape[1] != heads:
        out, lse = out.reshape(batch, heads, q_len, -1), lse.reshape(batch, heads, q_len)
    return out if v_dim == out.shape[3] else out[..., :v_dim], lse


def _batch_of_groups(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same attention as a batch of kv heads, whose heads are the query heads of the group; views where possible."""
    batch, heads, q_len, head_dim = query.shape
    shape = batch * key.shape[1], heads // key.shape[1]
    if mask is not None and mask.shape[0] * mask.shape[1] > 1:
        mask = mask.expand(batch, heads, -1, -1).reshape(*shape, *mask.shape[2:])
    key, value = (t.reshape(shape[0], 1, -1, head_dim).expand(*shape, -1, -1) for t in (key, value))
    return query.reshape(*shape, q_len, head_dim), key, value, mask


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The kernel reads rows whose elements are neighbours, and that do not overlap."""
    return tensor if tensor.stride(3) == 1 and tensor.stride(2) >= tensor.shape[3] else tensor.contiguous()


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """As `_flash`, with `softcap * tanh(scores / softcap)` for the scores. Holds the scores of some heads at a time."""
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len, v_dim = value.shape[1:]
    group, dtype = heads // kv_heads, work_dtype(query.dtype)
    out = query.new_empty(batch, heads, q_len, v_dim)
    lse = torch.empty(batch, heads, q_len, dtype=dtype)
    mask = None if mask is None else mask.expand(batch, heads, -1, -1)
    step = max(TILE_SCORES // (group * q_len * kv_len), 1)
    for b in range(batch):
        for h in range(0, kv_heads, step):
            few, many = slice(h, h + step), slice(h * group, (h + step) * group)
            q, k, v = (t.to(dtype) for t in (query[b, many], key[b, few], value[b, few]))
            scores = q.reshape(len(k), group * q_len, -1) @ k.mT
            scores = scores.mul_(scale / softcap).tanh_().mul_(softcap)
            if mask is not None:
                scores.view(-1, q_len, kv_len).add_(mask[b, many])
            top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(dtype).min)
            total = scores.sub_(top).exp_().sum(-1, keepdim=True)
            total.masked_fill_(total == 0, 1)
            out[b, many] = ((scores @ v) / total).view(-1, q_len, v_dim)
            lse[b, many] = (top + total.log()).view(-1, q_len)
    return out, lse


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, terms: Terms, bias_grad: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.attention_backward`, which it calls for some rows of some heads at a time."""
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1:3]
    group, dtype = heads // kv_heads, work_dtype(query.dtype)
    by_query, by_key, by_value = (torch.zeros(t.shape, dtype=dtype) for t in (query, key, value))
    by_bias, by_sink = (
        torch.zeros(0 if t is None else t.shape, dtype=dtype) for t in (terms.bias if bias_grad else None, terms.sink)
    )
    step = min(max(TILE_SCORES // max(group * kv_len, 1), 16), TILE_ROWS)
    few = max(TILE_SCORES // max(group * step * kv_len, 1), 1)
    for b in (slice(b, b + 1) for b in range(batch)):
        for h in range(0, kv_heads, few):
            of_kv, of_query = slice(h, h + few), slice(h * group, (h + few) * group)
            for start in range(0, q_len, step):
                rows = slice(start, min(start + step, q_len))
                keys = _keys_in_band(terms, rows, kv_len)
                if keys.start >= keys.stop:
                    continue
                part = terms.part(b, of_query, rows, keys)
                in_query, in_kv = (b, of_query, rows), (b, of_kv, keys)
                parts = reference.attention_backward(grad[in_query], query[in_query], key[in_kv], value[in_kv], part)
                by_query[in_query] = parts[0]
                by_key[in_kv] += parts[1]
                by_value[in_kv] += parts[2]
                if by_bias.numel():
                    narrow(by_bias, b, of_query, rows, keys).add_(parts[3])
                if by_sink.numel():
                    by_sink[of_query] += parts[4]
    return by_query, by_key, by_value, by_bias, by_sink


def _keys_in_band(terms: Terms, rows: slice, kv_len: int) -> slice:
    """The keys that some of the rows may see. All of them if an empty row gives the mean of all."""
    lo, hi = 0, kv_len
    if terms.empty_rows == "zero" and terms.band_lower is not None:
        lo = max(lo, rows.start + terms.band_lower)
    if terms.empty_rows == "zero" and terms.band_upper is not None:
        hi = min(hi, rows.stop + terms.band_upper)
    return slice(lo, hi)
