"""What the stand-ins share: shapes as layouts, and attention with the finite fill of the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FILL = torch.finfo(torch.float32).min


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


def gradients(q, k, v, o, dy, lse, causal, scale, window, sinks=None):
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
