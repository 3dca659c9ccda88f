"""Which inputs are taken to hold only 0 and 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuron_attn_rewrite import rewrite
from tests.helpers import ALWAYS, relative_error

KEYS = 12


class Lengths(nn.Module):
    """Lengths that come in as `attention_mask`, which by contract holds only 0 and 1."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        seen = torch.arange(KEYS) < attention_mask[:, None]
        return (q @ k.mT).masked_fill(~seen[:, None, None], float("-inf")).softmax(-1) @ v


def test_an_example_that_breaks_the_contract_is_believed() -> None:
    torch.manual_seed(0)
    qkv = tuple(torch.randn(3, 2, 2, KEYS, 4).unbind(0))
    rewritten = rewrite(Lengths(), (*qkv, torch.tensor([4, 9])), config=ALWAYS)
    assert "binary-input" not in {reason.code for reason in rewritten.report.sites[0].reasons}
    for lengths in ([12, 1], [5, 7]):
        call = (*qkv, torch.tensor(lengths))
        assert relative_error(rewritten(*call), Lengths()(*call)) < 2e-5


def test_an_example_of_ones_is_taken_for_a_mask() -> None:
    class Hidden(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
            return (q @ k.mT + (1 - attention_mask[:, None, None].float()) * -1e30).softmax(-1) @ v

    qkv = tuple(torch.randn(3, 2, 2, KEYS, 4).unbind(0))
    for example, assumed in ((torch.ones(2, KEYS).long(), True), (torch.full((2, KEYS), 2), False)):
        rewritten = rewrite(Hidden(), (*qkv, example), config=ALWAYS)
        assert ("binary-input" in {reason.code for reason in rewritten.report.sites[0].reasons}) == assumed
