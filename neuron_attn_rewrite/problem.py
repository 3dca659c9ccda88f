"""What one attention computes, free of graph nodes: the language between finding, choosing and reporting."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neuron_attn_rewrite.masks.spec import EmptyRows, MaskSpec


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
