"""Regions under torch.autocast, inside the model and around it: the casts are in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuron_attn_rewrite import collect_reports, rewrite
from tests.helpers import ALWAYS, kernel_calls, relative_error


class Inside(nn.Module):
    """Projects and attends under autocast, with the padding as an added mask; a part of the region is in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = (t.view(2, 64, 2, 16).transpose(1, 2) for t in self.project(x).chunk(3, -1))
            bias = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
            with torch.no_grad():
                attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            with torch.autocast("cpu", enabled=False):
                exact = self.out(attended.float().transpose(1, 2).reshape(2, 64, 32))
        return attended, exact


class ByHand(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (q @ k.mT * 0.25).softmax(-1) @ v


def padded() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[0, :20] = 0
    return torch.randn(2, 64, 32), mask


@pytest.mark.parametrize("door", ["rewrite", "compile"])
def test_a_region_inside_the_model(door: str) -> None:
    model, (x, mask) = Inside().eval(), padded()
    with collect_reports() as reports, torch.no_grad():
        if door == "rewrite":
            new: Any = rewrite(model, (x, mask), config=ALWAYS)
        else:
            new = torch.compile(model, backend="neuron_attn_rewrite", options={"policy": "always"})
        for given in ((x, mask), padded(), (x, mask.index_fill(0, torch.tensor([1]), 0))):
            for a, b in zip(new(*given), model(*given), strict=True):
                assert a.dtype == b.dtype and relative_error(a, b) < 2e-2
    report = new.report if door == "rewrite" else reports.report
    (site,) = report.sites
    assert "bfloat16" in str(report), str(report)
    assert site.is_replaced, str(report)


@pytest.mark.parametrize("door", ["rewrite", "compile"])
def test_attention_by_hand_in_a_region(door: str) -> None:
    model, operands = ByHand(), tuple(torch.randn(1, 2, 64, 16) for _ in range(3))
    with torch.no_grad():
        if door == "rewrite":
            new: Any = rewrite(model, operands, config=ALWAYS)
            assert len(kernel_calls(new)) == 1, str(new.report)
        else:
            new = torch.compile(model, backend="neuron_attn_rewrite", options={"policy": "always"})
        assert new(*operands).dtype == torch.bfloat16
        assert relative_error(new(*operands), model(*operands)) < 2e-2


def test_no_switch_of_autocast_is_left() -> None:
    rewritten = rewrite(Inside().eval(), padded(), config=ALWAYS)
    assert not [n for n in rewritten.graph.nodes if "autocast" in str(n.target)]
    casts = [n for n in rewritten.graph.nodes if n.target is torch.ops.aten.to.dtype]
    assert casts and all(n.args[1] != n.args[0].meta["val"].dtype for n in casts if n.args[1] == torch.bfloat16)


def test_autocast_around_the_rewrite_is_part_of_the_result() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.view(2, 64, 2, 16).transpose(1, 2) for t in self.project(x).chunk(3, -1))
            return nn.functional.scaled_dot_product_attention(q, k, v)

    model, x = Plain().eval(), torch.randn(2, 64, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rewritten, expected = rewrite(model, (x,), config=ALWAYS), model(x)
        assert relative_error(rewritten(x), expected) < 2e-2
    assert rewritten(x).dtype == torch.bfloat16 and "bfloat16" in str(rewritten.report)
    assert relative_error(rewritten(x), expected) < 2e-2
