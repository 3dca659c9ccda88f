"""What masks claim, and the proof of it.

The claims themselves are public: a `MaskSpec` is what a report says of a mask, `Unproven` is why it says nothing.
"""

from neuron_attn_rewrite.masks.spec import Band, Chunked, Intervals, KeyPadding, Limited, MaskSpec, Unproven

__all__ = ["Band", "Chunked", "Intervals", "KeyPadding", "Limited", "MaskSpec", "Unproven"]
