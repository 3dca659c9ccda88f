"""The result of a proof: what is known of the masks of one attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from neuron_attn_rewrite.masks.bounds import KeyBound
from neuron_attn_rewrite.masks.spec import EmptyRows, MaskSpec
from neuron_attn_rewrite.patterns.axes import Layout
from neuron_attn_rewrite.patterns.site import Term
from neuron_attn_rewrite.reasons import Reason


@dataclass(frozen=True)
class Padding:
    """The run-time vector behind a `KeyPadding`: columns `[start, start + kv_len)` of the 0/1 tensor `node`."""

    node: fx.Node
    start: int
    inverted: bool
    """True where 1 means hidden."""


@dataclass(frozen=True)
class Dense:
    """A term that the kernel gets as an additive operand of [batch | 1, heads | 1, q_len | 1, kv_len | 1]."""

    term: Term
    layout: Layout
    """The steps from the term's tensor to this operand."""
    fill: float = -torch.inf
    """What a `show` or `hide` term adds to a hidden score."""


@dataclass(frozen=True)
class Proof:
    """What is known of all terms of a site together."""

    mask: MaskSpec = field(default_factory=MaskSpec)
    """The claims, as the report shows them."""
    paddings: tuple[Padding, ...] = ()
    """The tensors behind the `KeyPadding` claims."""
    dense: tuple[Dense, ...] = ()
    """The terms for which there is no claim."""
    empty_rows: EmptyRows = EmptyRows.NEVER
    reasons: tuple[Reason, ...] = ()
    key_bounds: tuple[KeyBound, ...] = ()
    """The bounds behind the `Limited` claims."""
    promised: tuple[Padding, ...] = ()
    """Key padding that was dropped because the caller promised right padding."""
