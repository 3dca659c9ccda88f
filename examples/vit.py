"""ViT base, in its real size with random weights: 196 patches and a class token, no mask.

python examples/vit.py
"""

import sys

import torch
from shared import show
from transformers import ViTConfig, ViTModel

if __name__ == "__main__":
    inputs = lambda: {"pixel_values": torch.randn(2, 3, 224, 224)}  # noqa: E731
    sys.exit(show("ViT base", lambda: ViTModel(ViTConfig()), inputs, expected=12))
