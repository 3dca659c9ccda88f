"""T5 small, in its real size with random weights: learned position biases, cross-attention, padding.

python examples/t5.py
"""

import sys

import torch
from shared import show
from transformers import T5Config, T5Model

CONFIG = T5Config(vocab_size=1024, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, use_cache=False)


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 256, dtype=torch.int64)
    mask[1, int(torch.randint(128, 256, ())) :] = 0
    ids = lambda length: torch.randint(0, CONFIG.vocab_size, (2, length))  # noqa: E731
    return {"input_ids": ids(256), "attention_mask": mask, "decoder_input_ids": ids(64)}


if __name__ == "__main__":
    sys.exit(show("T5 small", lambda: T5Model(CONFIG), inputs, expected=18))
