"""Random tokens of text, for the calls that are captured and compared."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import CaptureError

SIZES = {True: ("src_vocab_size", "vocab_size"), False: ("decoder_vocab_size", "tgt_vocab_size", "vocab_size")}
"""What configs call the size of the vocabulary that the encoder reads, and of that of the decoder."""


def random_tokens(model: Any, batch: int, length: int, *, encoder: bool = False) -> Tensor:
    """Tokens of text, int64 [batch, length]: none that stands for a piece of an image or of other media.

    Args:
        model: a model of transformers.
        batch: how many sequences.
        length: of each.
        encoder: whether the encoder reads them, or the decoder.

    Raises:
        CaptureError: the config names no size of the vocabulary.
    """
    special = {v for n, v in vars(model.config).items() if re.search(r"token_(id|index)$", n) and isinstance(v, int)}
    words = torch.tensor([n for n in range(_vocabulary(model.config, encoder)) if n not in special])
    return words[torch.randint(0, len(words), (batch, length))].to(model.device)


def _vocabulary(config: Any, encoder: bool) -> int:
    """The number of tokens.

    Raises:
        CaptureError: the config does not say it.
    """
    if encoder and hasattr(config, "encoder"):
        text = config.encoder.get_text_config()
    else:
        text = config.get_text_config(encoder=encoder, decoder=not encoder)
    found = [size for name in SIZES[encoder] if isinstance(size := getattr(text, name, None), int)]
    if not found:
        raise CaptureError(f"{type(text).__name__} has none of {', '.join(SIZES[encoder])}, and tokens must be drawn.")
    return found[0]
