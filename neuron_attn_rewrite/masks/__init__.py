"""What masks say, and the proof of it."""

from neuron_attn_rewrite.masks.spec import (
    Band,
    Chunked,
    Intervals,
    KeyPadding,
    Limited,
    MaskSpec,
    Unproven,
)

__all__ = ["Band", "Chunked", "Intervals", "KeyPadding", "Limited", "MaskSpec", "Unproven"]
