"""What one attention computes, as sizes and numbers, without nodes. Strategies, kernels and reports read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neuron_attn_rewrite.masks.spec import EmptyRows, MaskSpec


@dataclass(frozen=True)
class Prior:
    """Keys of a cache that lie apart from the new ones, one new key for each query. New keys are causal."""

    keys: int
    """How many the cache holds. At run time a query sees the first ones of them."""
    window: int | None = None
    """Positions that a query sees, its own included. None for all."""
    is_shared: bool = True
    """Whether all batch elements use as many keys of the cache."""
    is_masked: bool = False
    """Whether run-time vectors hide keys of the cache or new ones."""


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
    prior: Prior | None = None
    """The keys that lie apart, in a cache. They are the first ones. None if all keys are one tensor."""
    block_size: int | None = None
    """Keys in a block, if key and value lie in the blocks of a cache that a block table names. None if they do not."""

    @classmethod
    def of(
        cls,
        query: Sequence[int],
        value: Sequence[int],
        dtype: torch.dtype,
        scale: float,
        mask: MaskSpec,
        *,
        bias: Sequence[int] | None = None,
        softcap: float | None = None,
        sink: bool = False,
        empty_rows: EmptyRows = EmptyRows.NEVER,
        prior: Prior | None = None,
    ) -> AttentionProblem:
        """The problem of operands with these shapes.

        Args:
            query: [batch, num_heads, q_len, head_dim].
            value: [batch, num_kv_heads, kv_len, v_head_dim].
            dtype: of both, and of the key.
            scale: of the scores.
            mask: what is known of it.
            bias: the shape of the dense additive operand, [batch | 1, num_heads | 1, q_len | 1, kv_len | 1].
            softcap: of the scores.
            sink: whether there is one.
            empty_rows: what a row that sees no key gives.
            prior: the keys that lie apart, in a cache.
        """
        batch, num_heads, q_len, head_dim = query
        _, num_kv_heads, kv_len, v_head_dim = value
        shape: tuple[int, int, int, int] | None = None if bias is None else tuple(bias)  # type: ignore[assignment]
        return cls(
            batch=batch,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            dtype=dtype,
            scale=scale,
            mask=mask,
            bias_shape=shape,
            softcap=softcap,
            sink=sink,
            empty_rows=empty_rows,
            prior=prior,
        )

    @property
    def query_bytes(self) -> int:
        """Bytes of the query in its dtype."""
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
        """Bytes of query, key, value and result together."""
        return self.query_bytes + self.key_bytes + self.value_bytes + self.result_bytes

    @property
    def scores(self) -> int:
        """The number of query and key pairs, over all heads."""
        return self.batch * self.num_heads * self.q_len * self.kv_len
