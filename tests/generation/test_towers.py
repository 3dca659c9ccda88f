"""A call of a tower as a graph: its integers are constants, and stay those of the caller."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.generation.towers import Tower


class Grid(nn.Module):
    """It writes into the sizes that it is given, as it computes with them."""

    def forward(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        sizes.add_(1)
        return pixels[:, : int(sizes[0, 0])] * int(sizes.sum())


class Draws(nn.Module):
    """It draws integers."""

    def forward(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        return pixels + torch.randint(0, 1000, (1,))


def test_the_sizes_of_a_caller_stay() -> None:
    sizes, pixels = torch.tensor([[2, 3]]), torch.randn(4, 8)
    graph = rewrite(Tower(Grid().eval(), {"pixels": pixels, "sizes": sizes}), ([pixels],))
    assert sizes.tolist() == [[2, 3]]
    other = torch.randn(4, 8)
    for _ in range(2):
        assert torch.equal(graph([other]), Grid()(other, torch.tensor([[2, 3]])))


def test_what_is_drawn_is_no_constant() -> None:
    sizes, pixels = torch.tensor([[2, 3]]), torch.zeros(4, 8)
    config = RewriteConfig(verify=False)
    graph = rewrite(Tower(Draws().eval(), {"pixels": pixels, "sizes": sizes}), ([pixels],), config=config)
    assert len({float(graph([pixels])[0, 0]) for _ in range(5)}) > 1
