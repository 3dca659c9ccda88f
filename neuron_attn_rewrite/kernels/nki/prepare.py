"""From the operands of an op to the launch of a kernel. It is the same for the simulator and for a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels.nki import tiling
from neuron_attn_rewrite.kernels.nki.tiling import Intervals
from neuron_attn_rewrite.kernels.orders import AS_GIVEN, PLAIN, Accepted, Orders, plain_shape, turned
from neuron_attn_rewrite.kernels.reference import Terms, positive_scale

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM = 256
"""Largest head_dim and v_head_dim."""
HIDDEN = -3.0e38
"""Added to the scores of hidden keys, and in the place of a bias of -inf."""
LOWEST_BIAS = -5.0e29
"""Finite biases are clamped to at least this. It is far below any score, but above `core.LOWEST`, so that a row whose
biases are all so low still sees its keys."""
KEY_BYTES = 80 * 1024
"""SBUF bytes for keys and values, in each partition."""
ACCEPTED = Accepted(*(((PLAIN, "BSHD"),) * 4))
"""The heads are one after the other, or side by side in a row."""
STATE_BYTES = 32 * 1024
"""SBUF bytes for the states of query tiles, in each partition."""


@dataclass(frozen=True)
class Launch:
    """One kernel call: the op returns `finish(kernel[lnc](**tensors, **static))`.

    To make a launch, only data of tensors on the CPU is read, so a launch can be traced on any device.
    """

    module: str
    """The module of the kernel. To import it, `nki` or the simulator is needed."""
    kernel: str
    tensors: Mapping[str, Tensor]
    """By argument name: contiguous, in the layout of the kernel. Absent operands are left out."""
    static: Mapping[str, Any]
    """Compile-time arguments: numbers, and tuples of them."""
    lnc: int
    finish: Callable[[Any], Any]


@dataclass(frozen=True)
class Source:
    """Keys and values, and which of them the query rows see."""

    suffix: str
    """Of the names of the kernel's arguments: "" or "_prior"."""
    key: Tensor
    value: Tensor
    intervals: Intervals
    """What each row sees."""
    planned: Intervals
    """What is known before the launch, on the CPU. No row sees more."""
    exact: bool
    """Whether a row sees exactly these keys, except for those that `padding` or a bias hides."""
    padding: Tensor | None = None
    """bool [1 | batch, kv_len], True if the key is seen."""
    orders: tuple[str, str] = (PLAIN, PLAIN)
    """The layouts of key and value, two of `ACCEPTED`."""


def flash_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    *,
    strategy: str = FlashAttentionStrategy.UNSHARDED_KERNEL.name,
    lnc: int = 1,
    target: str = "gen3",
    orders: Orders = AS_GIVEN,
) -> Launch:
    """The launch of `neuron_attn::flash_fwd`.

    Operands, terms and strategy are those of the op, already checked. `target` is "gen2", "gen3" or "gen4". `orders`
    are the layouts of the operands and of the result.

    Raises:
        InputError: no kernel here computes this, or not on this target.
    """
    here = ACCEPTED.nearest(orders)
    query, key, value = orders.to(here, query, key, value)
    q_len, kv_len = plain_shape(query, here.query)[2], plain_shape(key, here.key)[2]
    with tiling.real_numbers():
        planned = tiling.band(q_len, kv_len, terms.band_lower, terms.band_upper)
    intervals = tiling.band(q_len, kv_len, terms.band_lower, terms.band_upper, query.device)
    exact = True
    if terms.bounds is not None:
        lo, hi = terms.bounds.clamp(0, kv_len).to(torch.int32).unbind(2)
        intervals = tiling.intersection(intervals, Intervals(lo, hi).within(kv_len))
        exact = is_static(terms.bounds)
        planned = intervals if exact else planned
    source = Source("", key, value, intervals, planned, exact, terms.key_padding, (here.key, here.value))
    inner = launch(query, [source], terms, lnc=lnc, target=target, order=here.query, result=here.result)
    whole = replace(inner, finish=lambda out: turned(inner.finish(out), here.result, orders.result))
    if strategy != FlashAttentionStrategy.SLIDING_WINDOW_KERNEL.name or terms.bias is not None:
        return whole
    static = {name: value for name, value in whole.static.items() if name != "chunk"}
    seq_tile_size = 2048 if kv_len >= 2048 else 512
    return replace(whole, kernel="sliding_window_fwd", static={**static, "seq_tile_size": seq_tile_size})


