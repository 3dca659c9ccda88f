"""What is done about rows that see no key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.patterns.cases import LOW, Keep, Match, Right, with_padding

PADDED = "key_padding(m)"


def bool_padding() -> tuple[Tensor, ...]:
    """Query, key, value and a mask under which the first batch element sees no key at all."""
    *rest, mask = with_padding(torch.bool)
    mask[0] = False
    return (*rest, mask)


def hidden(q: Tensor, k: Tensor, m: Tensor, fill: float = -torch.inf) -> Tensor:
    return (q @ k.mT * 0.25).masked_fill(~m[:, None, None], fill)


def safe_softmax(x: Tensor) -> Tensor:
    """As scaled_dot_product_attention is decomposed."""
    empty = torch.logical_not(torch.any(torch.logical_not(x == -torch.inf), -1, keepdim=True))
    p = torch.softmax(x, -1)
    return torch.where(empty, torch.zeros_like(p), p)


def by_hand(x: Tensor, less: Callable[[Tensor], Tensor]) -> Tensor:
    """Exponentials of scores less some number of each row, divided by their sum. NaN if all are 0, or one overflows."""
    e = torch.exp(x - less(x))
    return e / e.sum(-1, keepdim=True)


def largest(x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True)


def masked_again(p: Tensor, m: Tensor) -> Tensor:
    """Weights set to zero and normalised again. NaN if those that are left were too small."""
    w = p * m[:, None, None]
    return w / w.sum(-1, keepdim=True)


MATCH = {
    "by hand, less the largest, then NaN to zero": Match(
        lambda q, k, v, m: by_hand(hidden(q, k, m), largest).nan_to_num(0.0) @ v, bool_padding, PADDED
    ),
    "by hand, less nothing": Match(lambda q, k, v, m: _unsafe(hidden(q, k, m)) @ v, bool_padding, PADDED),
    "nan_to_num": Match(
        lambda q, k, v, m: torch.softmax(hidden(q, k, m), -1).nan_to_num(0.0) @ v, bool_padding, PADDED
    ),
    "where isnan": Match(lambda q, k, v, m: _where_nan(torch.softmax(hidden(q, k, m), -1)) @ v, bool_padding, PADDED),
    "masked_fill of NaN": Match(
        lambda q, k, v, m: _fill_nan(torch.softmax(hidden(q, k, m), -1)) @ v, bool_padding, PADDED
    ),
    "zeros where all scores are -inf": Match(
        lambda q, k, v, m: safe_softmax(hidden(q, k, m)) @ v, bool_padding, PADDED
    ),
    "all of them": Match(lambda q, k, v, m: _all(hidden(q, k, m)) @ v, bool_padding, PADDED),
    "the largest is -inf": Match(lambda q, k, v, m: _largest(hidden(q, k, m)) @ v, bool_padding, PADDED),
    "the operator": Match(
        lambda q, k, v, m: torch.ops.aten._safe_softmax(hidden(q, k, m), -1) @ v, bool_padding, PADDED
    ),
    "the same mask once more (XLM)": Match(
        lambda q, k, v, m: torch.softmax(hidden(q, k, m, -1e9), -1).masked_fill(~m[:, None, None], 0.0) @ v,
        bool_padding,
        PADDED,
    ),
    "the same mask, written another way (DeBERTa)": Match(
        lambda q, k, v, attention_mask: (
            torch.softmax((q @ k.mT).masked_fill(~(attention_mask[:, None, None].bool()), -1e9), -1).masked_fill(
                attention_mask[:, None, None] == 0, 0.0
            )
            @ v
        ),
        with_padding,
        "key_padding(attention_mask)",
    ),
    "the same mask once more, with a zero in a tensor (CPM-Ant)": Match(
        lambda q, k, v, m: (
            torch.softmax(hidden(q, k, m), -1).masked_fill(~m[:, None, None], torch.scalar_tensor(0.0)) @ v
        ),
        bool_padding,
        PADDED,
    ),
    "the same mask once more, made twice from what is no mask": Match(
        lambda q, k, v: _made_twice(q, k, v, lambda x: x == torch.tensor(False)), mask="key_padding(gt)"
    ),
    "the same mask once more, then NaN to one": Match(
        lambda q, k, v, m: (torch.softmax(hidden(q, k, m), -1).masked_fill(~m[:, None, None], 0.0) @ v).nan_to_num(1.0),
        bool_padding,
        PADDED,
    ),
    "the same mask times the weights": Match(
        lambda q, k, v, m: (torch.softmax(hidden(q, k, m, -1e9), -1) * m[:, None, None]) @ v, bool_padding, PADDED
    ),
    "mean of the values by a finite fill": Match(
        lambda q, k, v, m: torch.softmax(hidden(q, k, m, -1e9), -1) @ v, bool_padding, PADDED
    ),
}


def chosen(q: Tensor) -> Tensor:
    """Some keys, by the value of an activation."""
    return (q[:, :1, :, 0] > 0)[:, :, None]


def _made_twice(q: Tensor, k: Tensor, v: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    p = torch.softmax((q @ k.mT * 0.25).masked_fill(chosen(q) == torch.tensor(False), -torch.inf), -1)
    return p.masked_fill(again(chosen(q)), 0.0) @ v


def _unsafe(x: Tensor) -> Tensor:
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True)


def _where_nan(p: Tensor) -> Tensor:
    return torch.where(torch.isnan(p), torch.zeros_like(p), p)


def _fill_nan(p: Tensor) -> Tensor:
    return p.masked_fill(p != p, 0.0)


def _all(x: Tensor) -> Tensor:
    return torch.softmax(x, -1).masked_fill(torch.isneginf(x).all(-1, keepdim=True), 0.0)


def _largest(x: Tensor) -> Tensor:
    return torch.where(x.amax(-1, keepdim=True) == -torch.inf, 0.0, torch.softmax(x, -1))


KEEP = {
    **{
        f"by hand, {name}, then NaN to zero": Keep(
            lambda q, k, v, m, softmax=softmax: softmax(q, k, m).nan_to_num(0.0) @ v, "reads the NaN", bool_padding
        )
        for name, softmax in {
            "less nothing": lambda q, k, m: _unsafe(hidden(q, k, m, LOW)),
            "less the largest of all, masked or not": lambda q, k, m: _unsafe(
                (lambda x: x - largest(x))(q @ k.mT * 0.25).masked_fill(~m[:, None, None], LOW)
            ),
            "masked after the softmax": lambda q, k, m: masked_again(torch.softmax(q @ k.mT, -1), m),
        }.items()
    },
    "by hand, less nothing, then NaN to one": Keep(
        lambda q, k, v, m: (_unsafe(hidden(q, k, m, LOW)) @ v).nan_to_num(1.0), "reads the NaN", bool_padding
    ),
    "another mask after the softmax": Keep(
        lambda q, k, v, m: torch.softmax(hidden(q, k, m), -1).masked_fill(m[:, None, None].roll(1, -1), 0.0) @ v,
        "without normalising again",
        bool_padding,
    ),
    "another mask made from what is no mask": Keep(
        lambda q, k, v: _made_twice(q, k, v, lambda x: x == torch.tensor(True)), "without normalising again"
    ),
    "the same operators on another tensor": Keep(
        lambda q, k, v: _made_twice(q, k, v, lambda _: chosen(k) == torch.tensor(False)), "without normalising again"
    ),
    "the mask the wrong way round": Keep(
        lambda q, k, v, m: torch.softmax(hidden(q, k, m, -1e9), -1).masked_fill(m[:, None, None], 0.0) @ v,
        "without normalising again",
        bool_padding,
    ),
    "the same mask once more, with a one in a tensor": Keep(
        lambda q, k, v, m: (
            torch.softmax(hidden(q, k, m), -1).masked_fill(~m[:, None, None], torch.scalar_tensor(1.0)) @ v
        ),
        "no rule knows it",
        bool_padding,
    ),
    "the same mask times the weights, then NaN to one": Keep(
        lambda q, k, v, m: ((torch.softmax(hidden(q, k, m), -1) * m[:, None, None]) @ v).nan_to_num(1.0),
        "sees no key",
        bool_padding,
    ),
    "one of two masks once more, then NaN to one": Keep(
        lambda q, k, v, m: (
            torch.softmax(hidden(q, k, m).masked_fill(m.roll(1)[:, None, None], -1e9), -1).masked_fill(
                m.roll(1)[:, None, None], 0.0
            )
            @ v
        ).nan_to_num(1.0),
        "sees no key",
        bool_padding,
    ),
    "NaN in a branch of torch.cond": Keep(
        lambda q, k, v, m: torch.cond(
            m.any(), lambda x: x.nan_to_num(3.0), lambda x: x + 1.0, (torch.softmax(hidden(q, k, m), -1) @ v,)
        ),
        "sees no key",
        bool_padding,
    ),
    "NaN becomes one": Keep(
        lambda q, k, v, m: torch.softmax(hidden(q, k, m), -1).nan_to_num(1.0) @ v, "no rule knows it", bool_padding
    ),
}

RIGHT = {
    **{
        f"{name}, of scores in {kind}": Right(
            lambda q, k, v, m, function=function, kind=kind, fill=fill: function(hidden(q, k, m, fill), kind) @ v,
            bool_padding,
        )
        for kind, fill in ((torch.float16, -1e9), (torch.bfloat16, LOW))
        for name, function in {
            "all of them": lambda x, kind: torch.softmax(x, -1).masked_fill(
                (x.to(kind) == -torch.inf).all(-1, keepdim=True), 0.0
            ),
            "the largest is -inf": lambda x, kind: torch.where(
                largest(x.to(kind)) == -torch.inf, 0.0, torch.softmax(x, -1)
            ),
            "less the largest": lambda x, kind: by_hand(x, lambda x: largest(x.to(kind)).float()).nan_to_num(0.0),
            "less the log-sum-exp": lambda x, kind: (
                (x - x.to(kind).logsumexp(-1, keepdim=True).float()).exp().nan_to_num(0.0)
            ),
        }.items()
    },
    "any score is -inf": Right(lambda q, k, v, m: _any(hidden(q, k, m)) @ v, bool_padding),
    "all over the queries": Right(lambda q, k, v, m: _over_queries(hidden(q, k, m)) @ v, bool_padding),
    "a limit at finfo.min after -inf": Right(
        lambda q, k, v, m: torch.softmax(hidden(q, k, m).clamp(min=torch.finfo(torch.float32).min), -1) @ v,
        bool_padding,
    ),
    "the same mask after a finite fill that is too weak": Right(
        lambda q, k, v, m: torch.softmax(hidden(q, k, m, -3.0), -1).masked_fill(~m[:, None, None], 0.0) @ v,
        bool_padding,
    ),
}


def _any(x: Tensor) -> Tensor:
    return torch.softmax(x, -1).masked_fill(torch.isneginf(x).any(-1, keepdim=True), 0.0)


def _over_queries(x: Tensor) -> Tensor:
    return torch.softmax(x, -1).masked_fill(torch.isneginf(x).all(-2, keepdim=True), 0.0)
