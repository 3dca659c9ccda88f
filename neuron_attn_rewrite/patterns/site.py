"""The normal form of a found attention: `softmax(softcap(scale * q k^T) + terms, sink) v` with every axis named."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import dtype
from neuron_attn_rewrite.patterns.axes import Dims, Layout, plan
from neuron_attn_rewrite.reasons import Reason

MASKED = -9984.0
"""A score this low is invisible: exp underflows to 0 in float32 from -104 on, which leaves scores a spread of 9880."""


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph, and what its dims and those of the kernel's operand run over."""

    node: fx.Node
    dims: Dims
    target: Dims
    broadcasts: bool = False
    """Whether a dim of the target over which the tensor does not run stays of size 1."""
    origin: tuple[fx.Node, Dims] | None = None
    """The tensor of which `node` is a view, and what its dims run over; None where it can't be read in its place."""

    @property
    def layout(self) -> Layout:
        """The steps from the tensor to the kernel's operand."""
        steps = plan(self.dims, self.target, full=not self.broadcasts)
        assert steps is not None, self
        return steps


@dataclass(frozen=True)
class Term:
    """Something that changes the scores before the softmax.

    `add` adds `multiplier * node`; `show` replaces the scores by `fill` where the node is False or 0, `hide` where it
    is not.
    """

    kind: str
    node: fx.Node
    dims: Dims
    multiplier: float = 1.0
    fill: float = -torch.inf
    zeroed: bool = False
    """Whether the weights that it hides are set to zero once more after the softmax."""


@dataclass(frozen=True)
class Scaling:
    """A tensor that multiplies or divides an operand or the output of the kernel.

    On the query and the output it is [batch | 1, heads | 1, q_len | 1, 1], on the value [batch | 1, kv heads | 1,
    kv_len | 1, 1].
    """

    on: str
    """"query", "value" or "output"."""
    operand: Operand
    divides: bool


@dataclass(frozen=True)
class Reader:
    """A node outside of the attention that reads something inside, which therefore has to stay."""

    what: str
    """"weights", "scores" or "log-sum-exp"."""
    node: fx.Node


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the graph, ready to be proven and chosen for."""

    name: str
    """Path of the module that computes it, such as `model.layers.0.self_attn`."""
    pattern: str
    """How it was written: the operator, or the products around the softmax with what was peeled between them."""
    anchor: fx.Node
    """The softmax or scaled_dot_product_attention node."""
    output: fx.Node
    """The node whose value the kernel computes."""
    output_dims: Dims
    """What the dims of the output run over."""
    result: Dims
    """What those of the kernel's result run over: [batch, num_heads, q_len, v_head_dim]."""
    query: Operand
    """To [batch, num_heads, q_len, head_dim]."""
    key: Operand
    """To [batch, num_kv_heads, kv_len, head_dim]."""
    value: Operand
    """To [batch, num_kv_heads, kv_len, v_head_dim]."""
    dims: Dims
    """What (batch, heads, query, key) of the kernel run over, in the axes of the scores."""
    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    scale: float
    value_scale: float = 1.0
    """A scale on the value: it multiplies the output."""
    factors: tuple[Scaling, ...] = ()
    terms: tuple[Term, ...] = ()
    is_causal: bool = False
    """The operator's own top-left causal flag."""
    softcap: float | None = None
    sink: Operand | None = None
    """To [num_heads]."""
    safe: bool = False
    """Whether a row of -inf scores gives zeros (scaled_dot_product_attention) and not NaN (softmax)."""
    floor: float = -torch.inf
    """A lower limit of all scores, applied after the terms."""
    readers: tuple[Reader, ...] = ()
    """What else reads the weights or scores."""

    @property
    def output_layout(self) -> Layout:
        """The steps from the kernel's result to the output."""
        steps = plan(self.result, self.output_dims)
        assert steps is not None, self
        return steps

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Every tensor that the kernel call reads, but the masks."""
        factors = tuple(factor.operand for factor in self.factors)
        return (self.query, self.key, self.value, *factors, *([self.sink] if self.sink else []))

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype that rounds most: the one of the kernel's operands, or of the model's output."""
        return max(self.dtype, dtype(self.output), key=lambda kind: float(torch.finfo(kind).eps))


@dataclass(frozen=True)
class UnknownAttention:
    """Something that looks like attention, with the node at which understanding stopped."""

    name: str
    pattern: str
    anchor: fx.Node
    reason: Reason
