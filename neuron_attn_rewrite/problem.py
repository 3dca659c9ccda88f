"""What one attention computes, free of graph nodes: the language between finding, choosing and reporting."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from neuron_attn_rewrite.masks.spec import MaskSpec


class EmptyRows(Enum):
    """What the model gives for a query row that sees no key at all."""

    NEVER = "never"
    """The mask proves that no such row exists."""
    ZERO = "zero"
    """Zeros: a bool or -inf mask through scaled_dot_product_attention."""
    MEAN = "mean"
    """The mean of all values: every score is replaced by one finite number, such as finfo.min."""
    ANY = "any"
    """NaN, or the caller has said that such rows do not matter: whatever a kernel gives is right."""
    OTHER = "other"
    """Something no kernel computes, e.g. the softmax of scores that all carry the same finite -1e9."""


@dataclass(frozen=True)
class AttentionProblem:
    """`softmax(softcap(scale * q k^T) + bias, sink) v` under a mask, with its sizes.

    query is [batch, num_heads, q_len, head_dim], key [batch, num_kv_heads, kv_len, head_dim], value
    [batch, num_kv_heads, kv_len, v_head_dim]; query head h reads kv head `h // (num_heads // num_kv_heads)`.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    scale: float
    mask: MaskSpec
    bias_shape: tuple[int, int, int, int] | None = None
    """[batch | 1, num_heads | 1, q_len | 1, kv_len | 1] of the dense additive operand, None without one."""
    softcap: float | None = None
    sink: bool = False
    empty_rows: EmptyRows = EmptyRows.NEVER
