"""torch.nn's transformer layers, their fused operators, and flex_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from neuron_attn_rewrite import RewriteConfig, RewrittenModule, rewrite
from tests.helpers import ALWAYS, relative_error

CAUSAL = torch.ones(10, 10, dtype=torch.bool).triu(1)
PADDING = torch.arange(10) >= torch.tensor([7, 10])[:, None]
STEP = RewriteConfig(policy="always", weights="beside")


def rows(width: int = 32, length: int = 10) -> Tensor:
    return 2 * torch.randn(2, length, width)


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(), 2)


class WithCausalMask(nn.Module):
    """The mask is the module's own, as models write it."""

    def __init__(self, inner: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = inner, options
        self.register_buffer("mask", CAUSAL)

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.inner, nn.MultiheadAttention):
            return self.inner(x, x, x, attn_mask=self.mask, **self.options)[0]
        return self.inner(x, self.mask, **self.options)


def attends_to_itself(**options: Any) -> Callable[[], tuple[tuple[Tensor, ...], dict[str, Any]]]:
    def inputs() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        x = rows()
        return (x, x, x), {"need_weights": False, **options}

    return inputs


LAYERS: dict[str, tuple[nn.Module, Callable[[], Any], list[str]]] = {
    "attention": (nn.MultiheadAttention(32, 4, batch_first=True), attends_to_itself(), ["none"]),
    "attention, sequence first": (nn.MultiheadAttention(32, 4), attends_to_itself(), ["none"]),
    "attention, padded": (
        nn.MultiheadAttention(32, 4, batch_first=True),
        attends_to_itself(key_padding_mask=PADDING),
        ["key_padding(key_padding_mask)"],
    ),
    "attention, causal": (
        WithCausalMask(nn.MultiheadAttention(32, 4, batch_first=True), need_weights=False),
        lambda: ((rows(),), {}),
        ["causal(offset=0)"],
    ),
    "attention to another sequence": (
        nn.MultiheadAttention(32, 4, kdim=16, vdim=24, batch_first=True),
        lambda: ((rows(), rows(16, 14), rows(24, 14)), {"need_weights": False}),
        ["none"],
    ),
    "attention with a bias and a zero as keys": (
        nn.MultiheadAttention(32, 4, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        attends_to_itself(),
        ["none"],
    ),
    "layer": (layer(), lambda: ((rows(),), {}), ["none"]),
    "layer, norm first, gelu": (layer(norm_first=True, activation="gelu"), lambda: ((rows(),), {}), ["none"]),
    "layer, causal": (WithCausalMask(layer()), lambda: ((rows(),), {}), ["causal(offset=0)"]),
    "encoder": (encoder(), lambda: ((rows(),), {}), ["none"] * 2),
    "encoder, padded": (
        encoder(),
        lambda: ((rows(),), {"src_key_padding_mask": PADDING}),
        ["key_padding(src_key_padding_mask)"] * 2,
    ),
    "encoder, causal": (WithCausalMask(encoder()), lambda: ((rows(),), {}), ["causal(offset=0)"] * 2),
    "encoder and decoder": (
        nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
        lambda: ((rows(), rows()), {}),
        ["none"] * 3,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torch(name: str) -> None:
    model, inputs, masks = LAYERS[name]
    model = model.eval()
    args, kwargs = inputs()
    with torch.no_grad():  # under which torch takes its fast path
        rewritten = rewrite(model, args, kwargs, config=ALWAYS)
        assert [str(site.mask) for site in rewritten.report.replaced] == masks, str(rewritten.report)
        args, kwargs = inputs()
        expected, got = (m(*args, **kwargs) for m in (model, rewritten))
    expected, got = (y[0] if isinstance(y, tuple) else y for y in (expected, got))
    if "padded" in name and not isinstance(model, nn.MultiheadAttention):  # the fast path gives zeros at padding
        expected, got = (y.masked_fill(PADDING[..., None], 0) for y in (expected, got))
    assert relative_error(got, expected) < 2e-5
    assert torch.backends.mha.get_fastpath_enabled()


def test_weights_of_an_attention_layer() -> None:
    """need_weights=True: native by default, the output by a kernel on request."""
    model, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), rows()
    (site,) = rewrite(model, (x, x, x), config=ALWAYS).report.kept
    assert any("its weights are also read by" in reason for reason in site.reasons)
    rewritten = rewrite(model, (x, x, x), config=STEP)
    assert len(rewritten.report.replaced) == 1
    for got, expected in zip(rewritten(x, x, x), model(x, x, x), strict=True):
        assert relative_error(got, expected) < 2e-5


class Fused(nn.Module):
    """The operators of the fast path, called by name."""

    def __init__(self, whole_layer: bool, mask_type: int | None, norm_first: bool = False) -> None:
        super().__init__()
        self.layer = layer(norm_first=norm_first)
        self.whole, self.mask_type = whole_layer, mask_type
        self.register_buffer("mask", {None: None, 0: CAUSAL, 1: PADDING}[mask_type])

    def forward(self, x: Tensor) -> Tensor:
        m, a = self.layer, self.layer.self_attn
        heads = (32, 4, a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias)
        if not self.whole:
            fused = torch.ops.aten._native_multi_head_attention
            return fused(x, x, x, *heads, self.mask, False, True, self.mask_type)[0]
        norms = (m.norm1.weight, m.norm1.bias, m.norm2.weight, m.norm2.bias)
        ffn = (m.linear1.weight, m.linear1.bias, m.linear2.weight, m.linear2.bias)
        fused = torch.ops.aten._transformer_encoder_layer_fwd
        return fused(x, *heads, False, m.norm_first, 1e-5, *norms, *ffn, self.mask, self.mask_type)


@pytest.mark.parametrize("mask_type", [None, 0, 1])
@pytest.mark.parametrize("whole", [False, True], ids=["attention", "layer"])
def test_the_fused_operators(whole: bool, mask_type: int | None) -> None:
    model = Fused(whole, mask_type, norm_first=mask_type == 0).eval()
    with torch.no_grad():
        rewritten = rewrite(model, (rows(),), config=ALWAYS)
        x = rows()
        assert len(rewritten.report.replaced) == 1, str(rewritten.report)
        assert relative_error(rewritten(x), model(x)) < 2e-5


S = 32
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
DOCUMENT = torch.arange(S) // 8


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


FLEX: dict[str, tuple[Any, Any, str, bool]] = {
    "plain": (None, None, "none", False),
    "causal": (causal, None, "causal(offset=0)", False),
    "window": (lambda b, h, q, k: (q >= k) & (q - k < 8), None, "sliding_window(8)", False),
    "documents": (lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k], None, "chunked(8)", False),
    "relative position": (None, lambda s, b, h, q, k: s + (q - k), "none", True),
    "ALiBi": (causal, lambda s, b, h, q, k: s + SLOPES[h] * (k - q), "causal(offset=0)", True),
    "softcap": (causal, lambda s, b, h, q, k: 20 * torch.tanh(s / 20), "causal(offset=0)", False),
}


class Flex(nn.Module):
    def __init__(self, mask_mod: Any, score_mod: Any) -> None:
        super().__init__()
        self.score_mod = score_mod
        self.block_mask = create_block_mask(mask_mod, None, None, S, S, device="cpu") if mask_mod else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=self.score_mod, block_mask=self.block_mask, enable_gqa=True)


