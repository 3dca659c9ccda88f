"""Inputs for a model of transformers, by the conventions of its main input."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from neuron_attn_rewrite.cli.shrink import VOCABULARY
from neuron_attn_rewrite.errors import InputError

OWN = "write a function that returns (model, inputs), and pass it as file.py:function."
"""What to do where the inputs by convention do not work."""


def inputs(model: Any, batch: int, seq_len: int, mask: bool) -> dict[str, Any]:
    """Keyword inputs for a model of transformers: token ids, pixels, sound features or samples.

    Args:
        model: a model, or a part of one with a `main_input_name`.
        batch: number of sequences, images or sounds.
        seq_len: tokens of each text.
        mask: whether an attention_mask of ones, int64 [batch, seq_len], goes with the token ids.

    Raises:
        InputError: the main input of the model is of another kind.
    """
    config = model.config
    if type(model).forward is torch.nn.Module.forward:
        raise InputError(
            f"{type(model).__name__} computes nothing itself: take one of its parts with --part. They are "
            f"{parts(model)}."
        )
    takes = inspect.signature(model.forward).parameters
    required = [n for n, p in takes.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    words = getattr(text, "vocab_size", None) or VOCABULARY
    ids = torch.randint(3, max(4, words - 8), (batch, seq_len))
    ones = torch.ones(batch, seq_len, dtype=torch.int64)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    main = model.main_input_name
    given: dict[str, Any] = {}
    if {
        "hidden_states",
        "grid_thw",
    } <= takes.keys():  # a vision tower that takes 16 by 16 patches of each image
        patch = config.patch_size**2 * getattr(config, "temporal_patch_size", 1) * getattr(config, "in_channels", 3)
        return {
            "hidden_states": torch.randn(batch * 256, patch, dtype=dtype),
            "grid_thw": torch.tensor([[1, 16, 16]] * batch),
        }
    if "input_ids" in {main, *required}:
        given["input_ids"] = ids
        if mask and "attention_mask" in takes:
            given["attention_mask"] = ones
    two_towers = hasattr(config, "vision_config") and hasattr(config, "text_config")
    in_text = any(getattr(config, f"image_token_{name}", None) is not None for name in ("id", "index"))
    if "pixel_values" in {main, *required} or (two_towers and not in_text):  # the others also run on text alone
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        given["pixel_values"] = torch.randn(batch, getattr(vision, "num_channels", 3), height, width, dtype=dtype)
    if main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        given["input_features"] = torch.randn(batch, getattr(config, "num_mel_bins", 80), frames, dtype=dtype)
    if main == "input_values":
        is_codec = hasattr(config, "codebook_size")
        channels = (getattr(config, "audio_channels", 1),) if is_codec else ()
        given["input_values"] = torch.randn(batch, *channels, 16000, dtype=dtype)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes and given:
        books = getattr(getattr(config, "decoder", None), "num_codebooks", 1)  # of a sound, one row each
        given["decoder_input_ids"] = ids.flip(1).repeat(books, 1)
    pieces, piece = getattr(config, "num_query_tokens", None), getattr(config, "image_token_index", None)
    if pieces and piece is not None and {"input_ids", "pixel_values"} <= given.keys():
        given["input_ids"][:, :pieces] = piece
    if not given or not given.keys() >= set(required):
        what = f"needs {', '.join(required)}" if required else f"has the main input {main!r}"
        raise InputError(f"no inputs are known for {type(model).__name__}, which {what}: {OWN}")
    return given


def parts(model: Any) -> str:
    """The names of the parts of a model that have inputs of their own."""
    return (
        ", ".join(path for path, part in model.named_modules() if path and hasattr(part, "main_input_name")) or "none"
    )
