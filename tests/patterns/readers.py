"""What else reads the scores, the weights or their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_attn_rewrite import RewriteConfig
from tests.patterns.cases import Keep, Match, S, additive_causal, qkv

BESIDE = RewriteConfig(policy="always", weights="beside")


def weights_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(q @ k.mT * 0.25 + additive_causal(), -1)
    return p @ v, p


def mean_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """torch.nn.MultiheadAttention with need_weights=True."""
    p = torch.softmax(q @ k.mT * 0.25 + additive_causal(), -1)
    return p @ v, p.mean(1)


def scores_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """RealFormer: the next layer adds these scores to its own."""
    s = q @ k.mT * 0.25
    return torch.softmax(s + additive_causal(), -1) @ v, s


def log_sum_exp_gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sink as a gate on the output, computed from the log-sum-exp of the scores."""
    s = q @ k.mT * 0.25 + additive_causal()
    gate = torch.sigmoid(torch.logsumexp(s, -1, keepdim=True) - 1.0)
    return torch.softmax(s, -1) @ v * gate


def sum_of_exponentials(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    e = torch.exp(q @ k.mT * 0.1)
    total = e.sum(-1, keepdim=True)
    return e / total @ v, total.log()


def two_values(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One set of weights, two products: two attentions, and nobody needs the weights."""
    p = torch.softmax(q @ k.mT * 0.25, -1)
    return p @ v, p @ (v * v)


def shared_key(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    mask = additive_causal()
    return torch.softmax(q @ k.mT * 0.25 + mask, -1) @ v, torch.softmax(v @ k.mT * 0.25 + mask, -1) @ q


MATCH = {
    "weights, on request": Match(weights_too, mask="causal(offset=0)", config=BESIDE),
    "weights for a mean, on request": Match(mean_weights, mask="causal(offset=0)", config=BESIDE),
    "scores, on request": Match(scores_too, mask="causal(offset=0)", config=BESIDE),
    "two products with the same weights": Match(two_values, replaced=2),
    "two attentions with the same key and mask": Match(shared_key, mask="causal(offset=0)", replaced=2),
    "a bias from the same product": Match(
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25 + (q @ k.mT).relu(), -1) @ v, bias=(2, 4, S, S)
    ),
}

KEEP = {
    "weights": Keep(weights_too, "its weights are also read by the model's output"),
    "weights for a mean": Keep(mean_weights, "its weights are also read by mean"),
    "scores": Keep(scores_too, "its scores are also read by"),
    "log-sum-exp for a gate": Keep(log_sum_exp_gate, "its log-sum-exp is read by"),
    "sum of exponentials": Keep(sum_of_exponentials, "its log-sum-exp is read by log"),
    "the operator's log-sum-exp": Keep(
        lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2],
        "log-sum-exp",
        qkv,
    ),
}