def launch(
    query: Tensor,
    sources: list[Source],
    terms: Terms,
    *,
    lnc: int,
    target: str,
    order: str = PLAIN,
    result: str = PLAIN,
) -> Launch:
    """The launch of the kernel for query rows that see the keys of one source or of two.

    The masks are those of the sources; of `terms` all else is used. `order` and `result` are the layouts of the query
    and of the result, two of `ACCEPTED`.

    Raises:
        InputError: no kernel here computes this, or not on this target.
    """
    batch, heads, q_len, _ = plain_shape(query, order)
    _, kv_heads, kv_len, v_dim = plain_shape(sources[0].value, sources[0].orders[1])
    refuse(query, sources[0].value)
    if target == "gen2" and lnc == 2:
        raise InputError("gen2 has no pairs of cores: its kernels take lnc=1.")
    query, scale = positive_scale(query, terms.scale)
    group, rows = heads // kv_heads, q_len
    fold = group > 1 and group * q_len <= tiling.ROWS
    bias, row_bias = _biases(terms, scale, kv_len, fold)
    sink = None if terms.sink is None else terms.sink.float()[:, None].expand(heads, min(tiling.ROWS, q_len))
    inside = result
    if fold:  # The rows of all heads of a group are one tile, one head after the other.
        query, order, inside = turned(query, order, PLAIN), PLAIN, PLAIN
        bias = _folded_bias(bias, group, q_len)
        sink = None if sink is None else sink.reshape(kv_heads, group * q_len)
        sources = [replace(s, intervals=_folded(s.intervals, group)) for s in sources]
        group, rows = 1, group * q_len
    with tiling.real_numbers():
        planned = [_folded(s.planned, heads // kv_heads) if fold else s.planned for s in sources]
        key_ranges = [tiling.key_ranges(p, s.exact) for p, s in zip(planned, sources, strict=True)]
        empty = bool((sources[0].planned.lo >= sources[0].planned.hi).any())
    if target == "gen2" and any(not tiling.is_full(key_range) for part in key_ranges for key_range in part):
        raise InputError("the NKI kernel of gen2 takes no causal, window or bounds mask: it has no range_select.")
    tensors: dict[str, Tensor | None] = {"q": _rows(query, order), "bias": bias, "sink": sink}
    static = {
        **_tiles(tiling.tile_starts(rows), key_ranges),
        **sizes(query, sources, group, len(key_ranges[0]), bias is not None),
        "items": batch * kv_heads,
        "group": group,
        "kv_heads": kv_heads,
        "q_heads": _side_by_side(order, heads),
        "k_heads": _side_by_side(sources[0].orders[0], kv_heads),
        "v_heads": _side_by_side(sources[0].orders[1], kv_heads),
        "out_heads": _side_by_side(inside, heads),
        "scale": scale,
        "softcap": terms.softcap,
        "mean_rows": terms.empty_rows == "mean" and (empty or _hides_more(sources, terms)),
    }
    for s in sources:
        tensors |= {
            f"k{s.suffix}": _rows(s.key, s.orders[0]),
            f"v{s.suffix}": _rows(s.value, s.orders[1]),
            f"bounds{s.suffix}": tiling.bounds_tensor(s.intervals),
            f"key_bias{s.suffix}": _key_bias(s.padding, row_bias),
        }
    shape = (batch, heads, q_len, v_dim) if inside == PLAIN else (batch, q_len, heads, v_dim)
    return Launch(
        module="neuron_attn_rewrite.kernels.nki.flash",
        kernel="flash_fwd",
        tensors={name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
        static=static,
        lnc=lnc,
        finish=lambda out: turned(out.reshape(shape), inside, result),
    )


def refuse(query: Tensor, value: Tensor) -> None:
    """Raise InputError if no kernel here takes the dtype or the head_dim."""
    if query.dtype not in DTYPES:
        raise InputError(f"the NKI kernels take {', '.join(map(str, DTYPES))}, not {query.dtype}.")
    if max(query.shape[3], value.shape[3]) > HEAD_DIM:
        raise InputError(
            f"the NKI kernels take a head_dim of up to {HEAD_DIM}, not {query.shape[3]} and {value.shape[3]}."
        )


def is_static(tensor: Tensor) -> bool:
    """Whether its values can be read now. They can't on a device, or while a graph is traced."""
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)


def _rows(tensor: Tensor, order: str) -> Tensor:
    """The operand as rows, with the heads behind each other or side by side."""
    return tensor.reshape(-1, tensor.shape[3] if order == PLAIN else tensor.shape[2] * tensor.shape[3])


def _side_by_side(order: str, heads: int) -> int:
    """How many heads lie side by side in a row."""
    return 1 if order == PLAIN else heads


def _folded(intervals: Intervals, group: int) -> Intervals:
    """The intervals of the rows of all heads of a group, behind each other."""
    return Intervals(intervals.lo.repeat(1, group), intervals.hi.repeat(1, group))


def _folded_bias(bias: Tensor | None, group: int, q_len: int) -> Tensor | None:
    if bias is None:
        return None
    batch, heads, _, kv_len = bias.shape
    return bias.expand(batch, group if heads == 1 else heads, q_len, kv_len).reshape(batch, -1, group * q_len, kv_len)


def _biases(terms: Terms, scale: float, kv_len: int, fold: bool) -> tuple[Tensor | None, Tensor | None]:
    """The bias as the kernel takes it: [1 | batch, 1 | heads, rows, 1 | kv_len], or one row for all rows of a tile.

    The second is [1 | batch, 1 | heads, kv_len]. It is divided by the scale, or by the softcap: the kernel adds it to
    the scores before it multiplies them.
    """
    bias = terms.bias
    if bias is None:
        return None, None
    if bias.shape[2] == 1 and (bias.shape[1] == 1 or not fold):
        row = bias[:, :, 0].float().expand(-1, -1, kv_len)
        scaled = (row / (terms.softcap or scale)).clamp(LOWEST_BIAS, -LOWEST_BIAS)
        return None, torch.where(row == -torch.inf, HIDDEN, scaled)
    bias = bias.float() if bias.dtype == torch.float64 else bias
    if bias.dtype != torch.float16:  # The finite numbers of float16 are all above LOWEST_BIAS.
        bias = torch.where(bias == -torch.inf, bias, bias.clamp_min(LOWEST_BIAS))
    return bias, None


def _key_bias(padding: Tensor | None, row_bias: Tensor | None) -> Tensor | None:
    """[1 | batch, 1 | heads, kv_len] to add to the scores of all rows."""
    if padding is None:
        return row_bias
    if row_bias is None:
        return torch.where(padding[:, None], 0.0, HIDDEN).to(torch.bfloat16)
    return torch.where(padding[:, None], row_bias, HIDDEN)


def _hides_more(sources: list[Source], terms: Terms) -> bool:
    """Whether more than the planned intervals hides keys, so that some row may see none."""
    return any(not s.exact or s.padding is not None for s in sources) or terms.bias is not None


def _tiles(starts: tuple[int, ...], sources: list[tuple[tiling.KeyRange, ...]]) -> dict[str, Any]:
    """The kernel's arguments `tiles`, for one core, and `pairs`, for two cores that share the query tiles."""
    pairs = [tiling.paired(starts, key_ranges) for key_ranges in sources]
    return {
        "tiles": tuple(((start,), tuple(key_ranges[t] for key_ranges in sources)) for t, start in enumerate(starts)),
        "pairs": tuple((pairs[0][p][0], tuple(pair[p][1] for pair in pairs)) for p in range(len(pairs[0]))),
    }


def section(query: Tensor, value: Tensor) -> int:
    """How many keys and values are in SBUF at a time."""
    partitions = 128
    features = -(-query.shape[3] // partitions) * partitions
    return KEY_BYTES * partitions // (query.element_size() * (features + value.shape[3])) // tiling.ALIGN * tiling.ALIGN


def sizes(query: Tensor, sources: list[Source], group: int, tiles: int, bias: bool) -> dict[str, int]:
    """How much is in SBUF at a time: keys (`section`), keys of one step (`chunk`), query tiles (`block`)."""
    value = sources[0].value
    keys = section(query, value)
    chunk = 8192 if query.element_size() == 2 and not bias else 4096
    waiting = max(STATE_BYTES // (group * (4 * value.shape[3] + 8)), 1)
    all_at_once = len(sources) == 1 and plain_shape(value, sources[0].orders[1])[2] <= keys
    return {"section": keys, "chunk": chunk, "block": tiles if all_at_once else waiting}
