"""What compile caches on disk keep of a rewritten graph: the same again is found, and nothing else is taken for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from neuron_attn_rewrite import RewriteConfig
from neuron_attn_rewrite.backends import dynamo
from neuron_attn_rewrite.backends.inductor import InductorPass, pass_id
from neuron_attn_rewrite.ops import flash_fwd as flash_fwd_ops
from tests.helpers import relative_error

HIT, MISS = "autograd_cache_hit", "autograd_cache_miss"


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    yield
    torch._dynamo.reset()


class Blocks:
    """Its mask becomes a constant of the graph, the same but for its values at each size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        i = torch.arange(12, device=query.device) // self.size
        return F.scaled_dot_product_attention(query, key, value, attn_mask=i[:, None] >= i[None])


def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [(3 * torch.randn(1, 2, 12, 8, generator=generator)).requires_grad_() for _ in range(3)]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def compiled(size: int, order: tuple[int, ...] = (0, 1, 2), **options: Any) -> str:
    """How the cache was used; the numbers must be those of the function, its gradients in this order."""
    torch._dynamo.reset()
    counters.clear()
    function = torch.compile(Blocks(size), **(options or {"backend": "neuron_attn_rewrite", "options": ALWAYS}))
    with inductor.patch({"cpp.vec_isa_ok": True}):  # spares a compiler run
        out, *grads = gradients(function)
    expected, *slopes = gradients(Blocks(size))
    assert relative_error(out, expected) < 2e-5
    assert all(relative_error(a, slopes[i]) < 1e-4 for a, i in zip(grads, order, strict=True))
    (found,) = (name for name in (HIT, MISS) if counters["aot_autograd"][name])
    return found


ALWAYS = {"inner": "inductor", "policy": "always"}


def test_another_process_finds_the_graph_and_takes_no_other_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "from tests.backends.test_compile_cache import *; print(pass_id(RewriteConfig()), compiled(5))"
    assert compiled(5) == MISS
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.split()[-2:] == [pass_id(RewriteConfig()), HIT]
    compiled(4)
    other = {"backend": "neuron_attn_rewrite", "options": {**ALWAYS, "target": "trn1"}}
    assert compiled(5, **other) == MISS
    backward = flash_fwd_ops._Attention.backward

    def swapped(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        by_query, by_key, *others = backward(ctx, grad)
        return by_key, by_query, *others

    monkeypatch.setattr(flash_fwd_ops._Attention, "backward", staticmethod(swapped))
    monkeypatch.setattr(dynamo, "sources", lambda: "another version")
    assert compiled(5, order=(1, 0, 2)) == MISS


def test_the_hook_of_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    def hooked(size: int, **config: Any) -> str:
        with inductor.patch(pre_grad_custom_pass=InductorPass(RewriteConfig(policy="always", **config))):
            return compiled(size, backend="inductor")

    assert hooked(5) == MISS
    assert hooked(5) == HIT
    hooked(4)
    assert hooked(5, target="trn1") == MISS
    monkeypatch.setattr("neuron_attn_rewrite.backends.inductor.sources", lambda: "another version")
    monkeypatch.setattr(dynamo, "sources", lambda: "another version")
    assert hooked(5) == MISS
