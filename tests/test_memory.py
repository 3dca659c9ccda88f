"""Weights are neither copied nor baked in: rewriting a model costs no second one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from neuron_attn_rewrite import RewriteConfig, rewrite


class Model(nn.Module):
    def __init__(self, heads, layers):
        super().__init__()
        self.heads, self.width = heads, 128 * heads
        self.layers = nn.ModuleList(nn.Linear(self.width, 3 * self.width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            q, k, v = (t.view(1, 8, self.heads, 128).transpose(1, 2) for t in layer(x).chunk(3, -1))
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(1, 8, self.width)
        return x


def peak():
    # Not getrusage: a process inherits that peak from the one that started it.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def work(model, x):
    config = RewriteConfig(policy="always", require="all")
    if sys.argv[1] == "rewrite":
        rewrite(model, (x,), config=config)(x)
    else:
        options = {"inner": "eager", "policy": "always", "require": "all"}
        torch.compile(model, backend="neuron_attn_rewrite", dynamic=False, options=options)(x)


with torch.no_grad():
    work(Model(1, 2).eval(), torch.randn(1, 8, 128))  # everything is imported and warm
    before = peak()
    model, x = Model(16, 6).eval(), torch.randn(1, 8, 2048)  # 302 MB
    model(x)
    one = peak()
    work(model, x)
    print(one - before, peak() - one)
"""


@pytest.mark.parametrize("door", ["rewrite", "compile"])
def test_no_second_gigabyte(door: str) -> None:
    """By peak memory, with 300 MB of weights, in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, door]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    model, more = map(int, done.stdout.split())
    assert model > 250, "the measure sees the weights"
    assert more < 100, f"{more} MB more than the model's {model} MB"
