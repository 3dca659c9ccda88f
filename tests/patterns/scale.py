"""A scale, wherever it stands."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.cases import CAUSAL, LOW, B, D, H, Keep, Match, S, additive_causal, folded, with_bias


class LogitScale(nn.Module):
    """Swin V2: cosine attention with a learned, limited scale for each head, then a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((H, 1, 1), math.log(10)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=math.log(100)).exp()
        return torch.softmax(scores + bias, -1) @ v


class Temperature(nn.Module):
    """One learned number, as CLIP's logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(self.temperature.exp() * (q @ k.mT), -1) @ v


def _baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BLOOM: the scale is alpha, beta scales what is added."""
    added = additive_causal()[None].expand(B * H, S, S)
    return torch.bmm(torch.softmax(torch.baddbmm(added, q, k.transpose(1, 2), beta=0.5, alpha=0.25), -1), v)


def _beta_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """T0 and Megatron: what is added is empty memory that counts for nothing."""
    empty = torch.empty(B * H, S, S)
    return torch.bmm(torch.softmax(torch.baddbmm(empty, q, k.transpose(1, 2), beta=0.0, alpha=0.25), -1), v)


MATCH = {
    "multiplies the scores": Match(lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) * 0.25, -1) @ v, scale=0.25),
    "on the left": Match(lambda q, k, v: torch.softmax(0.125 * (q @ k.transpose(2, 3)), -1) @ v, scale=0.125),
    "divides the scores": Match(lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) / 4, -1) @ v, scale=0.25),
    "negative": Match(lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) * -0.25, -1) @ v, scale=-0.25),
    "a minus sign": Match(lambda q, k, v: torch.softmax(-(q @ k.mT) * 0.25, -1) @ v, scale=-0.25),
    "a minus sign on the query": Match(lambda q, k, v: torch.softmax(-q @ k.mT * 0.25, -1) @ v, scale=-0.25),
    "subtracted from a number": Match(lambda q, k, v: torch.softmax(1.0 - q @ k.mT * 0.25, -1) @ v, scale=-0.25),
    "softmin": Match(lambda q, k, v: F.softmin(q @ k.mT * 0.25, -1) @ v, scale=-0.25),
    "on the query": Match(lambda q, k, v: torch.softmax((q * 0.25) @ k.transpose(2, 3), -1) @ v, scale=0.25),
    "divides the query": Match(lambda q, k, v: torch.softmax((q / 4) @ k.transpose(2, 3), -1) @ v, scale=0.25),
    "on the key": Match(lambda q, k, v: torch.softmax(q @ (k / 4).transpose(2, 3), -1) @ v, scale=0.25),
    "on the key, transposed": Match(lambda q, k, v: torch.softmax(q @ (k.transpose(2, 3) / 4), -1) @ v, scale=0.25),
    "on both": Match(lambda q, k, v: torch.softmax((q * 0.5) @ (0.5 * k).transpose(2, 3), -1) @ v, scale=0.25),
    "square roots on both": Match(
        lambda q, k, v: torch.softmax((q * math.sqrt(0.25)) @ (k.mT * math.sqrt(0.25)), -1) @ v, scale=0.25
    ),
    "a square root of a tensor": Match(
        lambda q, k, v: torch.softmax(q @ k.mT / torch.sqrt(torch.tensor(D)), -1) @ v, scale=0.25
    ),
    "roots of tensors on both": Match(
        lambda q, k, v: (
            torch.softmax(q / torch.tensor(float(D)).pow(0.25) @ (k / torch.tensor(float(D)) ** 0.25).mT, -1) @ v
        ),
        scale=0.25,
    ),
    "the size of the key": Match(lambda q, k, v: torch.softmax(q @ k.mT * k.size(-1) ** -0.5, -1) @ v, scale=0.25),
    "in float64": Match(lambda q, k, v: torch.softmax((q.double() @ k.double().mT) * 0.25, -1).float() @ v, scale=0.25),
    "a constant tensor": Match(
        lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) / torch.full([], D**0.5), -1) @ v, scale=0.25
    ),
    "none": Match(lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) / 9 * 9 / 9, -1) @ v, scale=1 / 9),
    "alpha and beta": Match(_baddbmm, folded, "causal(offset=0)", scale=0.25),
    "beta is zero": Match(_beta_zero, folded, scale=0.25),
    "before the mask": Match(
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25 + additive_causal(), -1) @ v, mask="causal(offset=0)", scale=0.25
    ),
    "after the mask": Match(
        lambda q, k, v: torch.softmax((q @ k.mT + additive_causal()) * 0.25, -1) @ v,
        mask="causal(offset=0)",
        scale=0.25,
    ),
    "after a bias": Match(
        lambda q, k, v, b: torch.softmax((q @ k.mT + b) * 0.25, -1) @ v, with_bias(H, S, S), bias=(1, H, S, S)
    ),
    "after masked_fill": Match(
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(~CAUSAL, LOW) / 4, -1) @ v,
        mask="causal(offset=0)",
        scale=0.25,
    ),
    "a bias is subtracted": Match(
        lambda q, k, v, b: torch.softmax(q @ k.mT * 0.25 - b, -1) @ v, with_bias(H, S, S), bias=(1, H, S, S)
    ),
    "subtracted from a bias": Match(
        lambda q, k, v, b: torch.softmax(b - q @ k.mT * 0.25, -1) @ v,
        with_bias(H, S, S),
        bias=(1, H, S, S),
        scale=-0.25,
    ),
    "a bias with alpha": Match(
        lambda q, k, v, b: torch.softmax(torch.add(q @ k.mT * 0.25, b, alpha=3), -1) @ v,
        with_bias(H, S, S),
        bias=(1, H, S, S),
    ),
    "scores with alpha": Match(
        lambda q, k, v, b: torch.softmax(torch.add(b, q @ k.mT, alpha=0.25), -1) @ v,
        with_bias(H, S, S),
        bias=(1, H, S, S),
        scale=0.25,
    ),
    "a tensor for each head": Match(
        lambda q, k, v, s: torch.softmax(q @ k.mT * s.exp() + additive_causal(), -1) @ v,
        with_bias(H, 1, 1),
        "causal(offset=0)",
    ),
    "a tensor for each query": Match(
        lambda q, k, v, s: torch.softmax(q @ k.mT / (1 + s * s), -1) @ v, with_bias(B, H, S, 1)
    ),
    "a number read off a tensor": Match(
        lambda q, k, v, s: torch.softmax(q @ k.mT * s.item(), -1) @ v / s.detach().clone().item(), with_bias(1)
    ),
    "one number in a tensor": Match(lambda q, k, v, s: torch.softmax(q @ k.mT * s, -1) @ v, with_bias(1)),
    "no dims": Match(lambda q, k, v, s: torch.softmax(q @ k.mT * s, -1) @ v, with_bias()),
    "learned": Match(Temperature()),
    "learned for each head (Swin V2)": Match(LogitScale(), with_bias(H, S, S), bias=(1, H, S, S)),
    "scales the weights": Match(lambda q, k, v: (torch.softmax(q @ k.mT * 0.25, -1) * 1.5) @ v, scale=0.25),
    "scales the value": Match(lambda q, k, v: torch.softmax(q @ k.mT * 0.25, -1) @ (v / 3), scale=0.25),
    "a head mask on the weights": Match(
        lambda q, k, v, m: (torch.softmax(q @ k.mT * 0.25, -1) * m) @ v, with_bias(1, H, 1, 1)
    ),
    "a weight for each key": Match(
        lambda q, k, v, m: (torch.softmax(q @ k.mT * 0.25, -1) * m) @ v, with_bias(B, 1, 1, S)
    ),
    "a weight for each query, divided by": Match(
        lambda q, k, v, m: (torch.softmax(q @ k.mT * 0.25, -1) / (1 + m * m)) @ v, with_bias(B, H, S, 1)
    ),
    "the scores themselves are no mask": Match(
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25 + 3.0, -1) @ v, scale=0.25
    ),
}

