"""Tiny models of the families that must work, with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

LENGTH = 64
VOCABULARY = 128
PADDINGS = ("none", "ones", "right", "left")

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "use_cache": False,
}


@dataclass(frozen=True)
class Family:
    """One family: its classes in transformers, its config, and what it is called with."""

    name: str
    model: str
    config: str
    options: dict[str, Any]
    attentions: int
    inputs: str = "tokens"
    gain: float = 3.0
    """Factor on the initial weights. T5 does not scale its scores: with larger ones it amplifies its own rounding."""

    @property
    def implementations(self) -> tuple[str, ...]:
        """What the installed transformers has for it."""
        has_sdpa = getattr(getattr(transformers, self.model), "_supports_sdpa", False)
        return ("eager", "sdpa") if has_sdpa else ("eager",)

    def build(self, implementation: str) -> nn.Module:
        """The model in eval mode, its weights large enough that a wrong mask shows."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options, attn_implementation=implementation)
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(self.gain)
                elif "bias" in name:
                    parameter.normal_(std=0.1)
        return model

    def call(self, padding: str) -> dict[str, Any]:
        """Keyword inputs with the given padding of `attention_mask`, for a batch of two."""
        return INPUTS[self.inputs](padding)


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, LENGTH))


def attention_mask(padding: str) -> dict[str, Tensor]:
    """No mask, all ones, or one row of the batch padded on one side."""
    if padding == "none":
        return {}
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    if padding == "right":
        mask[0, 49:] = 0
    if padding == "left":
        mask[1, :21] = 0
    return {"attention_mask": mask}


def _seq2seq(padding: str) -> dict[str, Any]:
    decoder = attention_mask(padding)
    given = {"decoder_attention_mask": decoder["attention_mask"]} if decoder else {}
    return {"input_ids": tokens(), "decoder_input_ids": tokens(), **attention_mask(padding), **given}


def _text_and_image(padding: str) -> dict[str, Any]:
    return {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 32, 32), **attention_mask(padding)}


INPUTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "tokens": lambda padding: {"input_ids": tokens(), **attention_mask(padding)},
    "seq2seq": _seq2seq,
    "image": lambda padding: {"pixel_values": torch.randn(2, 3, 32, 32)},
    "text and image": _text_and_image,
    "audio": lambda padding: {
        "input_features": torch.randn(2, 16, 2 * LENGTH),
        "decoder_input_ids": tokens(),
        **({"decoder_attention_mask": attention_mask(padding)["attention_mask"]} if padding != "none" else {}),
    },
}

FAMILIES = (
    Family("llama", "LlamaForCausalLM", "LlamaConfig", DECODER, 2),
    Family("mistral", "MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 16}, 2),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", DECODER, 2),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 16}, 2),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**DECODER, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
        2,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": LENGTH,
            "use_cache": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        2,
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**ENCODER, "use_cache": False, "max_position_embeddings": LENGTH},
        2,
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": LENGTH,
            "use_cache": False,
        },
        2,
    ),
    Family("bert", "BertModel", "BertConfig", ENCODER, 2),
    Family("roberta", "RobertaModel", "RobertaConfig", {**ENCODER, "max_position_embeddings": LENGTH + 2}, 2),
    Family(
        "t5",
        "T5Model",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
        },
        6,
        "seq2seq",
        gain=1.0,
    ),
    Family("bart", "BartModel", "BartConfig", BART, 6, "seq2seq"),
    Family(
        "whisper",
        "WhisperModel",
        "WhisperConfig",
        {
            **BART,
            "num_mel_bins": 16,
            "max_source_positions": LENGTH,
            "max_target_positions": LENGTH,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        6,
        "audio",
    ),
    Family("vit", "ViTModel", "ViTConfig", VISION, 2, "image"),
    Family(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**ENCODER, "max_position_embeddings": LENGTH, "eos_token_id": 2},
            "vision_config": VISION,
            "projection_dim": 64,
        },
        4,
        "text and image",
    ),
    Family(
        "modernbert",
        "ModernBertModel",
        "ModernBertConfig",
        {
            **ENCODER,
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
            "reference_compile": False,
            "pad_token_id": 0,
        },
        2,
    ),
)


def variants() -> Iterator[tuple[Family, str]]:
    """Every family in every implementation that it has."""
    for family in FAMILIES:
        for implementation in family.implementations:
            yield family, implementation
