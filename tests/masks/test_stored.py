"""The formula of a stored tensor gives each of its elements, and exactly one case holds at each index."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, fx, nn

from neuron_attn_rewrite.masks.affine import Affine, Index, variable
from neuron_attn_rewrite.masks.cases import Unknown
from neuron_attn_rewrite.masks.stored import stored

N = 5
ONES = torch.ones(N, N)
KNOWN: dict[str, Tensor] = {
    "equal": torch.full((N, N), -0.5),
    "equal integers": torch.full((2, N), 7, dtype=torch.int8),
    "no element but one": torch.tensor([[3]]),
    "indices": torch.arange(N),
    "indices of two": torch.arange(2),
    "backwards": torch.arange(N).flip(0)[:, None],
    "in steps": torch.arange(-4, 3 * N, 3, dtype=torch.int16)[None],
    "bools that rise": torch.tensor([False, True]),
    "bytes that fall": torch.tensor([200, 150, 100, 50, 0], dtype=torch.uint8),
    "causal": ONES.tril(),
    "causal, behind": ONES.tril(-2).bool(),
    "causal, ahead": ONES.tril(1).long()[None, None],
    "hidden": ONES.triu(1) * -1e9,
    "from the diagonal on": ONES.triu().bool(),
    "a window": ONES.tril(1).triu(-1),
    "outside of a window": (ONES.tril(1).triu(-1) == 0).float(),
    "not square": torch.ones(3, 7).tril(2).bool(),
    "a window behind": ONES.tril(-1).triu(-2),
    "outside of a window ahead": (ONES.tril(2).triu(1) == 0).long(),
    "outside of a wide window": ONES.tril().index_put((torch.tensor(0), torch.tensor(4)), torch.tensor(1.0)),
    "a diagonal": torch.eye(N, dtype=torch.int32),
    "bands of zeros": torch.where(ONES.tril().bool(), 0.0, -0.0),
    "two rows": torch.tensor([[1, 0, 0], [1, 1, 0]]),
    "two keys": torch.ones(4, 2).tril(),
}
UNKNOWN: dict[str, Tensor] = {
    "not a progression": torch.tensor([0, 1, 2, 4]),
    "a progression of floats": torch.arange(N).float(),
    "three numbers in bands": ONES.tril() + ONES.tril(-1),
    "no band": torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]),
    "a band with one other element": ONES.tril().index_put((torch.tensor(2), torch.tensor(0)), torch.tensor(0.0)),
    "bands around NaN": torch.where(ONES.tril().bool(), torch.nan, 1.0),
    "bands of NaN": torch.where(ONES.tril().bool(), 1.0, torch.nan),
    "a parameter": nn.Parameter(torch.zeros(N)),
    "a tensor without values": torch.zeros(N, device="meta"),
    "zeros of both signs": torch.tensor([0.0, -0.0]),
    "three dims": torch.ones(2, N, N).tril().mul(torch.tensor([1.0, 2.0])[:, None, None]),
}


def cases(held: Tensor) -> tuple[list[Index], list[tuple[list[Affine], object]]]:
    module, graph = nn.Module(), fx.Graph()
    if isinstance(held, nn.Parameter):
        module.register_parameter("held", held)
    else:
        module.register_buffer("held", held)
    node = graph.get_attr("held")
    graph.output(node)
    indices = [Index(axis, Affine(size)) for axis, size in enumerate(held.shape)]
    found = stored(fx.GraphModule(module, graph), node, tuple(map(variable, indices)))
    return indices, [(list(case.guard), case.value) for case in found]


def at(sum_: object, place: dict[Index, int]) -> float:
    if not isinstance(sum_, Affine):
        assert isinstance(sum_, float)
        return sum_
    for index, number in place.items():
        sum_ = sum_.substitute(index, Affine(number))
    assert sum_.is_constant
    return sum_.constant


@pytest.mark.parametrize("name", KNOWN)
def test_each_element(name: str) -> None:
    held = KNOWN[name]
    indices, found = cases(held)
    for place in itertools.product(*map(range, held.shape)):
        numbers = dict(zip(indices, place, strict=True))
        values = [at(value, numbers) for guard, value in found if all(at(g, numbers) >= 0 for g in guard)]
        assert values == [held[place].item()], (name, place)
        assert math.copysign(1, values[0]) == math.copysign(1, held[place]), (name, place)


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_formula(name: str) -> None:
    with pytest.raises(Unknown):
        cases(UNKNOWN[name])
