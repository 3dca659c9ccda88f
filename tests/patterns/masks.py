"""Masks and biases: any number, any order, added or filled in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.cases import (
    CAUSAL,
    LOW,
    B,
    D,
    H,
    Keep,
    Match,
    S,
    additive_causal,
    qkv,
    with_bias,
    with_padding,
)

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]


ONES = CAUSAL.float()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def _kept(x: Tensor, b: Tensor, much: float) -> Tensor:
    return x * b - much * (1 - b)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(scores(q, k) / 20.0) * 20.0 + additive_causal(), -1) @ v


class Sink(nn.Module):
    """GPT-OSS: a learned logit for each head in one more column."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(H))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        joined = torch.cat([scores(q, k) + additive_causal(), self.sink.reshape(1, -1, 1, 1).expand(B, -1, S, 1)], -1)
        joined = joined - joined.max(-1, keepdim=True).values
        return torch.softmax(joined, -1)[..., :-1] @ v


def beside_sink(q: Tensor, k: Tensor, v: Tensor, m: Tensor, sink: Tensor) -> Tensor:
    hidden = scores(q, k).masked_fill(~m[:, None, None], LOW)
    return torch.softmax(torch.cat([hidden, sink.reshape(1, -1, 1, 1).expand(B, -1, S, 1)], -1), -1)[..., :-1] @ v


class SinkUnderPadding(Sink):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:  # type: ignore[override]
        return beside_sink(q, k, v, m, self.sink)


def hidden_rows() -> tuple[Tensor, ...]:
    """Query, key, value and a mask under which the first batch element sees no key."""
    *given, mask = with_padding(torch.bool)
    return (*given, mask.index_fill(0, torch.tensor([0]), False))


def low_sinks() -> tuple[Tensor, ...]:
    """Sinks as low as hidden scores, and lower."""
    return (*hidden_rows(), torch.tensor([-torch.inf, LOW, -1e9, 0.5]))


