"""Prefill of a small Llama: grouped queries, 2,048 tokens, a batch that is padded on the left.

python examples/llama_prefill.py
"""

import sys

import torch
from shared import show
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    use_cache=False,
)
LENGTH = 2048


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, : int(torch.randint(1, LENGTH // 2, ()))] = 0
    return {"input_ids": torch.randint(0, CONFIG.vocab_size, (2, LENGTH)), "attention_mask": mask}


if __name__ == "__main__":
    sys.exit(show("Llama, prefill", lambda: LlamaForCausalLM(CONFIG), inputs, expected=4))
