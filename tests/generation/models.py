"""Tiny causal models."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.models import DECODER, VOCABULARY

FIELDS = {"GPT2": {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}}


def make(kind: str = "Llama", **fields: Any) -> Any:
    """A model that can generate, its weights large enough that a wrong mask shows."""
    config = getattr(transformers, f"{kind}Config")(**{**FIELDS.get(kind, DECODER), "use_cache": True, **fields})
    torch.manual_seed(0)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model
