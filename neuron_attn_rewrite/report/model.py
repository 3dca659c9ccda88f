"""The report as data, and as text and JSON. It decides nothing: every word in it was a reason before."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import torch

from neuron_attn_rewrite.masks.spec import MaskSpec, Unproven
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.strategy.strategies import FlashAttentionStrategy


@dataclass(frozen=True)
class SiteReport:
    """One attention, before and after. Sizes are None where the attention was not understood."""

    name: str
    """Path of the module that computes it."""
    pattern: str
    """How it was written."""
    batch: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    q_len: int | None = None
    kv_len: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    dtype: torch.dtype | None = None
    scale: float | None = None
    softcap: float | None = None
    sink: bool = False
    bias: tuple[int, ...] | None = None
    """Shape of the dense additive operand."""
    mask: MaskSpec | Unproven | None = None
    strategy: FlashAttentionStrategy = FlashAttentionStrategy.NONE
    kernel: str = "native"
    reasons: tuple[Reason, ...] = ()
    """Every rule that spoke, in order."""
    removed_nodes: tuple[str, ...] = ()
    added_nodes: tuple[str, ...] = ()
    max_error: float | None = None
    """Largest difference on the example inputs, relative to the largest magnitude; None if there was nothing to run."""

    @property
    def is_replaced(self) -> bool:
        return bool(self.added_nodes)


@dataclass(frozen=True)
class RewriteReport:
    """Every attention of a model, and what became of it."""

    sites: tuple[SiteReport, ...]
    target: str
    lnc: int
    policy: str
    nodes_before: int
    nodes_after: int
    unused_inputs: tuple[str, ...] = ()
    """Tensor inputs that the captured graph does not read: whatever is passed there changes nothing."""

    @property
    def replaced(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.is_replaced)

    @property
    def kept(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if not site.is_replaced)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a caller should read even if the numbers look right."""
        back = tuple(f"{s.name} stays native, {r}" for s in self.kept for r in s.reasons if r.code == "put-back")
        unused = tuple(
            f"the captured graph does not read its input {name}: what is passed there changes nothing. "
            "If it matters, capture with an example that uses it, such as a padded attention_mask."
            for name in self.unused_inputs
        )
        return back + unused

    def to_json(self) -> str:
        """The whole report as a JSON object."""
        data = _plain(self)
        data["replaced"], data["kept"] = len(self.replaced), len(self.kept)
        return json.dumps(data, indent=2)

    def __str__(self) -> str:
        lines = [
            f"{len(self.replaced)} of {len(self.sites)} attentions replaced for {self.target} "
            f"(LNC {self.lnc}, policy {self.policy}), {self.nodes_before} -> {self.nodes_after} nodes"
        ]
        for name in self.unused_inputs:
            lines.append(f"input {name} is not read by the captured graph")
        for _, group in groupby(self.sites, key=_what_matters):
            lines += ["", *_text(list(group))]
        return "\n".join(lines)


def _what_matters(site: SiteReport) -> SiteReport:
    """The site without what differs from layer to layer."""
    reasons = tuple(Reason(r.code, r.split(" is a dense operand")[-1]) for r in site.reasons)
    return replace(site, name="", removed_nodes=(), added_nodes=(), max_error=None, reasons=reasons)


def _text(group: list[SiteReport]) -> list[str]:
    site = group[0]
    name = site.name if len(group) == 1 else f"{site.name} ... {group[-1].name}  ({len(group)} times)"
    lines = [f"{'+' if site.is_replaced else '-'} {name}", f"    pattern   {site.pattern}"]
    if site.q_len is not None:
        query = [site.batch, site.num_heads, site.q_len, site.head_dim]
        key = [site.batch, site.num_kv_heads, site.kv_len, site.head_dim]
        value = "" if site.v_head_dim == site.head_dim else f", v_head_dim {site.v_head_dim}"
        extras = [f"softcap {site.softcap:g}"] if site.softcap else []
        extras += ["sink"] if site.sink else []
        extras += [f"bias {list(site.bias)}"] if site.bias else []
        kind = str(site.dtype).removeprefix("torch.")
        lines.append(f"    shape     query {query}, key {key}{value}, {kind}, scale {site.scale:.6g}")
        lines.append(f"    mask      {site.mask}{''.join(f', {extra}' for extra in extras)}")
    lines.append(f"    becomes   {site.kernel} ({site.strategy.name})")
    lines += [f"    {'why' if i == 0 else '':<9} {reason}" for i, reason in enumerate(site.reasons)]
    if site.is_replaced:
        removed, added = (sum(len(getattr(s, f)) for s in group) for f in ("removed_nodes", "added_nodes"))
        lines.append(f"    nodes     {removed} removed, {added} added")
    errors = [s.max_error for s in group if s.max_error is not None]
    if errors:
        lines.append(f"    error     {max(errors):.1e} of the largest output, at most")
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, (RewriteReport, SiteReport)):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, FlashAttentionStrategy):
        return value.name
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
