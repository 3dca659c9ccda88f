"""The zoo's own parts: the count that does without the finder, the verdict, and what it builds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo import tiny
from benchmarks.zoo.count import CountAttentions, count
from benchmarks.zoo.examine import difference
from benchmarks.zoo.table import shares, verdict


def sdpa(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def by_hand(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT, -1) @ x


def by_einsum(x: Tensor) -> Tensor:
    p = torch.einsum("bqd,bkd->bqk", x, x).softmax(-1)
    return torch.einsum("bqk,bkd->bqd", p, x)


def twice(x: Tensor) -> Tensor:
    return by_hand(F.layer_norm(by_hand(x), (8,)))


def twice_in_a_row(x: Tensor) -> Tensor:
    return by_hand(by_hand(x))


def weights_unused(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT, -1).sum() + x


def router(x: Tensor) -> Tensor:
    weights = F.linear(by_hand(x), torch.ones(5, 8)).softmax(-1)
    return torch.bmm(weights.mT, x)


def module(x: Tensor) -> Tensor:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    return layer(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("function", "attentions"),
    [
        (sdpa, 1),
        (by_hand, 1),
        (by_einsum, 1),
        (twice, 2),
        (twice_in_a_row, 2),
        (weights_unused, 0),
        (router, 1),
        (module, 1),
    ],
)
def test_count(function: Callable[[Tensor], Tensor], attentions: int) -> None:
    with torch.no_grad(), CountAttentions() as counter:
        function(torch.randn(2, 6, 8))
    assert counter.total == attentions


def test_difference() -> None:
    old = [torch.tensor([1.0, torch.nan]), torch.tensor([100.0, -torch.inf])]
    assert difference(old, old) == 0.0
    assert difference([torch.tensor([1.0, 5.0]), old[1]], old) == 0.0
    assert difference([old[0], torch.tensor([101.0, -torch.inf])], old) > 0.0
    assert difference([torch.tensor([torch.nan, torch.nan]), old[1]], old) == torch.inf
    assert difference([old[0], torch.tensor([100.0, torch.nan])], old) == torch.inf


def test_verdict() -> None:
    site = {"understood": True, "replaced": True, "reason": "", "code": ""}
    good = {"counted": 1, "sites": [site], "error": {"ones": 1e-7}}
    kept = {**site, "replaced": False, "code": "weights-used", "reason": "its weights are also read by cat_7"}
    bad = {"counted": 3, "sites": [site, kept], "error": {"ones": torch.inf}}
    assert verdict(good) == ""
    assert verdict({**good, "capture error": {"ones": 0.5}}) == "captured as another function, ones 5e-01"
    assert verdict({**good, "error": {"ones": 3e-2}, "rounding": {"ones": 2e-2}}).startswith("ill-conditioned, ones")
    assert verdict({**good, "error": {"ones": 3e-2}, "rounding": {"ones": 2e-3}}) == "WRONG ones 3e-02"
    assert verdict({**good, "nan": ["right"]}) == "the model itself gives NaN, right"
    assert verdict(bad) == "WRONG ones inf; 3 counted, 2 found; 1 kept: its weights are also read by cat"
    assert shares([{"captures": {"a": good, "b": bad}}]) == {
        "counted": 4,
        "explained": 3,
        "found": 3,
        "apart": 1,
        "replaced": 2,
        "wrong": 1,
    }


@pytest.mark.parametrize("name", ["deepseek_v2", "siglip", "seggpt", "perceiver"])
def test_ready_models_run_and_hold_attentions(name: str) -> None:
    """By a rule for heads of a latent, one for two towers, one for fields and inputs of a single architecture."""
    model, inputs = tiny.ready(name, "eager")
    assert count(model, inputs) >= 2
    assert sum(p.numel() for p in model.parameters()) < 1e6
    for padded in tiny.paddings(model, inputs).values():
        model(**padded)


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(tiny.NotBuilt, match="Error"):
        tiny.ready("musicgen", "eager")  # the class of its base model is that of its decoder, the config is not


def test_a_backbone_of_another_library_becomes_a_small_one() -> None:
    config = tiny.tiny("detr", *tiny.RUNGS[0])
    assert config.backbone_config.model_type == "resnet" and list(config.backbone_config.depths) == [1, 1, 1, 1]
