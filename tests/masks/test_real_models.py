"""Masks of real models that no padding alone makes: spans of images, chunks that move, packed sequences, caches.

Each is captured with one example, and called with spans, paddings and positions that the example does not have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations import executorch

from neuron_attn_rewrite import CaptureError, RewriteConfig, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from tests.helpers import kernel_calls, relative_error
from tests.models import DECODER, VOCABULARY

LENGTH, IMAGE = 24, VOCABULARY - 1
UNVERIFIED = RewriteConfig(policy="always", verify=False)
"""What is wrong is to show, and not to be put back."""
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {**DECODER, "head_dim": 16, "max_position_embeddings": 64}
PART = "key >= first(cumsum >= cumsum[batch, query])"
"""The keys of a query's own sequence begin there."""
Call = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, its calls (the first is the example), and the masks that are proven of its attentions."""

    build: Callable[[], nn.Module]
    calls: Callable[[], Iterator[Call]]
    masks: set[str]
    attentions: int = 2
    captured: bool = True
    """Whether transformers 4 lets it be captured as one graph."""


def grown(model: nn.Module, gain: float = 3.0) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    return model.eval()


def build(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: grown(
        getattr(transformers, model)(getattr(transformers, config)(**options, attn_implementation="sdpa"))
    )


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY - 3, (batch, LENGTH))


def padded(left: int = 0, right: int = 0) -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :left] = 0
    mask[1, LENGTH - right :] = 0
    return mask


def paddings() -> Iterator[Call]:
    for left, right in ((0, 0), (5, 0), (0, 9), (19, 3)):
        yield {"input_ids": tokens(), "attention_mask": padded(left, right)}


def images() -> Iterator[Call]:
    """Two images of four tokens, in one row or in both."""
    for spans, mask in (
        ([(0, 3), (1, 10)], padded()),
        ([(0, 15), (1, 1)], padded(3)),
        ([(1, 6), (1, 13)], padded(right=4)),
    ):
        ids, kinds = tokens(), torch.zeros(2, LENGTH, dtype=torch.int64)
        for row, start in spans:
            ids[row, start : start + 4], kinds[row, start : start + 4] = IMAGE, 1
        pixels = torch.randn(2, 3, 16, 16)
        yield {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask, "token_type_ids": kinds}


def prefixes() -> Iterator[Call]:
    """An image, then a prefix that sees itself, then a causal rest."""
    for ends, right in (((9, 9), 0), ((5, 20), 3), ((24, 6), 8)):
        ids = tokens()
        ids[:, :4] = IMAGE
        kinds = (torch.arange(LENGTH) >= torch.tensor(ends)[:, None]).long()
        call = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "attention_mask": padded(right=right)}
        yield {**call, "token_type_ids": kinds, "labels": ids}


def packed() -> Iterator[Call]:
    """Sequences of these lengths, one behind the other; also positions that a tokenizer would not make."""
    rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((24,), (10, 8, 6), (1,) * 24, (23, 1))]
    rows += [torch.arange(24) + 7, torch.arange(24).flip(0), torch.randint(0, 3, (24,)), torch.arange(24) // 2]
    for pair in zip(rows, [*rows[1:], rows[0]], strict=True):
        yield {"input_ids": tokens(), "position_ids": torch.stack(pair)}


def several_images() -> Iterator[Call]:
    for _ in range(2):
        yield {"pixel_values": torch.randn(3, 3, 16, 16), "image_sizes": [(16, 16), (8, 16), (16, 8)]}


CASES = {
    "gemma3 with images": Case(
        build(
            "Gemma3ForConditionalGeneration",
            "Gemma3Config",
            text_config={
                **TEXT,
                "query_pre_attn_scalar": 16,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
        ),
        images,
        {"none"},
        attentions=3,
        captured=False,
    ),
    "paligemma": Case(
        build(
            "PaliGemmaForConditionalGeneration",
            "PaliGemmaConfig",
            text_config={"model_type": "gemma", **TEXT},
            vision_config={"model_type": "siglip_vision_model", **VISION},
            projection_dim=64,
            hidden_size=64,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
        ),
        prefixes,
        {"none"},
        attentions=3,
        captured=False,
    ),
    "pixtral": Case(
        build("PixtralVisionModel", "PixtralVisionConfig", **VISION),
        several_images,
        {"intervals(8 rows)"},
        attentions=1,
        captured=False,
    ),
    "llama4": Case(
        build(
            "Llama4TextModel",
            "Llama4TextConfig",
            **TEXT,
            attention_chunk_size=8,
            intermediate_size_mlp=96,
            num_local_experts=2,
            moe_layers=[],
            no_rope_layers=[1, 0],
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        paddings,
        {
            "causal(offset=0) & key >= sum[batch] + 8 * ((- sum[batch] + query) // 8) & key_padding(attention_mask)",
            "causal(offset=0) & key_padding(attention_mask)",
        },
    ),
    "packed sequences": Case(build("LlamaModel", "LlamaConfig", **DECODER), packed, {f"causal(offset=0) & {PART}"}),
    "packed sequences with windows": Case(
        build("MistralModel", "MistralConfig", **DECODER, sliding_window=5), packed, {f"sliding_window(5) & {PART}"}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_masks_of_other_inputs_than_the_example(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, calls = case.build(), list(case.calls())
    try:
        rewritten = rewrite(model, (), calls[0], config=UNVERIFIED)
    except CaptureError:
        assert transformers.__version__.startswith("4.") and not case.captured
        return
    assert len(kernel_calls(rewritten)) == case.attentions == len(rewritten.report.sites), str(rewritten.report)
    assert {re.sub(r"sum_\d+", "sum", str(site.mask)) for site in rewritten.report.sites} == case.masks
    assert all(site.bias is None or any("dense operand" in r for r in site.reasons) for site in rewritten.report.sites)
    for call in calls:
        with torch.no_grad():
            old, new = model(**call), rewritten(**call)
        old, new = (out[0] if getattr(out, "logits", None) is None else out.logits for out in (old, new))
        if "attention_mask" in call:
            old, new = (out[call["attention_mask"].bool()] for out in (old, new))
        assert relative_error(new, old) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("step", [1, 3])
def test_a_static_cache_bounds_the_keys(step: int) -> None:
    """Transformers' own module of a decoder with a static cache, token by token and some at a time."""

    def cached() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**DECODER, "use_cache": True}, attn_implementation="sdpa")
        model = grown(transformers.LlamaForCausalLM(config))
        model.generation_config = transformers.GenerationConfig(
            use_cache=True,
            cache_implementation="static",
            max_length=LENGTH,
            cache_config={"batch_size": 1, "max_cache_len": LENGTH},
        )
        return executorch.TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=LENGTH)

    model, ids = cached(), tokens(1)
    calls = [
        {"input_ids": ids[:, i : i + step], "cache_position": torch.arange(i, i + step)} for i in range(0, LENGTH, step)
    ]
    rewritten = rewrite(cached(), (), calls[0], config=UNVERIFIED)
    for site in rewritten.report.sites:
        assert site.bias is None and re.fullmatch(r"key <= \w+\[(0|query)\]|key_padding\(le\)", str(site.mask))
    assert len(kernel_calls(rewritten)) == 2
    with torch.no_grad():
        for call in calls:
            assert relative_error(rewritten(**call), model(**call)) <= TOLERANCES[torch.float32]
