"""Softmax, written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.patterns.cases import CAUSAL, Keep, Match, Right, S, additive_causal, cubes, with_bias


def attention(softmax: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: softmax(q @ k.mT * 0.25 + additive_causal()) @ v


def exp_sum(x: Tensor) -> Tensor:
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True)


def stable(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def stable_with_max(x: Tensor) -> Tensor:
    e = (x - x.max(dim=-1, keepdim=True)[0].detach()).exp()
    return e / torch.sum(e, dim=-1, keepdim=True)


def unsqueezed(x: Tensor) -> Tensor:
    e = (x - x.amax(-1).unsqueeze(-1)).exp()
    return e / e.sum(-1).unsqueeze(-1)


def reciprocal(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e * e.sum(-1, keepdim=True).reciprocal()


def with_epsilon(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / (e.sum(-1, keepdim=True) + 1e-9)


def with_limit(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True).clamp_min(1e-6)


def base_two(x: Tensor) -> Tensor:
    e = torch.exp2(x * math.log2(math.e))
    return e / e.sum(-1, keepdim=True)


def log_sum_exp(x: Tensor) -> Tensor:
    return torch.exp(x - torch.logsumexp(x, -1, keepdim=True))


def in_float64(x: Tensor) -> Tensor:
    return torch.softmax(x.double(), -1).float()


def cogview(x: Tensor) -> Tensor:
    """LayoutLMv3: softmax(alpha * (x / alpha - max)), against overflow."""
    small = x / 32
    return torch.softmax((small - small.amax(-1).unsqueeze(-1)) * 32, -1)


def mask_times_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A 0/1 mask multiplies the exponentials before they are normalised: exactly a mask on the scores."""
    e = torch.exp(q @ k.mT * 0.25) * CAUSAL.float()
    return e / e.sum(-1, keepdim=True) @ v


