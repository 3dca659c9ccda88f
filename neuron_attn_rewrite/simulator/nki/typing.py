"""The simulator's `nki.typing`: type hints for the arguments of kernels."""

from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor as tensor

__all__ = ["tensor"]
