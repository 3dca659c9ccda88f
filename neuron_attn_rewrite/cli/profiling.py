"""The calls that `profile` times: each kind of attention of a report, alone, as it was and as a kernel."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch

from neuron_attn_rewrite.masks.spec import MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.report.groups import groups
from neuron_attn_rewrite.report.model import RewriteReport, SiteReport

Make = Callable[[torch.device], Callable[[], Any]]


def calls(report: RewriteReport) -> Iterator[tuple[AttentionProblem, str, Make]]:
    """Problem, kernel name, and what makes the call on a device."""
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
    """What the attention of an understood site computes."""
    assert isinstance(site.mask, MaskSpec) and site.dtype is not None and site.scale is not None
    sizes = {
        name: getattr(site, name)
        for name in ("batch", "num_heads", "num_kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim")
    }
    bias: Any = site.bias
    return AttentionProblem(
        **sizes,
        dtype=site.dtype,
        scale=site.scale,
        mask=site.mask,
        bias_shape=bias,
        softcap=site.softcap,
        sink=site.sink,
    )


def _maker(model: Any, inputs: Callable[[], tuple[Any, ...]]) -> Make:
    def make(device: torch.device) -> Callable[[], Any]:
        moved = model.to(device)
        given = [x.to(device) for x in inputs()]
        return lambda: moved(*given)

    return make