def flex_inputs() -> tuple[Tensor, ...]:
    return 2 * torch.randn(2, 4, S, 16), 2 * torch.randn(2, 2, S, 16), torch.randn(2, 2, S, 16)


def rewritten_flex(mask_mod: Any, score_mod: Any) -> RewrittenModule:
    model = Flex(mask_mod, score_mod)
    rewritten = rewrite(model, flex_inputs(), config=ALWAYS)
    inputs = flex_inputs()
    assert relative_error(rewritten(*inputs), _dense(inputs, mask_mod, score_mod)) < 2e-5
    return rewritten


def _dense(inputs: tuple[Tensor, ...], mask_mod: Any, score_mod: Any) -> Tensor:
    """flex_attention by its definition."""
    q, k, v = inputs
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    b, h, i, j = torch.meshgrid(*map(torch.arange, (2, 4, S, S)), indexing="ij")
    scores = q @ k.mT * 0.25
    scores = score_mod(scores, b, h, i, j) if score_mod else scores
    if mask_mod:
        scores = scores.masked_fill(~mask_mod(b, h, i, j), -torch.inf)
    return F.softmax(scores, -1) @ v


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention(name: str) -> None:
    mask_mod, score_mod, mask, biased = FLEX[name]
    (site,) = rewritten_flex(mask_mod, score_mod).report.replaced
    assert str(site.mask) == mask and (site.bias is not None) == biased
    assert (site.num_heads, site.num_kv_heads) == (4, 2)


def test_flex_attention_with_another_score_mod_stays() -> None:
    (site,) = rewritten_flex(None, lambda s, b, h, q, k: s * s * 0.1).report.kept
    assert any("differs from score to score" in reason for reason in site.reasons)
