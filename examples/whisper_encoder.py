"""The encoder of Whisper tiny, in its real size with random weights: 1,500 frames, no mask.

python examples/whisper_encoder.py
"""

import sys

import torch
from shared import show
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

# whisper-tiny
CONFIG = WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)

if __name__ == "__main__":
    inputs = lambda: {"input_features": torch.randn(1, 80, 3000)}  # noqa: E731
    sys.exit(show("Whisper tiny, encoder", lambda: WhisperEncoder(CONFIG), inputs, expected=4))
