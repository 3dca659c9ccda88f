"""`neuron_attn::flash_prior`: new rows against a cache of earlier keys and their own: token generation, prefix caching.

    query [batch, num_heads, q_len, head_dim]
    key, value                  [batch, num_kv_heads, q_len, head_dim | v_head_dim], of the new rows
    key_prior, value_prior      [batch, num_kv_heads, prior_capacity, head_dim | v_head_dim], a cache
    prior_lengths               int [1 | batch]: how many keys of the cache count, known only at run time

Query row i of batch element b stands at position `prior_lengths[b] + i`. It sees the cache's keys before
`prior_lengths[b]`, of which `prior_mask`, bool [1 | batch, prior_capacity], may hide some, and the new keys up to its
own; with a `window` only the last `window` positions, its own among them. scale, softcap, sink, lnc, the dtypes and
the result are those of `flash_fwd`. What lies in the cache behind its length must be finite, and counts for nothing.

The few rows of token generation are, for a whole group of heads, one query tile: the cache is read once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels import cpu, reference
from neuron_attn_rewrite.kernels.nki import prepare, tiling
from neuron_attn_rewrite.kernels.nki.prepare import Launch
from neuron_attn_rewrite.kernels.nki.tiling import Intervals
from neuron_attn_rewrite.kernels.reference import Terms

NAME = "flash_prior"
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor key_prior, Tensor value_prior, Tensor prior_lengths, *, "
    "float scale, int? window=None, Tensor? prior_mask=None, float? softcap=None, Tensor? sink=None, int lnc=1) "
    "-> Tensor"
)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_prior: Tensor,
    value_prior: Tensor,
    prior_lengths: Tensor,
    *,
    window: int | None = None,
    prior_mask: Tensor | None = None,
    **others: Any,
) -> None:
    """Raise InputError for arguments beyond those of `flash_fwd` that do not fit."""
    for name, prior, new in (("key_prior", key_prior, key), ("value_prior", value_prior, value)):
        if (
            prior.dim() != 4
            or prior.dtype != new.dtype
            or (*prior.shape[:2], prior.shape[3])
            != (
                *new.shape[:2],
                new.shape[3],
            )
        ):
            raise _error(name, f"must be [batch, num_kv_heads, prior_capacity, size] as {list(new.shape)}", prior)
    if key.shape[2] != query.shape[2]:
        raise _error("key", f"must have query's length {query.shape[2]}", key)
    batch, capacity = query.shape[0], key_prior.shape[2]
    if value_prior.shape[2] != capacity:
        raise _error("value_prior", f"must have key_prior's capacity {capacity}", value_prior)
    if prior_lengths.dtype not in (torch.int32, torch.int64) or tuple(prior_lengths.shape) not in ((1,), (batch,)):
        raise _error("prior_lengths", f"must be int [1 | {batch}]", prior_lengths)
    if prior_mask is not None and (
        prior_mask.dtype != torch.bool or tuple(prior_mask.shape) not in ((1, capacity), (batch, capacity))
    ):
        raise _error("prior_mask", f"must be bool [1 | {batch}, {capacity}]", prior_mask)
    if window is not None and window < 1:
        raise InputError(f"flash_prior: window must be at least 1, not {window}.")


def _error(name: str, rule: str, tensor: Tensor) -> InputError:
    return InputError(f"flash_prior: {name} {rule}, but it is {list(tensor.shape)}, {tensor.dtype}.")


def intervals(q_len: int, prior_lengths: Tensor, capacity: int, window: int | None) -> tuple[Intervals, Intervals]:
    """What each row sees of the cache, and of the new keys."""
    lengths = prior_lengths.to(torch.int32)[:, None]
    i = torch.arange(q_len, dtype=torch.int32, device=lengths.device)[None]
    first = torch.zeros_like(lengths + i) if window is None else lengths + i - (window - 1)
    prior = Intervals(first, lengths.expand_as(first)).within(capacity)
    return prior, _new_keys(q_len, window, lengths.device)


def _new_keys(q_len: int, window: int | None, device: torch.device | str = "cpu") -> Intervals:
    return tiling.band(q_len, q_len, None if window is None else 1 - window, 0, device)


def as_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_prior: Tensor,
    value_prior: Tensor,
    prior_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    prior_mask: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Terms]:
    """The same as one attention to the cache with the new keys behind it: query, keys, values and terms."""
    q_len, capacity = query.shape[2], key_prior.shape[2]
    prior, new = intervals(q_len, prior_lengths, capacity, window)
    lo = torch.where(prior.lo < prior.hi, prior.lo, new.lo + capacity)
    counts = torch.arange(capacity, device=query.device) < prior_lengths[:, None]
    if prior_mask is not None:
        counts = counts & prior_mask
    terms = Terms(
        scale,
        key_padding=torch.cat([counts, counts.new_ones(counts.shape[0], q_len)], 1),
        bounds=torch.stack([lo, (new.hi + capacity).expand_as(lo)], 2),
        softcap=softcap,
        sink=sink,
    )
    return query, torch.cat([key_prior, key], 2), torch.cat([value_prior, value], 2), terms


def on_cpu(*tensors: Tensor, lnc: int = 1, **options: Any) -> Tensor:
    return cpu.attention(*as_one(*tensors, **options))


def decomposed(*tensors: Tensor, lnc: int = 1, **options: Any) -> Tensor:
    return reference.attention(*as_one(*tensors, **options))


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_prior: Tensor,
    value_prior: Tensor,
    prior_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    prior_mask: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    lnc: int = 1,
    target: str = "gen3",
) -> Launch:
    """The launch of the op: the kernel of `flash_fwd`, with the cache as a second source of keys."""
    q_len, capacity = query.shape[2], key_prior.shape[2]
    prior, new = intervals(q_len, prior_lengths, capacity, window)
    sources = [
        prepare.Source("", key, value, new, _new_keys(q_len, window), exact=True),
        prepare.Source(
            "_prior",
            key_prior,
            value_prior,
            prior,
            tiling.band(q_len, capacity, None, None),
            exact=False,
            padding=prior_mask,
        ),
    ]
    return prepare.launch(query, sources, Terms(scale, softcap=softcap, sink=sink), lnc=lnc, target=target)
