"""Learned sinks that are no column of the scores: one more exponential in the sum of each row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.patterns.cases import CAUSAL, LOW, B, H, Keep, Match, Right, S, qkv


def with_sink() -> tuple[Tensor, ...]:
    """Query, key, value and a sink for each head, some of them larger than all scores."""
    q, k, v = qkv()
    return q, k, v, 8 * torch.randn(H)


def with_mask(hides_all: bool = True) -> Callable[[], tuple[Tensor, ...]]:
    """The same and a mask of padding on both sides: rows of the first sequence see no key."""

    def inputs() -> tuple[Tensor, ...]:
        mask = torch.ones(B, S, dtype=torch.bool)
        mask[0, : 5 if hides_all else 0] = False
        mask[1, -3:] = False
        return (*with_sink(), mask)

    return inputs


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scores, values and the sink [H, 1, 1] to the output."""


def of(attention: Attention) -> Callable[..., Tensor]:
    return lambda q, k, v, sink: attention(q @ k.mT * 0.25, v, sink[:, None, None])


def masked(attention: Attention, fill: float, is_bounded: bool = True) -> Callable[..., Tensor]:
    """An input may be as low as the scores of hidden keys, unless the model bounds it."""

    def run(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, mask: Tensor) -> Tensor:
        sink = 8 * sink.tanh() if is_bounded else sink
        seen = CAUSAL & mask[:, None, None]
        return attention((q @ k.mT * 0.25).masked_fill(~seen, fill), v, sink[:, None, None])

    return run


def plain(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    m = torch.maximum(s.amax(-1, keepdim=True), sink)
    p = torch.exp(s - m)
    return (p / (p.sum(-1, keepdim=True) + torch.exp(sink - m))) @ v


def at_the_end(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """Divided at the end, without keepdim, with an expanded sink and a detached maximum."""
    sink = sink[..., 0].expand(B, H, S)
    m = torch.max(sink, s.max(-1).values).detach()
    p = torch.exp(s - m[..., None])
    return (p @ v) / ((sink - m).exp() + p.sum(-1))[..., None]


def maximum_of_scores(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """A sink far above the scores makes the sum infinite, and the weights 0."""
    m = s.amax(-1, keepdim=True)
    p = torch.exp(s - m)
    return (p @ v) * (p.sum(-1, keepdim=True) + torch.exp(sink - m)).reciprocal()


def no_maximum(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    p = (s / 4).exp()
    return (p / (p.sum(-1, keepdim=True) + (sink / 4).exp())) @ v


def by_gate(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """A softmax without the sink, and a gate of its log-sum-exp."""
    return (s.softmax(-1) @ v) * torch.sigmoid(s.logsumexp(-1, keepdim=True) - sink)


def by_written_gate(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    lse = s.logsumexp(-1, keepdim=True)
    return (s.softmax(-1) @ v) * (1 / (1 + torch.exp(sink - lse)))


def by_logaddexp(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return torch.exp(s - torch.logaddexp(s.logsumexp(-1, keepdim=True), sink)) @ v


def of_two_blocks(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    a, b = s.split((20, 4), -1)
    m = torch.maximum(torch.maximum(a.amax(-1, keepdim=True), b.amax(-1, keepdim=True)), sink)
    p, r = (a - m).exp(), (b - m).exp()
    total = p.sum(-1, keepdim=True) + r.sum(-1, keepdim=True) + (sink - m).exp()
    return (p @ v[:, :, :20] + r @ v[:, :, 20:]) / total


class Module(nn.Module):
    """The sink is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(8 * torch.randn(H))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q @ k.mT * 0.25, v, self.sinks.view(1, -1, 1, 1))


def number(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    m = s.amax(-1, keepdim=True).clamp(min=1.5)
    p = torch.exp(s - m)
    return (p / (p.sum(-1, keepdim=True) + torch.exp(1.5 - m))) @ v


def of_each_row(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return plain(s, v, sink + torch.arange(S)[:, None])


def two_sinks(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    m = s.amax(-1, keepdim=True)
    p = torch.exp(s - m)
    return (p / (p.sum(-1, keepdim=True) + torch.exp(sink - m) + torch.exp(-m))) @ v


def twice(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    m = torch.maximum(s.amax(-1, keepdim=True), sink)
    p = torch.exp(s - m)
    return (p / (p.sum(-1, keepdim=True) + 2 * torch.exp(sink - m))) @ v


def without_maximum(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """The maximum is not subtracted from the sink."""
    m = torch.maximum(s.amax(-1, keepdim=True), sink)
    p = torch.exp(s - m)
    return (p / (p.sum(-1, keepdim=True) + torch.exp(sink))) @ v


def other_gate(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return (s.softmax(-1) @ v) * torch.sigmoid(s.amax(-1, keepdim=True) - sink)


def nan_as_five(s: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return by_gate(s, v, sink).nan_to_num(5.0)


CASES = {
    "one maximum and one sum": plain,
    "divided at the end": at_the_end,
    "a maximum of the scores alone": maximum_of_scores,
    "no maximum": no_maximum,
    "as a gate": by_gate,
    "as a gate that is written out": by_written_gate,
    "in the log-sum-exp": by_logaddexp,
}
MATCH = {
    **{
        name: Match(of(case), with_sink, scale=0.25 if case is not no_maximum else None) for name, case in CASES.items()
    },
    **{
        f"{name}, masked by {fill}": Match(masked(case, fill), with_mask(), "causal(offset=0) & key_padding(mask)")
        for name, case in CASES.items()
        for fill in (-torch.inf, LOW, -1e4)
        if case is not no_maximum
    },
    "a parameter": Match(Module(), scale=0.25),
    "a number": Match(of(number), with_sink, scale=0.25),
}

KEEP = {
    "a sink of each row": Keep(of(of_each_row), "not one number a head", with_sink),
    "two sinks": Keep(of(two_sinks), "more than one sink", with_sink),
    "a sink as low as hidden scores": Keep(
        masked(plain, -torch.inf, False), "sees no key must give zeros", with_mask()
    ),
    "NaN that is read": Keep(masked(nan_as_five, -torch.inf), "reads the NaN", with_mask()),
}

RIGHT = {
    "two blocks of one product": Right(of(of_two_blocks), with_sink),
    "a sink twice": Right(of(twice), with_sink),
    "a sink without the maximum": Right(of(without_maximum), with_sink),
    "a gate of the maximum": Right(of(other_gate), with_sink),
}
