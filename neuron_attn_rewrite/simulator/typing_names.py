"""The simulator's `nki.typing`: what kernels annotate their arguments with."""

from neuron_attn_rewrite.simulator.tensor import NkiTensor as tensor

__all__ = ["tensor"]
