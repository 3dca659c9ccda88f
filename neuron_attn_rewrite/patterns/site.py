"""The normal form of a found attention: `softmax(softcap(scale * q k^T) + terms, sink) v` with every axis named.

docs/normal_form.md says of each field what it may hold and who reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import dtype
from neuron_attn_rewrite.patterns.axes import Dims, Layout, layout_steps
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.exact import number_in
from neuron_attn_rewrite.values.ranges import LARGE

MASKED = -LARGE
"""A score that is set to this number or less counts as hidden.

In float32 exp(x) is 0 below x = -104. So the weight is exactly 0 as long as the scores that are not hidden lie above
-9880.
"""


OVERFLOWS = Reason("overflow", "the model reads the NaN of rows whose exponentials overflow, or are all 0")


def hides(number: float) -> bool:
    """Whether a score that is set to a number counts as hidden. False for NaN."""
    return number <= MASKED


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph, what its dims run over, and what the dims of the kernel's operand run over."""

    node: fx.Node
    dims: Dims
    target: Dims
    broadcasts: bool = False
    """Whether a target dim stays of size 1 if the tensor does not run over it. Otherwise the tensor is expanded."""
    origin: tuple[fx.Node, Dims] | None = None
    """The tensor of which `node` is a view, and what its dims run over; None if it can't be read instead of `node`."""

    @property
    def layout(self) -> Layout:
        """The steps from the tensor to the kernel's operand."""
        steps = layout_steps(self.dims, self.target, full=not self.broadcasts)
        assert steps is not None, self
        return steps


@dataclass(frozen=True)
class Term:
    """Something that changes the scores before the softmax.

    `add` adds `multiplier * node`. `show` replaces the scores by `fill` where the node is False or 0, `hide` where the
    node is True or not 0.
    """

    kind: str
    node: fx.Node
    dims: Dims
    multiplier: float = 1.0
    fill: float = -torch.inf
    zeroes_weights: bool = False
    """Whether the model also sets the weights that this term hides to zero, after the softmax."""
    limit: float = torch.inf
    """The magnitude beyond which the model's scores are infinite behind this term: a later cast may have a smaller
    range."""
    rounds_alike: bool = True
    """Whether the model rounds the sum of score and term as a kernel does: -1e9 rounds scores to multiples of 64. It
    does not if it has shifted the score before, or multiplies the sum by something else than a power of two."""

    def hiding(self, number: float) -> float:
        """The number by which an `add` term hides a key where its tensor holds `number`, as the model rounds it."""
        kind = dtype(self.node)
        kind = torch.promote_types(kind, torch.float32) if kind.is_floating_point else torch.float32
        fill = number_in(kind, number * self.multiplier)
        return -torch.inf if fill < -self.limit else fill


@dataclass(frozen=True)
class OperandScale:
    """A tensor that multiplies or divides an operand of the kernel, or its output.

    On the query and the output it is [batch | 1, heads | 1, q_len | 1, 1], on the value [batch | 1, kv heads | 1,
    kv_len | 1, 1].
    """

    on: str
    """"query", "value" or "output"."""
    operand: Operand
    divides: bool


@dataclass(frozen=True)
class Reader:
    """A node outside of the attention that reads a tensor inside of it. That tensor has to stay in the graph."""

    what: str
    """"weights", "scores" or "log-sum-exp"."""
    node: fx.Node


@dataclass(frozen=True, kw_only=True)
class SoftmaxFacts:
    """What the softmax of an attention computes, apart from its operands.

    `Scores`, `Found` and `AttentionSite` all have these fields, and each hands them to the next one with `facts`.
    """

    terms: tuple[Term, ...] = ()
    """In the order in which they are applied to the scores."""
    is_causal: bool = False
    """The operator's own top-left causal flag."""
    softcap: float | None = None
    safe: bool = False
    """Whether a row of -inf scores gives zeros (scaled_dot_product_attention) and not NaN (softmax)."""
    floor: float = -torch.inf
    """A lower limit of all scores, applied after the terms."""
    overflows: bool = False
    """Whether all exponentials of a row may be 0, or one may be infinite, as without a maximum that is subtracted. The
    model then gives NaN where a kernel gives numbers."""

    def facts(self) -> dict[str, Any]:
        """The fields of `SoftmaxFacts` by name, without those of the subclass."""
        return {field.name: getattr(self, field.name) for field in fields(SoftmaxFacts)}


@dataclass(frozen=True)
class AttentionSite(SoftmaxFacts):
    """One attention of the graph, ready to be proven and chosen for."""

    name: str
    """Path of the module that computes it, such as `model.layers.0.self_attn`."""
    pattern: str
    """How it was written: the operator, or the two products and the steps between them."""
    anchor: fx.Node
    """The softmax or scaled_dot_product_attention node."""
    output: fx.Node
    """The node whose value the kernel computes."""
    output_dims: Dims
    """What the dims of the output run over."""
    result: Dims
    """What the dims of the kernel's result run over: [batch, num_heads, q_len, v_head_dim]."""
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
    """A number that multiplies the output."""
    operand_scales: tuple[OperandScale, ...] = ()
    sink: Operand | None = None
    """To [num_heads]."""
    readers: tuple[Reader, ...] = ()
    """The nodes outside of the attention that read its weights, scores or log-sum-exp."""

    @property
    def output_layout(self) -> Layout:
        """The steps from the kernel's result to the output."""
        steps = layout_steps(self.result, self.output_dims)
        assert steps is not None, self
        return steps

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Every tensor that the kernel call reads, except the masks."""
        scales = tuple(scale.operand for scale in self.operand_scales)
        return (self.query, self.key, self.value, *scales, *([self.sink] if self.sink else []))

    @property
    def coarsest(self) -> torch.dtype:
        """The less precise of two dtypes: that of the kernel's operands and that of the model's output."""
        return max(self.dtype, dtype(self.output), key=lambda kind: float(torch.finfo(kind).eps))


@dataclass(frozen=True)
class UnknownAttention:
    """Something that looks like attention, and the reason why it could not be read."""

    name: str
    pattern: str
    anchor: fx.Node
    reason: Reason
    others: tuple[fx.Node, ...] = ()
    """The other softmaxes and exponentials that are parts of it."""
