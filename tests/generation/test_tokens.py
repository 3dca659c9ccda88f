"""The vocabulary of which tokens are drawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from neuron_attn_rewrite import CaptureError
from neuron_attn_rewrite.generation.tokens import random_tokens

BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, tuple[Any, int, int]] = {
    "one": (transformers.BartConfig(vocab_size=50), 50, 50),
    "source and target": (transformers.FSMTConfig(langs=["a", "b"], src_vocab_size=50, tgt_vocab_size=60), 50, 60),
    "decoder's own": (transformers.MarianConfig(vocab_size=50, decoder_vocab_size=60), 50, 60),
    "two configs": (
        transformers.EncoderDecoderConfig(encoder=BERT | {"vocab_size": 50}, decoder=BERT | {"vocab_size": 60}),
        50,
        60,
    ),
    "text inside of an encoder": (
        SimpleNamespace(
            encoder=transformers.LlavaConfig(text_config=transformers.LlamaConfig(vocab_size=50)),
            get_text_config=lambda **which: SimpleNamespace(vocab_size=60),
        ),
        50,
        60,
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("encoder", [True, False])
def test_the_vocabulary(kind: str, encoder: bool) -> None:
    config, of_encoder, of_decoder = CONFIGS[kind]
    tokens = random_tokens(SimpleNamespace(config=config, device="cpu"), 20, 400, encoder=encoder)
    assert tokens.shape == (20, 400) and tokens.dtype == torch.int64
    size = of_encoder if encoder else of_decoder
    assert size - 3 <= tokens.max() < size  # the last ones may be special


def test_no_special_tokens() -> None:
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(vocab_size=8), image_token_index=3)
    tokens = random_tokens(SimpleNamespace(config=config, device="cpu"), 1, 400)
    assert 3 not in tokens and {4, 5, 6, 7} <= set(tokens[0].tolist())


def test_a_config_without_a_vocabulary() -> None:
    config = SimpleNamespace(get_text_config=lambda **which: SimpleNamespace())
    with pytest.raises(CaptureError, match="has none of decoder_vocab_size, tgt_vocab_size, vocab_size"):
        random_tokens(SimpleNamespace(config=config, device="cpu"), 1, 4)
