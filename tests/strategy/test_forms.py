"""Bridges at the site: chunks as elements of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from neuron_attn_rewrite.report.data import SiteReport
from tests.helpers import Function, kernel_calls, relative_error
from tests.models import DECODER, LENGTH, tokens

Mask = Callable[[int, int], Tensor]
CTE = RewriteConfig(policy="always", kernels=("attention_cte",), tolerances={torch.float32: 0.016}, sdk="2.28")
"""A kernel that can't take chunks: before SDK 2.29 it has no bounds."""


def chunked(size: int, extra: Callable[[Tensor, Tensor], Tensor] | None = None) -> Mask:
    def mask(q_len: int, kv_len: int) -> Tensor:
        i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
        seen = (i // size == j // size) & (j <= i)
        return seen if extra is None else seen & extra(i, j)

    return mask


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """float64, by the definition."""
    q, k, v = query.double(), *(t.double().repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    return (q @ k.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def sites(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], config: RewriteConfig) -> tuple[Any, SiteReport]:
    rewritten = rewrite(Function(attend), inputs, config=config)
    (site,) = rewritten.report.sites
    return rewritten, site


def operands(batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key = 2 * torch.randn(batch, heads, q_len, 16), 2 * torch.randn(batch, kv_heads, kv_len, 16)
    return query, key, torch.randn(batch, kv_heads, kv_len, 16)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("extra", [None, lambda i, j: i - j < 5])
def test_chunks_become_elements_of_the_batch(batch: int, kv_heads: int, size: int, extra: Any) -> None:
    seen = chunked(size, extra)(48, 48)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, seen, scale=0.3, enable_gqa=True)

    rewritten, site = sites(attend, operands(batch, 4, kv_heads, 48, 48), CTE)
    (call,) = kernel_calls(rewritten)
    assert "bounds" not in call.kwargs and call.kwargs["band_upper"] == 0
    assert call.args[1].meta["val"].shape == (batch * 48 // size, kv_heads, size, 16)
    # The report is of the attention as it was found, and says what was done.
    assert (site.batch, site.q_len, f"chunked({size})" in str(site.mask)) == (batch, 48, True)
    assert any(r.code == "bridge" and f"{48 // size} chunks of {size} become" in r for r in site.reasons)
    query, key, value = fresh = operands(batch, 4, kv_heads, 48, 48)
    assert relative_error(rewritten(*fresh), exact(query, key, value, seen, 0.3)) < TOLERANCES[torch.float32]


def test_two_sided_band_and_a_sink_in_chunks() -> None:
    """By an eager model whose heads lie inside, with a scale for each row."""
    seen = chunked(16)(48, 48)
    bias = torch.zeros(48, 48).masked_fill(~seen, -torch.inf)

    def attend(x: Tensor, sink: Tensor, row: Tensor) -> Tensor:
        query, key, value = (t.view(2, 48, 4, 16).transpose(1, 2) for t in x.chunk(3, -1))
        scores = (query * row[None, None, :, None]) @ key.mT + bias
        scores = torch.cat([scores, sink[None, :, None, None].expand(2, 4, 48, 1)], -1)
        return (scores.softmax(-1)[..., :-1] @ value).transpose(1, 2).reshape(2, 48, 64)

    def inputs() -> tuple[Tensor, ...]:
        return torch.randn(2, 48, 192), torch.randn(4), torch.rand(48)

    rewritten, _ = sites(attend, inputs(), CTE)
    (call,) = kernel_calls(rewritten)
    assert call.args[0].meta["val"].shape == (6, 4, 16, 16) and "bounds" not in call.kwargs
    fresh = inputs()
    wide = tuple(t.double() for t in fresh)
    assert relative_error(rewritten(*fresh), attend(*wide)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize(
    ("mask", "q_len", "kv_len"),
    [
        (chunked(16), 40, 40),
        (chunked(16), 16, 32),
        (chunked(16, lambda i, j: (i + j) % 3 < 2), 48, 48),
        (chunked(16, lambda i, j: j >= 8), 48, 48),
        (lambda q, k: (torch.arange(q)[:, None] + 8) // 16 == (torch.arange(k) + 8) // 16, 48, 48),
    ],
    ids=["a chunk is cut short", "not as many keys", "not a band", "not a band of the diagonal", "borders moved"],
)
def test_what_is_no_batch_of_chunks(mask: Mask, q_len: int, kv_len: int) -> None:
    seen = mask(q_len, kv_len)
    seen[:, 0] |= ~seen.any(1)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, seen, scale=0.3)

    config = RewriteConfig(policy="always", kernels=("flash_fwd", "attention_cte"), tolerances=CTE.tolerances)
    rewritten, site = sites(attend, operands(1, 4, 4, q_len, kv_len), config)
    (call,) = kernel_calls(rewritten)
    assert call.args[0].meta["val"].shape[0] == 1 and not any("chunks of" in r for r in site.reasons)
    query, key, value = fresh = operands(1, 4, 4, q_len, kv_len)
    assert relative_error(rewritten(*fresh), exact(query, key, value, seen, 0.3)) < TOLERANCES[torch.float32]


def test_padding_keeps_chunks_where_they_are() -> None:
    seen = chunked(16)(48, 48)

    def attend(query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        mask = seen & (padding != 0)[:, None, None]
        return scaled_dot_product_attention(query, key, value, mask, scale=0.3)

    padding = torch.ones(2, 48, dtype=torch.int64)
    config = RewriteConfig(policy="always")
    inputs = (*operands(2, 4, 4, 48, 48), padding)
    rewritten, site = sites(attend, inputs, config)
    assert "chunked(16) & key_padding" in str(site.mask) and not any("chunks of" in r for r in site.reasons)
    padding[0, 37:] = 0
    query, key, value = operands(2, 4, 4, 48, 48)
    expected = exact(query, key, value, seen & padding.bool()[:, None, None], 0.3).nan_to_num()
    assert relative_error(rewritten(query, key, value, padding), expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("kernel", ["flash_fwd", "attention_cte"])
def test_chunks_are_folded_where_that_pays(kernel: str) -> None:
    """Bounds hide keys from a kernel and spare it nothing, while a band does; to copy the operands costs something."""

    def found(size: int, length: int) -> tuple[Any, SiteReport]:
        seen = chunked(size)(length, length)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)

        inputs = tuple(t.bfloat16() for t in operands(1, 16, 2, length, length))
        return sites(attend, inputs, RewriteConfig(verify=False, kernels=(kernel,), sdk="2.31", policy="always"))

    rewritten, site = found(1024, 2048)
    assert site.kernel == kernel and "bounds" not in kernel_calls(rewritten)[0].kwargs
    assert any("chunks of" in reason for reason in site.reasons)
    rewritten, site = found(256, 512)
    assert site.kernel == kernel and "bounds" in kernel_calls(rewritten)[0].kwargs
    assert not any("chunks of" in reason for reason in site.reasons)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_llama_4(implementation: str) -> None:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **DECODER,
        intermediate_size_mlp=96,
        head_dim=16,
        attention_chunk_size=16,
        num_local_experts=2,
        no_rope_layers=[1, 0],
        attn_implementation=implementation,
        pad_token_id=0,
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    rewritten = rewrite(model, (), {"input_ids": tokens()}, config=CTE)
    first, second = rewritten.report.sites
    assert str(first.mask) == "causal(offset=0) & chunked(16)" and str(second.mask) == "causal(offset=0)"
    assert [call.args[0].meta["val"].shape[0] for call in kernel_calls(rewritten)] == [2 * LENGTH // 16, 2]
    fresh = tokens()
    with torch.no_grad():
        new = rewritten(input_ids=fresh).logits
        old = model.double()(input_ids=fresh).logits  # the weights are shared
    assert relative_error(new, old) < 1e-3
