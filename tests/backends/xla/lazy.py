"""Rewritten modules and the op itself on lazy tensors: largest relative differences from the CPU."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
import torch_xla
from torch import Tensor, nn

from neuron_attn_rewrite import RewriteConfig, collect_reports, rewrite
from tests.helpers import relative_error

ALWAYS = RewriteConfig(policy="always")
flash = torch.ops.neuron_attn.flash_fwd


class Cached(nn.Module):
    """Constants, literals of a device, a cache that is written, and an assertion."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 2, 12, 8))
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        torch._assert(x.shape[2] == 4, "four rows")
        self.cache[:, :, :4] += x
        rows = torch.arange(4, device=x.device)[:, None] + 8
        shown = (torch.arange(12, device=x.device) <= rows) & attention_mask[:, None, None].bool()
        scale = torch.tensor([2.0, 1.0] * 4)
        y = F.scaled_dot_product_attention(
            x @ self.weight * scale.to(x.device), self.cache, self.cache, attn_mask=shown
        )
        return y + torch.full((8,), 0.5, device=x.device)


def module() -> float:
    x, mask = torch.randn(1, 2, 4, 8), torch.tensor([[1] * 9 + [0] * 3])
    model = Cached().eval()
    rewritten = rewrite(model, (x, mask), config=ALWAYS)
    assert len(rewritten.report.replaced) == 1
    with torch.no_grad():
        expected = model(x, mask)
        model.cache.zero_()
        rewritten.to("xla")
        got = rewritten(x.to("xla"), mask.to("xla"))
    assert rewritten.cache.any()
    return relative_error(got.cpu(), expected)


def training() -> float:
    x = torch.randn(1, 2, 12, 8)
    model = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), attention=_Self())).train()
    rewritten = rewrite(model, (x,), config=ALWAYS)
    model(x).square().sum().backward()
    expected = model.first.weight.grad.clone()
    rewritten.to("xla")
    rewritten.zero_grad()
    rewritten(x.to("xla")).square().sum().backward()
    return relative_error(rewritten.first.weight.grad.cpu(), expected)


class _Self(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def every_operand() -> float:
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 6)
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, 9:] = False
    lo = torch.arange(10).clamp_max(5)
    options: dict[str, Any] = {
        "key_padding": padding,
        "bounds": torch.stack([lo, lo + 6], -1)[None].int(),
        "bias": torch.randn(1, 4, 10, 12),
        "sink": torch.randn(4),
    }
    on_xla = {name: value.to("xla") for name, value in options.items()}
    plain = {"scale": 0.3, "softcap": 5.0, "band_upper": 2}
    got = flash(q.to("xla"), k.to("xla"), v.to("xla"), **plain, **on_xla)
    return relative_error(got.cpu(), flash(q, k, v, **plain, **options))


def compiled() -> tuple[int, float]:
    """The backend with XLA tensors and the inner backend that goes with them."""
    x = torch.randn(1, 2, 12, 8)
    function = torch.compile(_Self(), backend="neuron_attn_rewrite", options={"policy": "always"})
    with torch.no_grad(), collect_reports() as reports:
        got = function(x.to("xla")).cpu()
    assert reports.graphs[0].inner == "openxla", reports
    error = relative_error(got, _Self()(x))
    assert error < 1e-5, error
    return len(reports.report.replaced), error


if __name__ == "__main__":
    torch.manual_seed(0)
    torch_xla.device()
    print(
        json.dumps(
            {
                "module": module(),
                "training": training(),
                "operands": every_operand(),
                "compile with openxla": compiled(),
            }
        )
    )