MATCH = {
    "on the left": Match(
        lambda q, k, v: torch.softmax(additive_causal() + scores(q, k), -1) @ v, mask="causal(offset=0)"
    ),
    "two": Match(
        lambda q, k, v: torch.softmax(scores(q, k) + additive_causal() + additive_causal().mT, -1) @ v,
        mask="causal(offset=0) & window(left=0)",
    ),
    "two, added to each other first": Match(
        lambda q, k, v: torch.softmax((additive_causal() + additive_causal().mT) + scores(q, k), -1) @ v,
        mask="sliding_window(1)",
    ),
    "masked_fill": Match(
        lambda q, k, v: torch.softmax(scores(q, k).masked_fill(~CAUSAL, -torch.inf), -1) @ v, mask="causal(offset=0)"
    ),
    "masked_fill with -1e9": Match(
        lambda q, k, v: torch.softmax(scores(q, k).masked_fill(CAUSAL == 0, -1e9), -1) @ v, mask="causal(offset=0)"
    ),
    "masked_fill of a tril made in place": Match(
        lambda q, k, v: torch.softmax(scores(q, k).masked_fill(torch.ones(S, S).tril() == 0, -torch.inf), -1) @ v,
        mask="causal(offset=0)",
    ),
    "where": Match(
        lambda q, k, v: torch.softmax(torch.where(CAUSAL, scores(q, k), LOW), -1) @ v, mask="causal(offset=0)"
    ),
    "where, the other way": Match(
        lambda q, k, v: torch.softmax(torch.where(~CAUSAL, torch.full([], LOW), scores(q, k)), -1) @ v,
        mask="causal(offset=0)",
    ),
    "made by filling in place (FSMT)": Match(
        lambda q, k, v: torch.softmax(scores(q, k) + torch.zeros(S, S).float().fill_(LOW).triu(1), -1) @ v,
        mask="causal(offset=0)",
    ),
    "where with a full tensor": Match(
        lambda q, k, v: torch.softmax(torch.where(CAUSAL, scores(q, k), torch.full_like(scores(q, k), LOW)), -1) @ v,
        mask="causal(offset=0)",
    ),
    "subtracted": Match(
        lambda q, k, v: torch.softmax(scores(q, k) - 1e9 * (1 - CAUSAL.float()), -1) @ v, mask="causal(offset=0)"
    ),
    "GPT-2: where with -1e4": Match(
        lambda q, k, v: torch.softmax(torch.where(CAUSAL, scores(q, k), -1e4), -1) @ v, mask="causal(offset=0)"
    ),
    "GPT: times 0 and 1, and -1e4 times the rest": Match(
        lambda q, k, v: torch.softmax(scores(q, k) * ONES + -1e4 * (1 - ONES), -1) @ v, mask="causal(offset=0)"
    ),
    "times a mask from outside, minus the rest": Match(
        lambda q, k, v, attention_mask: (
            torch.softmax(_kept(scores(q, k), attention_mask[:, None, None].float(), 1e9), -1) @ v
        ),
        with_padding,
        "key_padding(attention_mask)",
    ),
    "times 0 and 1, the rest a number, in rows that see no key": Match(
        lambda q, k, v, m: torch.softmax(_kept(scores(q, k), m[:, None, None].float(), 1e4), -1) @ v,
        lambda: (*qkv(), (torch.arange(S) < torch.tensor([[0], [9]]))),
        "key_padding(m)",
    ),
    "bottom-right causal": Match(
        lambda q, k, v: torch.softmax(scores(q[:, :, -8:], k).masked_fill(~CAUSAL[-8:], LOW), -1) @ v,
        mask=f"causal(offset={S - 8})",
    ),
    "chunked": Match(
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=CAUSAL & (torch.arange(S)[:, None] // 8 == torch.arange(S) // 8)
        ),
        mask="causal(offset=0) & chunked(8)",
    ),
    "padding as BERT writes it": Match(
        lambda q, k, v, attention_mask: (
            torch.softmax(scores(q, k) + (1.0 - attention_mask[:, None, None].float()) * LOW, -1) @ v
        ),
        with_padding,
        "key_padding(attention_mask)",
    ),
    "padding and causal, filled one after the other": Match(
        lambda q, k, v, m: (
            torch.softmax(scores(q, k).masked_fill(~CAUSAL, -torch.inf).masked_fill(~m[:, None, None], -torch.inf), -1)
            @ v
        ),
        lambda: with_padding(torch.bool),
        "causal(offset=0) & key_padding(m)",
    ),
    "in half precision, softmax in float32": Match(
        lambda q, k, v: (
            torch.softmax((scores(q, k) + additive_causal(torch.bfloat16)).float(), -1).to(torch.bfloat16) @ v
        ),
        lambda: tuple(x.bfloat16() for x in qkv()),
        "causal(offset=0)",
    ),
    "half precision with a float32 mask": Match(
        lambda q, k, v: torch.softmax(scores(q, k) + additive_causal(), -1).to(torch.bfloat16) @ v,
        lambda: tuple(x.bfloat16() for x in qkv()),
        "causal(offset=0)",
    ),
    "a limit at finfo.min (OPT)": Match(
        lambda q, k, v: torch.softmax(torch.max(scores(q, k) + additive_causal(), torch.tensor(LOW)), -1) @ v,
        mask="causal(offset=0)",
    ),
    "softcap": Match(softcapped, mask="causal(offset=0)"),
    "softcap with numbers on the left": Match(
        lambda q, k, v: torch.softmax(20.0 * torch.tanh((1 / 20.0) * scores(q, k)), -1) @ v
    ),
    "sink": Match(Sink(), mask="causal(offset=0)"),
    "a sink that is learned, under padding": Match(SinkUnderPadding(), hidden_rows, "key_padding(m)"),
    "a sink that is an input with bounds, under padding": Match(
        lambda q, k, v, m, s: beside_sink(q, k, v, m, s.tanh()), low_sinks, "key_padding(m)"
    ),
    "a bias that depends on the input": Match(
        lambda q, k, v, b: torch.softmax(scores(q, k) + b * b, -1) @ v, with_bias(B, 1, S, S), bias=(B, 1, S, S)
    ),
    "a bias for each head and key, and a mask of -inf": Match(
        lambda q, k, v, b: torch.softmax((scores(q, k) + b).masked_fill(~CAUSAL, -torch.inf), -1) @ v,
        with_bias(H, 1, S),
        "causal(offset=0)",
        bias=(1, H, 1, S),
    ),
    "a bias from outside, which may hide keys too, and a finite mask": Match(
        lambda q, k, v, b: torch.softmax(scores(q, k) + b + additive_causal(), -1) @ v,
        with_bias(H, 1, S),
        bias=(1, H, S, S),
    ),
    "two biases": Match(
        lambda q, k, v, b: torch.softmax(scores(q, k) + b.tanh() + b.sin() * 0.5, -1) @ v,
        with_bias(H, S, S),
        bias=(1, H, S, S),
    ),
    "a bias that came out of a product": Match(
        lambda q, k, v, r: torch.softmax(scores(q, k) + q[:1] @ r.mT / 8, -1) @ v, with_bias(S, D), bias=(1, H, S, S)
    ),
    "ALiBi": Match(lambda q, k, v: torch.softmax(scores(q, k) + torch.arange(S) * SLOPES, -1) @ v, bias=(1, H, 1, S)),
    "a constant such as -5 is no mask": Match(
        lambda q, k, v: torch.softmax(scores(q, k) + torch.where(CAUSAL, 0.0, -5.0), -1) @ v, bias=(1, 1, S, S)
    ),
    "not causal in one element": Match(
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=CAUSAL.index_put((torch.tensor(3), torch.tensor(9)), torch.tensor(True))
        ),
        bias=(1, 1, S, S),
    ),
    "chosen from activations": Match(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=(q @ k.mT) > -1e30), bias=(B, H, S, S)
    ),
    "the caller's own": Match(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        lambda: (*qkv(), torch.randn(B, 1, S, S) > 0),
        bias=(B, 1, S, S),
    ),
}

