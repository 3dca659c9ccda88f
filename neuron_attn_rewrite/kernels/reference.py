"""The reference implementation of the attention ops: full score matrices in float32 (float64 for float64 operands).

The ops decompose to it on devices without an implementation of their own. So nothing here depends on a tensor's data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """The keyword arguments of `flash_fwd` that change its numbers: mask, bias, softcap and sink."""

    scale: float
    band_lower: int | None = None
    band_upper: int | None = None
    key_padding: Tensor | None = None
    """Bool [batch | 1, kv_len], True where the key is seen."""
    bounds: Tensor | None = None
    """Int [batch | 1, q_len, 2]: row i sees the keys of [lo, hi)."""
    bias: Tensor | None = None
    """Float [batch | 1, num_heads | 1, q_len | 1, kv_len | 1]; -inf hides."""
    softcap: float | None = None
    sink: Tensor | None = None
    """Float [num_heads]: the logit of one more column, whose probability is dropped."""
    empty_rows: str = "zero"
    """What a row without a visible key gives: "zero", or "mean", the mean of all values."""

    def part(self, batch: slice, heads: slice, rows: slice, keys: slice) -> Terms:
        """The terms of the attention of some rows to some keys (slices with a start and a stop)."""
        shift = rows.start - keys.start
        return replace(
            self,
            band_lower=None if self.band_lower is None else self.band_lower + shift,
            band_upper=None if self.band_upper is None else self.band_upper + shift,
            key_padding=narrow(self.key_padding, batch, keys),
            bounds=None
            if self.bounds is None
            else narrow(self.bounds, batch, rows).clamp(keys.start, keys.stop) - keys.start,
            bias=narrow(self.bias, batch, heads, rows, keys),
            sink=None if self.sink is None else self.sink[heads],
        )


@overload
def narrow(tensor: Tensor, *slices: slice) -> Tensor: ...
@overload
def narrow(tensor: None, *slices: slice) -> None: ...
def narrow(tensor: Tensor | None, *slices: slice) -> Tensor | None:
    """The slices of the leading dims; a dim of size 1 is broadcast, and stays."""
    if tensor is None:
        return None
    return tensor[tuple(slice(None) if size == 1 else s for size, s in zip(tensor.shape, slices, strict=False))]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax and sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Query and scale with a positive scale, which kernels need: they find the largest score before scaling."""
    if scale == 0:
        return torch.zeros_like(query), 1.0
    return (-query, -scale) if scale < 0 else (query, scale)


def visible(terms: Terms, q_len: int, kv_len: int, device: torch.device | None = None) -> Tensor:
    """Bool [batch | 1, 1, q_len, kv_len], True where a key is seen. An -inf in the bias is ignored."""
    i = torch.arange(q_len, device=device)[:, None]
    j = torch.arange(kv_len, device=device)
    seen = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=device)
    if terms.band_lower is not None:
        seen = seen & (j >= i + terms.band_lower)
    if terms.band_upper is not None:
        seen = seen & (j <= i + terms.band_upper)
    if terms.key_padding is not None:
        seen = seen & terms.key_padding[:, None, None, :]
    if terms.bounds is not None:
        lo, hi = terms.bounds[:, None, :, :, None].unbind(3)
        seen = seen & (lo <= j) & (j < hi)
    return seen


def attention(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
    """`softmax(softcap(scale * q k^T) + bias, sink) v` under the mask.

    query [batch, num_heads, q_len, head_dim], key [batch, num_kv_heads, kv_len, head_dim], value
    [batch, num_kv_heads, kv_len, v_head_dim] give [batch, num_heads, q_len, v_head_dim] in query's dtype.
    """
    if key.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    query, key, value, dtype = *(t.to(work_dtype(t.dtype)) for t in (query, key, value)), query.dtype
    weights, _, empty = _softmax(_capped(query, key, terms), terms)
    if terms.empty_rows == "mean":
        weights = torch.where(empty, 1 / key.shape[2], weights)
    return _per_query_head(weights, value).to(dtype).contiguous()


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias and sink, in the work dtype, for the `grad` of `attention`'s output.

    That of an absent bias or sink has no elements.
    """
    grad, query, key, value = (t.to(work_dtype(t.dtype)) for t in (grad, query, key, value))
    bias, sink = (query.new_zeros(0 if t is None else t.shape) for t in (terms.bias, terms.sink))
    if key.shape[2] == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), bias, sink
    capped = _capped(query, key, terms)
    weights, sink_weights, empty = _softmax(capped, terms)
    by_weights = _per_query_head(grad, value.mT)
    mean_grad = (weights * by_weights).sum(-1, keepdim=True)
    by_scores = weights * (by_weights - mean_grad)
    if terms.bias is not None:
        bias = by_scores.sum_to_size(terms.bias.shape)
    if terms.sink is not None:
        sink = -(sink_weights * mean_grad).sum((0, 2, 3))
    if terms.empty_rows == "mean":
        weights = torch.where(empty, 1 / key.shape[2], weights)
    if terms.softcap is not None:
        by_scores = by_scores * (1 - (capped / terms.softcap).square())
    by_scores = by_scores * terms.scale
    by_query = _per_query_head(by_scores, key)
    return by_query, _per_kv_head(by_scores, query, key.shape[1]), _per_kv_head(weights, grad, key.shape[1]), bias, sink


def _per_query_head(left: Tensor, right: Tensor) -> Tensor:
    """left [batch, num_heads, m, n] times right [batch, num_kv_heads, n, p], which is never repeated."""
    batch, heads, m, n = left.shape
    kv_heads, p = right.shape[1], right.shape[3]
    return (left.reshape(batch, kv_heads, heads // kv_heads * m, n) @ right).reshape(batch, heads, m, p)


def _per_kv_head(left: Tensor, right: Tensor, kv_heads: int) -> Tensor:
    """left^T right, summed over the rows of each group: [batch, num_heads, m, n] and [.., m, p] to [.., n, p]."""
    left, right = (t.reshape(t.shape[0], kv_heads, -1, t.shape[3]) for t in (left, right))
    return left.mT @ right


def _capped(query: Tensor, key: Tensor, terms: Terms) -> Tensor:
    scores = _per_query_head(query, key.mT) * terms.scale
    return scores if terms.softcap is None else (scores / terms.softcap).tanh() * terms.softcap


def _softmax(scores: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the keys, zero in an empty row; weights of the sink [.., q_len, 1]; which rows are empty."""
    if terms.bias is not None:
        scores = scores + terms.bias.to(scores.dtype)
    seen = visible(terms, scores.shape[2], scores.shape[3], scores.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    top = scores.amax(-1, keepdim=True)
    sink = torch.full_like(scores[:1, :, :1, :1], float("-inf"))
    if terms.sink is not None:
        sink = terms.sink.to(scores.dtype)[None, :, None, None]
    # A finite maximum: -inf minus -inf is no number.
    top = top.maximum(sink).clamp_min(torch.finfo(scores.dtype).min)
    weights, sink_weights = (scores - top).exp(), (sink - top).exp()
    total = weights.sum(-1, keepdim=True) + sink_weights
    total = torch.where(total == 0, 1.0, total)
    return weights / total, sink_weights / total, empty
