"""What one attention computes, free of graph nodes: the language between finding, choosing and reporting."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.masks.spec import Band, Claim, KeyPadding, Limited, MaskSpec


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

    @property
    def query_bytes(self) -> int:
        """Of the query, in its dtype."""
        return self.batch * self.num_heads * self.q_len * self.head_dim * self.dtype.itemsize

    @property
    def key_bytes(self) -> int:
        return self.batch * self.num_kv_heads * self.kv_len * self.head_dim * self.dtype.itemsize

    @property
    def value_bytes(self) -> int:
        return self.batch * self.num_kv_heads * self.kv_len * self.v_head_dim * self.dtype.itemsize

    @property
    def result_bytes(self) -> int:
        return self.batch * self.num_heads * self.q_len * self.v_head_dim * self.dtype.itemsize

    @property
    def operand_bytes(self) -> int:
        """Of query, key, value and result together."""
        return self.query_bytes + self.key_bytes + self.value_bytes + self.result_bytes

    @property
    def scores(self) -> int:
        """How many pairs of query and key there are, over all heads."""
        return self.batch * self.num_heads * self.q_len * self.kv_len


def posed(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> AttentionProblem:
    """The problem that the operands of `torch.ops.neuron_attn.flash_fwd` pose, without a look at their values."""
    q_len, kv_len = query.shape[2], key.shape[2]
    band = Band(terms.band_lower, terms.band_upper)
    claims: list[Claim] = [] if band == Band() else [band]
    if terms.key_padding is not None:
        claims.append(KeyPadding("key_padding"))
    if terms.bounds is not None:
        claims.append(Limited("bounds"))
    known = terms.key_padding is None and terms.bounds is None and band.reaches_every_row(q_len, kv_len)
    return AttentionProblem(
        batch=query.shape[0],
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        q_len=q_len,
        kv_len=kv_len,
        head_dim=query.shape[3],
        v_head_dim=value.shape[3],
        dtype=query.dtype,
        scale=terms.scale,
        mask=MaskSpec(tuple(claims)),
        bias_shape=None if terms.bias is None else tuple(terms.bias.shape),  # type: ignore[arg-type]
        softcap=terms.softcap,
        sink=terms.sink is not None,
        empty_rows=EmptyRows.NEVER if known else EmptyRows(terms.empty_rows),
    )
