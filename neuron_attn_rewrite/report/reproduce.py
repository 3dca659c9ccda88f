"""Writes a script that rebuilds one attention alone, for a bug report.

An attention that was understood is rebuilt from its sizes and its mask. Otherwise the script calls the operators around
the softmax one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.masks.spec import Band, Chunked, Intervals, KeyPadding, MaskSpec
from neuron_attn_rewrite.report.data import NodeReport, ReportData, SiteReport


def reproducer(report: ReportData, site: SiteReport) -> str:
    """The source of the script.

    Raises:
        InputError: the report does not hold the nodes of the site.
    """
    body = _rebuilt(site) if _can_be_rebuilt(site) else _replayed(site)
    return "\n".join([*_head(report, site), *body, *_tail(report, site)]) + "\n"


def _head(report: ReportData, site: SiteReport) -> Iterator[str]:
    source = f", {site.source}" if site.source else ""
    yield f'"""The attention {site.name}{source}, alone: {site.pattern}.'
    yield ""
    yield f"Made with {report.made_with or 'neuron_attn_rewrite'}."
    yield '"""'
    yield ""
    yield "import operator  # noqa: F401"
    yield ""
    yield "import torch"
    yield "from torch import nn"
    yield ""
    yield "from neuron_attn_rewrite import RewriteConfig, rewrite"
    if _can_be_rebuilt(site):
        yield "from neuron_attn_rewrite.masks.spec import *  # noqa: F403"
    yield ""
    yield "torch.manual_seed(0)"
    yield ""
    yield ""


def _tail(report: ReportData, site: SiteReport) -> Iterator[str]:
    strategy = next((r for r in site.reasons if r.code == "strategy-forced"), None)
    if strategy:
        yield f"# {strategy}"
    yield f'config = RewriteConfig(target="{report.target}", lnc={report.lnc}, policy="{report.policy}")'
    yield "model = Attention().eval()"
    yield "rewritten = rewrite(model, inputs(), config=config)"
    yield "print(rewritten.report)"
    yield ""
    yield "fresh = inputs()"
    yield "with torch.no_grad():"
    yield "    for old, new in zip(model(*fresh), rewritten(*fresh)):"
    yield "        error = (old.double() - new.double()).abs().max() / old.double().abs().max()"
    yield '        print(f"largest difference on fresh inputs: {error:.1e} of the largest output")'


# Rebuilt from sizes and mask

REBUILT = (Band, Chunked, Intervals, KeyPadding)
"""Claims that define a mask completely. The others depend on run-time numbers that the report does not hold."""


def _can_be_rebuilt(site: SiteReport) -> bool:
    return isinstance(site.mask, MaskSpec) and all(isinstance(claim, REBUILT) for claim in site.mask.claims)


def _rebuilt(site: SiteReport) -> Iterator[str]:
    assert isinstance(site.mask, MaskSpec) and site.num_heads and site.num_kv_heads
    static = MaskSpec(tuple(c for c in site.mask.claims if not isinstance(c, KeyPadding)))
    padded = static != site.mask
    masked = bool(site.mask.claims)
    group = site.num_heads // site.num_kv_heads
    names = ["query", "key", "value"] + ["attention_mask"] * padded + ["bias"] * bool(site.bias)
    yield "class Attention(nn.Module):"
    yield "    def __init__(self):"
    yield "        super().__init__()"
    if static.claims:
        yield f"        mask = {static!r}"
        yield f'        self.register_buffer("visible", mask.visible({site.q_len}, {site.kv_len}))'
    if site.sink:
        yield f"        self.sink = nn.Parameter(torch.randn({site.num_heads}, dtype={site.dtype}))"
    yield ""
    yield f"    def forward(self, {', '.join(names)}):"
    if group > 1:
        yield f"        key, value = (x.repeat_interleave({group}, dim=1) for x in (key, value))"
    yield f"        scores = query @ key.transpose(-1, -2) * {site.scale!r}"
    if site.softcap:
        yield f"        scores = {site.softcap!r} * torch.tanh(scores / {site.softcap!r})"
    if site.bias:
        yield "        scores = scores + bias"
    if masked:
        parts = ["self.visible"] * bool(static.claims) + ["attention_mask[:, None, None, :].bool()"] * padded
        yield f"        visible = {' & '.join(parts)}"
        yield "        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)"
    if site.sink:
        yield "        sink = self.sink.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)"
        yield "        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]"
    else:
        yield "        weights = scores.softmax(-1)"
    yield "        return (weights @ value,)"
    yield ""
    yield ""
    yield "def inputs():"
    for name, heads, length, width in (
        ("query", site.num_heads, site.q_len, site.head_dim),
        ("key", site.num_kv_heads, site.kv_len, site.head_dim),
        ("value", site.num_kv_heads, site.kv_len, site.v_head_dim),
    ):
        yield f"    {name} = torch.randn({site.batch}, {heads}, {length}, {width}, dtype={site.dtype})"
    if padded:
        yield f"    attention_mask = torch.ones({site.batch}, {site.kv_len}, dtype=torch.int64)"
    if site.bias:
        yield f"    bias = torch.randn({', '.join(map(str, site.bias))}, dtype={site.dtype})"
    yield f"    return {', '.join(names)}"
    yield ""
    yield ""


# Operators one by one


def _replayed(site: SiteReport) -> Iterator[str]:
    operands = [n for n in site.before if n.is_operand]
    calls = [n for n in site.before if not n.is_operand]
    if not calls:
        raise InputError(f"the report does not hold the nodes of {site.name}, so it can't be rebuilt.")
    read = {i for n in calls for i in n.inputs}
    results = [n.name for n in calls if n.name not in read and n.shape is not None]
    yield "class Attention(nn.Module):"
    yield f"    def forward(self, {', '.join(n.name for n in operands)}):"
    for node in calls:
        yield f"        {node.name} = {node.call}"
    yield f"        return ({', '.join(results)},)"
    yield ""
    yield ""
    yield "def inputs():"
    for node in operands:
        yield f"    {node.name} = {_example(node)}"
    yield f"    return ({', '.join(n.name for n in operands)},)"
    yield ""
    yield ""


def _example(node: NodeReport) -> str:
    """An input of the node's shape and dtype: random numbers for a floating-point dtype, otherwise ones."""
    if node.shape is None or node.dtype is None:
        return "None"
    size = f"({', '.join(map(str, node.shape))}{',' * (len(node.shape) == 1)})"
    how = "randn" if node.dtype.is_floating_point else "ones"
    assert isinstance(node.dtype, torch.dtype)
    return f"torch.{how}({size}, dtype={node.dtype})"
