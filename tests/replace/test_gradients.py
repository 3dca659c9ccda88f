"""A rewritten model has the gradients of the model: what is detached there is detached here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from tests.helpers import Function, kernel_calls, relative_error


def weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 2, -1)


def by_hand(q: Tensor, k: Tensor, v: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    x = q @ k.mT / 2
    e = torch.exp(x - x.amax(-1, keepdim=True).detach())
    return (e / total(e.sum(-1, keepdim=True))) @ v


def without_gradient(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        w = weights(q, k)
    return w @ (v + b)


def scaled_detached(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    k = k * 1.0
    k.detach().mul_(2.0)
    return weights(q, k) @ (v + b)


def scaled_without_gradient(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    k = k * 1.0
    with torch.no_grad():
        k.mul_(2.0)
        k[:, :, 0] = b[:, :, 1]
    return weights(q, k) @ (v + b)


def rounded_bits(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    k = k * 1.0
    k.view(torch.int32).bitwise_and_(-65536)
    return weights(q, k) @ (v + b)


def rows_exchanged(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    joined = k.new_empty(2, 2, 8, 4)
    joined[:, :, :4], joined[:, :, 4:] = k, b[:, :, :1]
    return weights(q, joined) @ torch.cat([v, v + b], 2)


CASES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "all": (lambda q, k, v, b: torch.softmax(q @ k.mT / 2 + b, -1) @ v, 1),
    "no key": (lambda q, k, v, b: weights(q, k.detach()) @ (v + b), 1),
    "no query": (lambda q, k, v, b: F.scaled_dot_product_attention(q.detach() * 2, k, v + b), 1),
    "no value": (lambda q, k, v, b: weights(q + b, k) @ (v.detach() * 2), 1),
    "no bias": (lambda q, k, v, b: torch.softmax(q @ k.mT / 2 + 2 * b.detach(), -1) @ v, 1),
    "no largest": (lambda q, k, v, b: by_hand(q + b, k, v, lambda total: total), 1),
    "no sum": (lambda q, k, v, b: by_hand(q + b, k, v, torch.detach), 0),
    "no scores": (lambda q, k, v, b: torch.softmax((q @ k.mT).detach() + b, -1) @ v, 0),
    "no weights": (lambda q, k, v, b: weights(q, k).detach() @ (v + b), 0),
    "a region without": (without_gradient, 0),
    "a write without": (scaled_detached, 1),
    "writes in a region without": (scaled_without_gradient, 1),
    "a write of bits": (rounded_bits, 1),
    "copies": (rows_exchanged, 1),
}
"""An attention over query, key, value and bias, and how many are replaced."""


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    attention, replaced = CASES[name]
    inputs = tuple(2 * torch.randn(2, 2, 4, 4) for _ in range(4))
    rewritten = rewrite(Function(attention), inputs, config=RewriteConfig(policy="always", verify=False))
    assert len(kernel_calls(rewritten)) == replaced, str(rewritten.report)
    given = [tuple(t.clone().requires_grad_() for t in inputs) for _ in range(2)]
    for run, tensors in zip((attention, rewritten), given, strict=True):
        run(*tensors).square().sum().backward()
    for old, new in zip(*given, strict=True):
        assert (old.grad is None) == (new.grad is None)
        if old.grad is not None and new.grad is not None:
            assert relative_error(new.grad, old.grad) <= 10 * TOLERANCES[torch.float32]


def biased(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """An attention some of whose rows see no key, beside a way around it."""
    hidden = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    return v + torch.softmax((q @ k.mT / 2).masked_fill(~hidden, torch.finfo(q.dtype).min), -1) @ (v + b)


def rewritten_and_inputs() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 2, 4, 4) for _ in range(4))
    rewritten = rewrite(Function(biased), inputs, config=RewriteConfig(policy="always"))
    assert len(kernel_calls(rewritten)) == 1
    return rewritten, inputs


def test_second_derivatives_are_those_of_the_model() -> None:
    rewritten, inputs = rewritten_and_inputs()
    found = []
    for run in (biased, rewritten):
        given = tuple(t.clone().requires_grad_() for t in inputs)
        first = torch.autograd.grad(run(*given).square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), given))
    for old, new in zip(*found, strict=True):
        assert relative_error(new, old) <= 10 * TOLERANCES[torch.float32]


def test_derivatives_forwards_are_those_of_the_model() -> None:
    rewritten, inputs = rewritten_and_inputs()
    tangents = tuple(torch.randn_like(t) for t in inputs)
    old, new = (torch.func.jvp(run, inputs, tangents)[1] for run in (biased, rewritten))
    assert relative_error(new, old) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_result(dtype: torch.dtype) -> None:
    """The model casts the results of its projections, and a rotation makes float32 of two of them again."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
            turn = torch.cos(torch.arange(6.0))[:, None]
            return F.scaled_dot_product_attention(q * turn, k * turn, v)

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 6, 8)
    rewritten = rewrite(model, (x,), config=RewriteConfig(policy="always"))
    assert len(kernel_calls(rewritten)) == 1
    results = []
    for run in (model, rewritten):
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            y = run(x)
        y.float().square().sum().backward()
        results.append((y.detach(), model.qkv.weight.grad.clone()))  # type: ignore[union-attr]
    for old, new in zip(*results, strict=True):
        assert old.dtype == new.dtype
        assert relative_error(new, old) <= 4 * TOLERANCES[dtype]
