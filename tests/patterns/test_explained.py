"""Every softmax that an independent count finds in a graph is in the report."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.softmaxes import softmaxes, unexplained
from neuron_attn_rewrite import CaptureError, RewriteReport, rewrite
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.rewriter import rewrite_graph
from tests.helpers import ALWAYS
from tests.models import variants
from tests.patterns import guards, heads, layouts, masks, pieces, readers, scale, sdpa, traps
from tests.patterns import softmaxes as by_hand
from tests.patterns.cases import as_module
from tests.patterns.test_spellings import NO_ATTENTION

FAMILIES = (guards, heads, layouts, masks, pieces, readers, scale, sdpa, by_hand, traps)


def report_of(model: nn.Module, args: tuple[object, ...] = (), **kwargs: Tensor) -> tuple[list[str], RewriteReport]:
    """The softmaxes of the captured graph, by name, and the report."""
    captured = capture(model.eval(), args, kwargs, None)
    names = [node.name for node in softmaxes(captured.module.graph)]
    return names, rewrite_graph(captured.module, None, replace(ALWAYS, verify=False))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.rpartition(".")[2])
def test_every_softmax_of_the_spellings_is_in_the_report(family: ModuleType) -> None:
    for table in ("MATCH", "KEEP", "RIGHT"):
        for name, case in getattr(family, table, {}).items():
            torch.manual_seed(0)
            counted, report = report_of(as_module(case.attention), case.inputs())
            assert not unexplained(counted, report), (name, str(report))
            assert counted or not report.replaced, (name, str(report))


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_what_is_no_attention_is_not_counted(name: str) -> None:
    counted, report = report_of(as_module(NO_ATTENTION[name]), (torch.randn(24, 16), torch.randn(24, 16)))
    assert not counted and not report.sites


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_softmax_of_the_models_is_in_the_report(implementation: str) -> None:
    for family, how in variants():
        if how == implementation:
            try:
                counted, report = report_of(family.build(how), **family.call("ones"))
            except CaptureError:
                continue
            assert not unexplained(counted, report), (family.name, str(report))
            assert len(counted) == len(report.sites), (family.name, counted, str(report))


class Branches(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, flag: Tensor) -> Tensor:
        def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.transpose(2, 3), -1) @ v

        def by_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        result: Tensor = torch.cond(flag, by_hand, by_operator, (q, k, v))
        return result


def test_attentions_in_branches_are_in_the_report() -> None:
    inputs = (*(torch.randn(1, 2, 8, 16) for _ in range(3)), torch.tensor(True))
    counted, report = report_of(Branches(), inputs)
    assert len(counted) == len(report.sites) == 2 and not unexplained(counted, report)
    assert all("torch.cond" in site.reasons[-1] for site in report.sites)


def test_joined_operands_are_verified_on_drawn_values() -> None:
    """What the joined keys are made of is drawn, so that the model and the kernel read the same keys."""
    torch.manual_seed(0)
    case = pieces.MATCH["one maximum and one sum"]
    rewritten = rewrite(as_module(case.attention).eval(), case.inputs(), config=ALWAYS)
    assert len(rewritten.report.replaced) == 1, str(rewritten.report)
