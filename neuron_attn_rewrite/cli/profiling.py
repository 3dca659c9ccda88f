"""The calls that `profile` times: each kind of attention alone, as native operators and as a kernel."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch

from neuron_attn_rewrite.masks.spec import MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.report.data import SiteReport
from neuron_attn_rewrite.report.groups import groups
from neuron_attn_rewrite.report.report import RewriteReport

Make = Callable[[torch.device], Callable[[], Any]]


def calls(report: RewriteReport) -> Iterator[tuple[AttentionProblem, str, Make]]:
    """For each call: the problem, the name of the kernel, and a function that prepares the call on a device."""
    for group in groups(report):
        site = group.first
        if not site.is_replaced:
            continue
        space: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(report.reproducer(site), "reproducer", "exec"), space)
        yield problem_of(site), "native", _maker(space["model"], space["inputs"])
        yield problem_of(site), site.kernel, _maker(space["rewritten"], space["inputs"])


def problem_of(site: SiteReport) -> AttentionProblem:
    """The problem that the attention of a site poses."""
    assert isinstance(site.mask, MaskSpec) and site.dtype is not None and site.scale is not None
    query: Any = (site.batch, site.num_heads, site.q_len, site.head_dim)
    value: Any = (site.batch, site.num_kv_heads, site.kv_len, site.v_head_dim)
    return AttentionProblem.of(
        query,
        value,
        site.dtype,
        site.scale,
        site.mask,
        bias=site.bias,
        softcap=site.softcap,
        sink=site.sink,
    )


def _maker(model: Any, inputs: Callable[[], tuple[Any, ...]]) -> Make:
    def make(device: torch.device) -> Callable[[], Any]:
        moved = model.to(device)
        given = [x.to(device) for x in inputs()]
        return lambda: moved(*given)

    return make