def divided_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As flash attention is written: the product with the value is divided by the sum of its weights."""
    x = q @ k.mT * 0.25 + additive_causal()
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e @ v / e.sum(-1, keepdim=True).expand(*q.shape[:3], 1)


def divided_after_views(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT * 0.25)
    return (e @ v).transpose(1, 2) / e.sum(-1).transpose(1, 2)[..., None]


def normalised_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.softmax(q @ k.mT * 0.25, -1).masked_fill(~CAUSAL, 0.0)
    return p / p.sum(-1, keepdim=True) @ v


MATCH = {
    name: Match(attention(softmax), mask="causal(offset=0)", scale=0.25)
    for name, softmax in {
        "exp over sum": exp_sum,
        "row maximum subtracted": stable,
        "row maximum by max": stable_with_max,
        "maximum and sum unsqueezed": unsqueezed,
        "times the reciprocal": reciprocal,
        "an epsilon that rounds away": with_epsilon,
        "a limit that is never reached": with_limit,
        "base two": base_two,
        "log_softmax, then exp": lambda x: torch.log_softmax(x, -1).exp(),
        "log-sum-exp subtracted": log_sum_exp,
        "in float64": in_float64,
        "dtype argument": lambda x: torch.softmax(x, -1, dtype=torch.float64).float(),
        "row maximum before the operator": lambda x: torch.softmax(x - x.amax(-1, keepdim=True), -1),
        "scaled against overflow (LayoutLMv3)": cogview,
        "dropout that is off": lambda x: torch.dropout(torch.softmax(x, -1), 0.1, False),
        "dropout of zero": lambda x: torch.dropout(torch.softmax(x, -1), 0.0, True),
    }.items()
} | {
    "a mask times the exponentials": Match(mask_times_exp, mask="causal(offset=0)", scale=0.25),
    "divided behind the second product": Match(divided_later, mask="causal(offset=0)", scale=0.25),
    "divided behind the second product, transposed": Match(divided_after_views, scale=0.25),
    "a mask on the weights, normalised again": Match(normalised_again, mask="causal(offset=0)", scale=0.25),
    "row mean before the operator": Match(
        lambda q, k, v: torch.softmax(_minus_mean(q @ k.mT * 0.25), -1) @ v, scale=0.25
    ),
}


def _minus_mean(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _other_sum(x: Tensor) -> Tensor:
    e = torch.exp(x)
    return e / e.sum(-2, keepdim=True)


def _sum_of_something_else(x: Tensor) -> Tensor:
    return torch.exp(x) / torch.exp(2 * x).sum(-1, keepdim=True)


def _epsilon_that_matters(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / (e.sum(-1, keepdim=True) + 1e-3)


def _plain_epsilon(x: Tensor) -> Tensor:
    """Without the maximum subtracted the sum may be tiny."""
    e = torch.exp(x)
    return e / (e.sum(-1, keepdim=True) + 1e-9)


def _maximum_of_columns(x: Tensor) -> Tensor:
    return torch.softmax(x - x.amax(-2, keepdim=True), -1)


def _maximum_misplaced(x: Tensor) -> Tensor:
    """The row maxima are laid along the keys."""
    return torch.softmax(x - x.amax(-1)[:, :, None], -1)


KEEP = {
    "sum over the queries": Keep(lambda q, k, v: _other_sum(q @ k.mT * 0.25) @ v, "sum over the keys"),
    "a mask on the weights, not normalised": Keep(
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25, -1).masked_fill(~CAUSAL, 0.0) @ v, "without normalising again"
    ),
    "a mask times the weights, not normalised": Keep(
        lambda q, k, v: (torch.softmax(q @ k.mT * 0.25, -1) * CAUSAL) @ v, "differs by query and key"
    ),
    "weights squared": Keep(lambda q, k, v: torch.softmax(q @ k.mT, -1).square() @ v, "no rule knows it"),
    "logarithm of the weights": Keep(lambda q, k, v: torch.softmax(q @ k.mT, -1).log() @ v, "no rule knows it"),
    "a hard choice in place of the weights (GroupViT)": Keep(
        lambda q, k, v: _straight_through(torch.softmax(q @ k.mT * 0.25, -1)) @ v, "hard choice"
    ),
    "dropout in training": Keep(
        lambda q, k, v: torch.dropout(torch.softmax(q @ k.mT, -1), 0.5, True) @ v, "dropout is active"
    ),
}

RIGHT = {
    "divided behind the product by a sum over the queries": Right(
        lambda q, k, v: _divided(torch.exp(q @ k.mT * 0.1), v, lambda e: e.sum(-2).unsqueeze(-1))
    ),
    "divided behind the product by the sums of other rows": Right(
        lambda q, k, v: _divided(torch.exp(q @ k.mT * 0.1), v, lambda e: e.sum(-1, keepdim=True).flip(2))
    ),
    "divided behind the product by the sums of other weights": Right(
        lambda q, k, v: _divided(torch.exp(q @ k.mT * 0.1), v, lambda e: (e * e).sum(-1, keepdim=True))
    ),
    "divided behind the product by the sums of other heads": Right(
        lambda q, k, v: _divided(torch.exp(q @ k.mT * 0.1), v, lambda e: e.sum(-1, keepdim=True).transpose(0, 1)), cubes
    ),
    "a sum of something else": Right(lambda q, k, v: _sum_of_something_else(q @ k.mT * 0.1) @ v),
    "an epsilon that matters": Right(lambda q, k, v: _epsilon_that_matters(q @ k.mT * 0.25) @ v),
    "an epsilon without a maximum": Right(lambda q, k, v: _plain_epsilon(q @ k.mT * 0.25 - 30) @ v),
    "maximum over the queries": Right(lambda q, k, v: _maximum_of_columns(q @ k.mT * 0.25) @ v),
    "row maxima along the keys": Right(lambda q, k, v: _maximum_misplaced(q @ k.mT * 0.25) @ v),
    "row mean under a mask": Right(attention(lambda x: torch.softmax(_minus_mean(x.clamp(min=-50)), -1))),
    "the index of the maximum": Right(
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25 - (q @ k.mT * 0.25).max(-1, keepdim=True)[1], -1) @ v
    ),
    "a mask with other numbers times the exponentials": Right(
        lambda q, k, v, m: _normalised(torch.exp(q @ k.mT * 0.25) * m.abs()) @ v, with_bias(S, S)
    ),
    "a sum over the whole, mask only above": Right(
        lambda q, k, v: torch.exp(q @ k.mT * 0.1) * CAUSAL / torch.exp(q @ k.mT * 0.1).sum(-1, keepdim=True) @ v
    ),
}


def _divided(e: Tensor, v: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    return e @ v / total(e)


def _straight_through(p: Tensor) -> Tensor:
    return torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0) - p.detach() + p


def _normalised(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True)
