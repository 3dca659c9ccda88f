"""BERT base, in its real size with random weights: two sentences of different lengths in one padded batch.

With real weights: examples/minilm.py.

    python examples/bert_embeddings.py
"""

import sys

import torch
from shared import show
from transformers import BertConfig, BertModel

CONFIG = BertConfig(vocab_size=1024)


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 256, dtype=torch.int64)
    mask[1, int(torch.randint(64, 256, ())) :] = 0
    return {"input_ids": torch.randint(0, CONFIG.vocab_size, (2, 256)), "attention_mask": mask}


if __name__ == "__main__":
    sys.exit(show("BERT base", lambda: BertModel(CONFIG), inputs, expected=12))
