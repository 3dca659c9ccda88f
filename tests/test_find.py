"""Every spelling of attention that must be found, and near misses that must stay."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_attn_rewrite import rewrite
from tests.helpers import ALWAYS, Function, check

B, H, S, D = 2, 4, 24, 16
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
LOW = torch.finfo(torch.float32).min


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value [B, H, S, D], large enough that a wrong mask or scale shows."""
    return tuple(3 * torch.randn(B, H, S, D) for _ in range(3))  # type: ignore[return-value]


def grouped() -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads on two kv heads."""
    return 3 * torch.randn(B, H, S, D), 3 * torch.randn(B, 2, S, D), 3 * torch.randn(B, 2, S, D)


def repeat_kv(x: Tensor, n: int = 2) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def additive_causal(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((S, S), LOW, dtype=dtype).triu(1)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.transpose(2, 3) * 0.25 / 20.0) * 20.0
    return torch.softmax(scores + additive_causal(), -1) @ v


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B * H, S, D] with baddbmm, as BLOOM writes it."""
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    scores = torch.baddbmm(additive_causal()[None].expand(B * H, S, S), q, k.transpose(1, 2), beta=1.0, alpha=0.25)
    return torch.bmm(torch.softmax(scores, -1), v).view(B, H, S, D)


def from_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, H, D] operands and einsum."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / sqrt(D)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~CAUSAL, LOW).softmax(-1), v)


def transposed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys by queries: the softmax runs over dim -2."""
    scores = k @ q.transpose(2, 3) * 0.25
    return torch.softmax(scores, -2).transpose(2, 3) @ v


def five_dims(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped query attention without any repeat: [B, kv heads, group, S, S]."""
    q = q.view(B, 2, 2, S, D)
    scores = q @ k[:, :, None].transpose(3, 4) * 0.25
    return (torch.softmax(scores + additive_causal(), -1) @ v[:, :, None]).reshape(B, H, S, D)


def max_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) * 0.25 + additive_causal()
    scores = scores - scores.amax(-1, keepdim=True)
    return torch.softmax(scores, -1) @ v


