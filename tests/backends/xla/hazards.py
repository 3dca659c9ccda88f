"""Ways in which lowering succeeds with a wrong graph, each shown to `verify_trace`."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
import torch_xla
from torch import Tensor, nn

from neuron_attn_rewrite import RewriteConfig, rewrite, rewrite_for_trace, verify_trace
from neuron_attn_rewrite.ops.launch import placeholder_kernels
from tests.models import FAMILIES

ALWAYS = RewriteConfig(policy="always")
Q = torch.randn(1, 2, 12, 8)


class Masked(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        shown = attention_mask[:, None, None].bool()
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=shown)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=shown)


class Looks(nn.Module):
    """As some models do: a mask of ones is left out."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        shown = None if attention_mask.all() else attention_mask[:, None, None].bool()
        return F.scaled_dot_product_attention(x, x, x, attn_mask=shown)


class Baked(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        shown = attention_mask.to("cpu")[:, None, None] + torch.arange(12, device="cpu")
        return x + shown.to(x.device)[..., None] * 1.0


@torch.library.custom_op("neuron_attn::test_only_cpu", mutates_args=(), device_types="cpu")
def only_cpu(x: Tensor) -> Tensor:
    return x * 2


class OnlyCpu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return only_cpu(x) + 1


class Fallback(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]  # type: ignore[no-any-return]


class Grown(nn.Module):
    """As a cache of transformers does: it starts with a tensor without elements."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.tensor([], dtype=x.dtype), x], -2)
        return F.scaled_dot_product_attention(x, x, x)


class Naive(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        scores = x @ x.mT * 8**-0.5 + (1.0 - attention_mask[:, None, None].float()) * -1e30
        return scores.softmax(-1) @ x


class Biased(nn.Module):
    """As in T5: a table gives the first attention a bias with the size of the second one's scores."""

    def __init__(self, second: Any = F.scaled_dot_product_attention, first: Any = None) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 2)
        self.first, self.second = first or F.scaled_dot_product_attention, second

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(12, device=x.device)
        bias = self.table((places - places[:, None]).clamp(-1, 1) + 1).permute(2, 0, 1)[None]
        return self.second(*[self.first(x, x, x, bias)] * 3)  # type: ignore[no-any-return]


def native(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * 8**-0.5).softmax(-1) @ value


def flash(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.neuron_attn.flash_fwd(query, key, value, scale=8**-0.5, bias=bias)  # type: ignore[no-any-return]


class Cached(nn.Module):
    """Two caches: it adds to the first, and overwrites the second."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.zeros(2, 4))
        self.register_buffer("second", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.sum(), self.first + x, x * 2, x.double()


def wrong_aliases() -> dict[str, list[str]]:
    """What `verify_trace` says of good aliases and of bad ones."""
    module, x = Cached(), torch.randn(2, 4)
    first, second = module.buffers()
    aliases: dict[str, dict[Tensor, int]] = {
        "good": {first: 1},
        "none": {},
        "not read": {second: 2},
        "twice": {first: 1, second: 1},
        "too far": {first: 4},
        "negative": {first: -1},
        "shape": {first: 0},
        "dtype": {first: 3},
        "foreign": {first.clone(): 1},
    }
    return {
        name: list(verify_trace(module, x, aliases=given, strict=False).problems) for name, given in aliases.items()
    }


def padded(ones: bool = False) -> Tensor:
    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[:, 9:] = int(ones)
    return mask


def hashes() -> dict[str, bool]:
    """Whether calls with another scale differ, and calls with the same one don't."""
    x = Q.to(torch_xla.device())
    with placeholder_kernels():
        outputs = [torch.ops.neuron_attn.flash_fwd(x, x, x, scale=scale) for scale in (0.25, 0.5, 0.25)]
    first, second, third = (torch_xla._XLAC._get_graph_hash([out]) for out in outputs)
    return {"scale": first != second, "same": first == third}


def problems(module: nn.Module, *inputs: Tensor) -> list[str]:
    return list(verify_trace(module, inputs, strict=False).problems)


def main() -> dict[str, Any]:
    two = rewrite_for_trace(Masked(), (Q, padded()), ALWAYS)
    lost = rewrite_for_trace(Masked(), (Q, padded()), ALWAYS)
    calls = lost.graph.find_nodes(op="call_function", target=torch.ops.neuron_attn.flash_fwd.default)
    naive = rewrite(Naive(), (Q, padded()), config=ALWAYS)
    grown = rewrite_for_trace(Grown(), Q, ALWAYS)
    scores = Naive()
    scores.report = naive.report  # type: ignore[assignment]
    calls[1].replace_all_uses_with(calls[0])
    lost.recompile()
    biased = rewrite_for_trace(Biased(), Q, RewriteConfig(policy="always", require="all"))
    half = Biased(native, flash)
    half.report = biased.report  # type: ignore[assignment]
    t5 = next(family for family in FAMILIES if family.name == "t5")
    t5_call = t5.call("right")
    t5_left = problems(rewrite_for_trace(t5.build("eager"), t5_call, ALWAYS), *t5_call.values())
    return {
        "bias": problems(biased, Q) + t5_left,
        "native beside a bias": problems(half, Q),
        "baked device": problems(Baked(), Q[0, 0], padded()),
        "op with a CPU kernel only": problems(OnlyCpu(), Q),
        "fallback": problems(Fallback(), Q),
        "mask that was looked at": problems(Looks(), Q, padded(ones=True)),
        "hashes": hashes(),
        "clean": problems(two, Q, padded()) + problems(naive, Q, padded()) + problems(grown, Q),
        "scores left": problems(scores, Q, padded()),
        "aliases": wrong_aliases(),
        "lost kernel": problems(lost, Q, padded()),
        "bert": problems(FAMILIES[8].build("sdpa"), *FAMILIES[8].call("right").values()),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(main()))