KEEP = {
    "filled with -5": Keep(
        lambda q, k, v: torch.softmax(scores(q, k).masked_fill(~CAUSAL, -5.0), -1) @ v, "does not hide"
    ),
    "filled with a tensor": Keep(
        lambda q, k, v, b: torch.softmax(torch.where(CAUSAL, scores(q, k), b), -1) @ v, "is a number", with_bias(S, S)
    ),
    "multiplies the scores": Keep(
        lambda q, k, v: torch.softmax(scores(q, k) * CAUSAL.float(), -1) @ v, "differs from key to key"
    ),
    "times 0 and 2, and -1e4 times the rest": Keep(
        lambda q, k, v: torch.softmax(scores(q, k) * (2 * ONES) - 1e4 * (1 - ONES), -1) @ v, "differs from key to key"
    ),
    "times 0 and 1, and -5 times the rest": Keep(
        lambda q, k, v: torch.softmax(_kept(scores(q, k), ONES, 5.0), -1) @ v, "does not hide"
    ),
    "times 0 and 1, and -1e4 times another rest": Keep(
        lambda q, k, v: torch.softmax(scores(q, k) * ONES - 1e4 * (1 - ONES.mT), -1) @ v, "differs from key to key"
    ),
    "times a number for each key, and -1e4 times the rest": Keep(
        lambda q, k, v, b: torch.softmax(_kept(scores(q, k), b, 1e4), -1) @ v, "differs from key to key", with_bias(S)
    ),
    "an unknown function": Keep(lambda q, k, v: torch.softmax(torch.sin(scores(q, k)), -1) @ v, "no rule knows it"),
    "a limit that matters": Keep(
        lambda q, k, v: torch.softmax(scores(q, k).clamp(min=-3.0), -1) @ v, "could change scores"
    ),
    "a limit on both sides": Keep(
        lambda q, k, v: torch.softmax(scores(q, k).clamp(-1e30, 5.0), -1) @ v, "could change scores"
    ),
    "relu": Keep(lambda q, k, v: torch.softmax(torch.relu(scores(q, k)), -1) @ v, "no rule knows it"),
    "two softcaps": Keep(lambda q, k, v: torch.softmax(torch.tanh(torch.tanh(scores(q, k))), -1) @ v, "second softcap"),
    "inside a softcap": Keep(
        lambda q, k, v: torch.softmax(torch.tanh(scores(q, k) + additive_causal()), -1) @ v, "softcap"
    ),
    "a sink that is any input, under padding": Keep(beside_sink, "sees no key", low_sinks),
    "two columns of sinks": Keep(
        lambda q, k, v, b: torch.softmax(torch.cat([scores(q, k), b], -1), -1)[..., :-2] @ v,
        "not one column",
        with_bias(B, H, S, 2),
    ),
    "a sink in front": Keep(
        lambda q, k, v, b: torch.softmax(torch.cat([b, scores(q, k)], -1), -1)[..., 1:] @ v,
        "not one column",
        with_bias(B, H, S, 1),
    ),
}