KEEP = {
    "squared": Keep(lambda q, k, v: torch.softmax((q @ k.mT) ** 2 * 0.1, -1) @ v, "no rule knows it"),
    "squared by hand": Keep(lambda q, k, v: _square(q @ k.mT) @ v, "differs from score to score"),
    "for each key": Keep(
        lambda q, k, v, s: torch.softmax((q @ k.mT) * s, -1) @ v, "differs from key to key", with_bias(B, H, 1, S)
    ),
    "for each score": Keep(
        lambda q, k, v, s: torch.softmax((q @ k.mT) * s, -1) @ v, "differs from score to score", with_bias(B, H, S, S)
    ),
    "rounded down": Keep(
        lambda q, k, v: torch.softmax(torch.div(q @ k.mT, 4, rounding_mode="floor"), -1) @ v, "no rule knows it"
    ),
    "a number divided by the scores": Keep(lambda q, k, v: torch.softmax(4 / (q @ k.mT), -1) @ v, "no rule knows it"),
    "a tensor divided by the scores": Keep(
        lambda q, k, v, s: torch.softmax(s / (q @ k.mT), -1) @ v, "differs from score to score", with_bias(1, H, 1, 1)
    ),
    "a number read off a tensor to the left of a division": Keep(
        lambda q, k, v, s: torch.softmax(s.item() / (q @ k.mT), -1) @ v, "no rule knows it", with_bias(1)
    ),
    "a tensor on scores and mask": Keep(
        lambda q, k, v, s: torch.softmax((q @ k.mT + additive_causal()) * s, -1) @ v,
        "inside a softcap or a tensor scale",
        with_bias(H, 1, 1),
    ),
    "cast to whole numbers": Keep(
        lambda q, k, v: torch.softmax((q @ k.mT).to(torch.int64).float(), -1) @ v, "no rule knows it"
    ),
    "a weight for each query and key": Keep(
        lambda q, k, v, m: (torch.softmax(q @ k.mT * 0.25, -1) * m) @ v, "differs by query and key", with_bias(S, S)
    ),
    "divides by the weights": Keep(lambda q, k, v: (0.5 / torch.softmax(q @ k.mT * 0.25, -1)) @ v, "no rule knows it"),
}


def _square(scores: Tensor) -> Tensor:
    return torch.softmax(scores * scores * 0.1, -1)