class Sink(nn.Module):
    """GPT-OSS: a learned logit for each head in one more column."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(H))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * 0.25 + additive_causal()
        scores = torch.cat([scores, self.sink.reshape(1, -1, 1, 1).expand(B, -1, S, 1)], -1)
        scores = scores - scores.max(-1, keepdim=True).values
        return torch.softmax(scores, -1)[..., :-1] @ v


MATCHES: dict[str, tuple[Callable[[], tuple[Tensor, ...]], Any, str]] = {
    "sdpa": (qkv, lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "none"),
    "sdpa, causal flag": (
        qkv,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "causal(offset=0)",
    ),
    "sdpa, bool mask": (
        qkv,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=CAUSAL, scale=0.3),
        "causal(offset=0)",
    ),
    "sdpa, float mask": (
        qkv,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=additive_causal()),
        "causal(offset=0)",
    ),
    "sdpa, grouped flag": (
        grouped,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "causal(offset=0)",
    ),
    "sdpa, repeated keys": (
        grouped,
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True),
        "causal(offset=0)",
    ),
    "sdpa, three dims": (
        lambda: tuple(x[0] for x in qkv()),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "causal(offset=0)",
    ),
    "scale multiplies the scores": (qkv, lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) * 0.25, -1) @ v, "none"),
    "scale divides the scores": (qkv, lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) / 4, -1) @ v, "none"),
    "scale on the query": (qkv, lambda q, k, v: torch.softmax((q * 0.25) @ k.transpose(2, 3), -1) @ v, "none"),
    "scale on the key": (qkv, lambda q, k, v: torch.softmax(q @ (k / 4).transpose(2, 3), -1) @ v, "none"),
    "scale on both": (qkv, lambda q, k, v: torch.softmax((q * 0.5) @ (0.5 * k).transpose(2, 3), -1) @ v, "none"),
    "scale is a constant tensor": (
        qkv,
        lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) / torch.full([], D**0.5), -1) @ v,
        "none",
    ),
    "no scale": (qkv, lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) / 9 * 9 / 9, -1) @ v, "none"),
    "mask on the right": (
        qkv,
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25 + additive_causal(), -1) @ v,
        "causal(offset=0)",
    ),
    "mask on the left": (
        qkv,
        lambda q, k, v: torch.softmax(additive_causal() + q @ k.mT * 0.25, -1) @ v,
        "causal(offset=0)",
    ),
    "two masks": (
        qkv,
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25 + additive_causal() + additive_causal().mT, -1) @ v,
        "causal(offset=0) & window(left=0)",
    ),
    "masked_fill": (
        qkv,
        lambda q, k, v: torch.softmax((q @ k.mT * 0.25).masked_fill(~CAUSAL, -torch.inf), -1) @ v,
        "causal(offset=0)",
    ),
    "where": (
        qkv,
        lambda q, k, v: torch.softmax(torch.where(CAUSAL, q @ k.mT * 0.25, LOW), -1) @ v,
        "causal(offset=0)",
    ),
    "where, the other way": (
        qkv,
        lambda q, k, v: torch.softmax(torch.where(~CAUSAL, torch.full([], LOW), q @ k.mT * 0.25), -1) @ v,
        "causal(offset=0)",
    ),
    "mask scaled with the scores": (
        qkv,
        lambda q, k, v: torch.softmax((q @ k.mT + additive_causal()) * 0.25, -1) @ v,
        "causal(offset=0)",
    ),
    "float32 softmax": (
        qkv,
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25, -1, dtype=torch.float32).to(q.dtype) @ v,
        "none",
    ),
    "dropout that is off": (
        qkv,
        lambda q, k, v: F.dropout(torch.softmax(q @ k.mT * 0.25, -1), 0.1, training=False) @ v,
        "none",
    ),
    "dropout of zero": (
        qkv,
        lambda q, k, v: F.dropout(torch.softmax(q @ k.mT * 0.25, -1), 0.0, training=True) @ v,
        "none",
    ),
    "key transposed by permute": (
        qkv,
        lambda q, k, v: torch.softmax(q @ k.permute(0, 1, 3, 2) * 0.25, -1) @ v,
        "none",
    ),
    "key transposed twice": (
        qkv,
        lambda q, k, v: torch.softmax(q @ k.permute(0, 3, 1, 2).transpose(1, 2) * 0.25, -1) @ v,
        "none",
    ),
    "repeated by expand": (
        grouped,
        lambda q, k, v: torch.softmax(q @ repeat_kv(k).mT * 0.25, -1) @ repeat_kv(v),
        "none",
    ),
    "repeated by repeat_interleave": (
        grouped,
        lambda q, k, v: torch.softmax(q @ k.repeat_interleave(2, 1).mT * 0.25, -1) @ v.repeat_interleave(2, 1),
        "none",
    ),
    "repeated by repeat": (
        grouped,
        lambda q, k, v: torch.softmax(q @ k.repeat(1, 2, 1, 1).mT * 0.25, -1) @ v.repeat(1, 2, 1, 1),
        "none",
    ),
    "one kv head that broadcasts": (
        lambda: (3 * torch.randn(B, H, S, D), *(3 * torch.randn(B, 1, S, D) for _ in range(2))),
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25, -1) @ v,
        "none",
    ),
    "cross attention": (
        lambda: (3 * torch.randn(B, H, S, D), *(3 * torch.randn(B, H, S + 7, D) for _ in range(2))),
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25, -1) @ v,
        "none",
    ),
    "other value width": (
        lambda: (*qkv()[:2], 3 * torch.randn(B, H, S, 24)),
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25, -1) @ v,
        "none",
    ),
    "bottom-right causal": (
        lambda: (3 * torch.randn(B, H, 8, D), *qkv()[1:]),
        lambda q, k, v: torch.softmax((q @ k.mT * 0.25).masked_fill(~CAUSAL[-8:], LOW), -1) @ v,
        f"causal(offset={S - 8})",
    ),
    "chunked": (
        qkv,
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=CAUSAL & (torch.arange(S)[:, None] // 8 == torch.arange(S) // 8)
        ),
        "causal(offset=0) & chunked(8)",
    ),
    "softcap": (qkv, softcapped, "causal(offset=0)"),
    "folded heads": (qkv, folded, "causal(offset=0)"),
    "einsum over rows": (qkv, from_rows, "causal(offset=0)"),
    "keys by queries": (qkv, transposed_scores, "none"),
    "five dims": (grouped, five_dims, "causal(offset=0)"),
    "row maximum subtracted": (qkv, max_subtracted, "causal(offset=0)"),
    "sink": (qkv, Sink(), "causal(offset=0)"),
}


@pytest.mark.parametrize("name", MATCHES)
def test_found_and_replaced(name: str) -> None:
    inputs, attention, mask = MATCHES[name]
    model = attention if isinstance(attention, nn.Module) else Function(attention)
    report = check(model, inputs, replaced=1).report
    site = report.sites[0]
    assert str(site.mask) == mask
    assert site.bias is None


def test_the_group_is_undone() -> None:
    for name in ("sdpa, repeated keys", "repeated by repeat_interleave", "repeated by repeat", "five dims"):
        inputs, attention, _ = MATCHES[name]
        site = check(Function(attention), inputs, replaced=1).report.sites[0]
        assert (site.num_heads, site.num_kv_heads) == (H, 2), name


def test_scales_are_folded_into_one_number() -> None:
    expected = {"scale on both": 0.25, "no scale": 1 / 9, "sdpa, bool mask": 0.3, "mask scaled with the scores": 0.25}
    for name, scale in expected.items():
        inputs, attention, _ = MATCHES[name]
        assert check(Function(attention), inputs, replaced=1).report.sites[0].scale == pytest.approx(scale)


BIASES: dict[str, tuple[Callable[[], tuple[Tensor, ...]], Any, tuple[int, ...]]] = {
    "a bias that depends on the input": (
        lambda: (*qkv(), torch.randn(B, 1, S, S)),
        lambda q, k, v, b: torch.softmax(q @ k.mT * 0.25 + b * b, -1) @ v,
        (B, 1, S, S),
    ),
    "a bias for each head": (
        lambda: (*qkv(), torch.randn(H, 1, S)),
        lambda q, k, v, b: torch.softmax(q @ k.mT * 0.25 + b + additive_causal(), -1) @ v,
        (1, H, 1, S),
    ),
    "ALiBi": (
        qkv,
        lambda q, k, v: (
            torch.softmax(
                q @ k.mT * 0.25 + torch.arange(S) * torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None], -1
            )
            @ v
        ),
        (1, H, 1, S),
    ),
    "a constant such as -5 is no mask": (
        qkv,
        lambda q, k, v: torch.softmax(q @ k.mT * 0.25 + torch.where(CAUSAL, 0.0, -5.0), -1) @ v,
        (1, 1, S, S),
    ),
    "not causal in one element": (
        qkv,
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=CAUSAL.index_put((torch.tensor(3), torch.tensor(9)), torch.tensor(True))
        ),
        (1, 1, S, S),
    ),
    "a mask chosen from activations": (
        qkv,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=(q @ k.mT) > -1e30),
        (B, H, S, S),
    ),
    "a mask of the caller's own": (
        lambda: (*qkv(), torch.randn(B, 1, S, S) > 0),
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        (B, 1, S, S),
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_unproven_terms_are_dense_operands(name: str) -> None:
    """Right numbers, and no claim about what is not proven."""
    inputs, attention, shape = BIASES[name]
    site = check(Function(attention), inputs, replaced=1).report.sites[0]
    assert site.bias == shape
    assert any("dense operand" in reason for reason in site.reasons)


def test_a_tensor_scale_moves_into_the_query() -> None:
    inputs = lambda: (*qkv(), torch.rand(H, 1, 1) + 0.5)  # noqa: E731
    rewritten = check(
        Function(lambda q, k, v, s: torch.softmax(q @ k.mT * s + additive_causal(), -1) @ v), inputs, replaced=1
    )
    assert str(rewritten.report.sites[0].mask) == "causal(offset=0)"


def test_shared_keys() -> None:
    """Two attentions read one key and one mask."""

    def two(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask = additive_causal()
        return torch.softmax(q @ k.mT * 0.25 + mask, -1) @ v, torch.softmax(v @ k.mT * 0.25 + mask, -1) @ q

    check(Function(two), qkv, replaced=2)


def _weights_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(q @ k.mT * 0.25, -1)
    return p @ v, p


KEPT: dict[str, tuple[Any, str]] = {
    "softmax over the queries": (lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v, "sum over the keys"),
    "softmax over the heads": (lambda q, k, v: torch.softmax(q @ k.mT, 1) @ v, "keys"),
    "probabilities transposed": (lambda q, k, v: torch.softmax(q @ k.mT, -1).mT @ v, "sum over the keys"),
    "weights also returned": (_weights_too, "weights are also read by the model's output"),
    "dropout in training": (
        lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.5, training=True) @ v,
        "dropout is active",
    ),
    "sdpa with dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), "dropout is active"),
    "masked_fill with -5": (
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(~CAUSAL, -5.0), -1) @ v,
        "does not hide",
    ),
    "a scale for each key": (
        lambda q, k, v: torch.softmax((q @ k.mT) * v[..., 0][:, :, None], -1) @ v,
        "differs from key to key",
    ),
    "an unknown function of the scores": (
        lambda q, k, v: torch.softmax(torch.sin(q @ k.mT), -1) @ v,
        "no rule knows it",
    ),
    "a mask that multiplies": (lambda q, k, v: torch.softmax(torch.relu(q @ k.mT), -1) @ v, "no rule knows it"),
    "probabilities changed": (lambda q, k, v: torch.softmax(q @ k.mT, -1).square() @ v, "no rule knows it"),
    "two softcaps": (
        lambda q, k, v: torch.softmax(torch.tanh(torch.tanh(q @ k.mT)), -1) @ v,
        "second softcap",
    ),
    "a term inside a softcap": (
        lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT + additive_causal()), -1) @ v,
        "softcap",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_near_misses_stay_native(name: str) -> None:
    attention, reason = KEPT[name]
    rewritten = rewrite(Function(attention), qkv(), config=ALWAYS)
    assert not rewritten.report.replaced
    (site,) = rewritten.report.kept
    assert reason in " ".join(site.reasons), site.reasons


NO_ATTENTION: dict[str, Any] = {
    "a router": lambda x, w: torch.topk(torch.softmax(F.linear(x, w), -1), 2).values,
    "a softmax alone": lambda x, w: torch.softmax(x, -1),
    "a product alone": lambda x, w: x @ w.mT,
}


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_what_is_no_attention_is_not_reported(name: str) -> None:
    rewritten = rewrite(Function(NO_ATTENTION[name]), (torch.randn(S, D), torch.randn(8, D)), config=ALWAYS)
    assert rewritten.report.sites == ()


def test_swapped_query_and_key_of_square_sizes() -> None:
    """Softmax over the first operand's rows is attention of the second on the first, or nothing."""
    rewritten = rewrite(
        Function(lambda q, k, v: torch.softmax(k @ q.mT * 0.25, -1) @ v), tuple(torch.randn(1, 1, D, D) for _ in "qkv")
    )
    assert len(rewritten.report.sites) == 1
    q, k, v = (3 * torch.randn(1, 1, D, D) for _ in "qkv")
    expected = torch.softmax(k @ q.mT * 0.25, -1) @ v
    torch.testing.assert_close(rewritten(q, k, v), expected, rtol=1e-4, atol=1e-4)
