"""Buffers and inputs that the model writes into: a kernel reads what the attention read, or is not used."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from tests.helpers import kernel_calls, relative_error

LENGTH = 6
UNVERIFIED = RewriteConfig(policy="always", verify=False)
"""What is wrong is to show, and not to be put back."""


class Written(nn.Module):
    """An attention of `x` [1, 2, LENGTH, 4] over buffers that it writes into."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        torch.manual_seed(1)
        self.register_buffer("cache", 3 * torch.randn(1, 2, LENGTH, 4))
        self.register_buffer("short", (3 * torch.randn(1, 2, LENGTH, 4)).half())
        self.register_buffer("flat", 3 * torch.randn(1, LENGTH, 8))
        self.register_buffer("both", 3 * torch.randn(2, 1, 2, LENGTH, 4))
        self.register_buffer("flags", torch.arange(LENGTH) % 2 == 0)
        self.register_buffer("shown", torch.rand(LENGTH, LENGTH) < 0.6)
        self.register_buffer("bias", 9 * torch.randn(LENGTH, LENGTH))
        self.register_buffer("scale", torch.tensor(0.4))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def update(cache: Tensor, x: Tensor) -> None:
    cache[:, :, :3] = x[:, :, :3]


def written_before(m: Any, x: Tensor) -> Tensor:
    update(m.cache, x)
    return attend(x, m.cache, m.cache)


def written_before_a_cast(m: Any, x: Tensor) -> Tensor:
    update(m.short, x)
    return attend(x, m.short.float(), m.short.float())


def written_before_a_copy(m: Any, x: Tensor) -> Tensor:
    heads = m.flat.view(1, LENGTH, 2, 4).transpose(1, 2)
    heads[:, :, :3] = x[:, :, :3]
    return attend(x, heads.contiguous() * 0.5, heads)


def written_after(m: Any, x: Tensor) -> Tensor:
    y = attend(x, m.cache, m.cache)
    update(m.cache, x)
    return y


def written_one_after_the_other(m: Any, x: Tensor) -> Tensor:
    keys, values = m.both.unbind(0)
    update(keys, x)
    update(values, 2 * x)
    return attend(x, keys, values)


def a_mask_written_before(m: Any, x: Tensor) -> Tensor:
    m.flags.logical_not_()
    return attend(x, x, x, m.flags[None].expand(LENGTH, LENGTH))


def two_layers(m: Any, x: Tensor) -> Tensor:
    update(m.short, x)
    x = x + attend(x, m.short.float(), m.short.float())
    update(m.short, x)
    return x + attend(x, m.short.float(), m.short.float())


def written_between_the_products(m: Any, x: Tensor) -> Tensor:
    weights = torch.softmax(x @ m.cache.mT, -1)
    update(m.cache, x)
    return weights @ m.cache


def keys_copied_before_the_write(m: Any, x: Tensor) -> Tensor:
    keys = m.cache.clone()
    update(m.cache, x)
    return attend(x, keys, m.cache)


def a_part_written_between(m: Any, x: Tensor) -> Tensor:
    keys, values = m.both.unbind(0)
    weights = torch.softmax(x @ keys.mT, -1)
    update(values, x)
    return weights @ values + keys


def a_mask_copied_before_the_write(m: Any, x: Tensor) -> Tensor:
    shown = m.flags.clone()
    m.flags.logical_not_()
    return attend(x, x, x, shown[None].expand(LENGTH, LENGTH))


def two_states_of_one_mask(m: Any, x: Tensor) -> Tensor:
    before = m.flags.clone()
    m.flags.logical_not_()
    return attend(x, x, x, ((before ^ m.flags) & (torch.arange(LENGTH) > 1))[None].expand(LENGTH, LENGTH))


def a_view_of_a_mask(m: Any, x: Tensor) -> Tensor:
    shown = m.shown[None]
    m.shown.logical_not_()
    return attend(x, x, x, shown)


def a_bias_copied_before_the_write(m: Any, x: Tensor) -> Tensor:
    scores = x @ x.mT + m.bias
    m.bias.neg_()
    return torch.softmax(scores, -1) @ x


def a_scale_written_between(m: Any, x: Tensor) -> Tensor:
    weights = torch.softmax(x @ x.mT * m.scale, -1)
    m.scale.neg_()
    return weights @ x


def scaled_in_place_after(m: Any, x: Tensor) -> Tensor:
    weights = torch.softmax(x @ m.cache.mT, -1)
    m.cache.mul_(0.5)
    return weights @ m.cache


def scaled_in_place_before(m: Any, x: Tensor) -> Tensor:
    return attend(x, m.cache.mul_(0.5), m.cache)


def written_as_an_output(m: Any, x: Tensor) -> Tensor:
    torch.mul(m.cache, 0.5, out=m.cache)
    return attend(x, m.cache, m.cache)


def written_in_a_list(m: Any, x: Tensor) -> Tensor:
    keys = m.cache * 0.5
    torch._foreach_mul_([m.cache], 2.0)
    return attend(x, keys, m.cache)


CASES: dict[Callable[[Any, Tensor], Tensor], int] = {
    written_before: 1,
    written_before_a_cast: 1,
    written_before_a_copy: 1,
    written_after: 1,
    written_one_after_the_other: 1,
    a_mask_written_before: 1,
    two_layers: 2,
    two_states_of_one_mask: 1,
    a_view_of_a_mask: 1,
    scaled_in_place_before: 1,
    written_as_an_output: 1,
    # What is written between two nodes of an attention stays native.
    written_between_the_products: 0,
    keys_copied_before_the_write: 0,
    a_mask_copied_before_the_write: 0,
    a_part_written_between: 0,
    a_bias_copied_before_the_write: 0,
    a_scale_written_between: 0,
    scaled_in_place_after: 0,
    written_in_a_list: 0,
}
"""How many attentions are replaced."""


@pytest.mark.parametrize("run", CASES, ids=lambda run: run.__name__)
def test_a_kernel_reads_what_the_attention_read(run: Callable[[Any, Tensor], Tensor]) -> None:
    x = 3 * torch.randn(1, 2, LENGTH, 4)
    model, shares = Written(run), Written(run)
    rewritten = rewrite(shares, (x,), config=UNVERIFIED)
    for _ in range(3):  # each call finds what the one before has left
        x = 3 * torch.randn(1, 2, LENGTH, 4)
        assert relative_error(rewritten(x), model(x)) <= TOLERANCES[torch.float32], str(rewritten.report)
        for a, b in zip(model.buffers(), shares.buffers(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert len(kernel_calls(rewritten)) == CASES[run], str(rewritten.report)
    assert all(site.reasons[-1].code == "written" for site in rewritten.report.kept)  # type: ignore[attr-defined]


class Counted(nn.Module):
    """Counts its calls in an object that is no module, as a cache of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("length", torch.zeros((), dtype=torch.int64))
        self.cache = SimpleNamespace(length=self.length)

    def forward(self, x: Tensor) -> Tensor:
        self.cache.length.add_(1)
        return attend(x, x, x)


def test_a_rewrite_does_not_count() -> None:
    model = Counted()
    rewritten = rewrite(model, (torch.randn(1, 2, LENGTH, 4),), config=RewriteConfig(policy="always"))
    assert model.length == 0
    rewritten(torch.randn(1, 2, LENGTH, 4))
    assert model.length == 1
