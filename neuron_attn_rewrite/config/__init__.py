"""What the caller can ask for: the configuration, the strategies and the rows of rule tables."""

from neuron_attn_rewrite.config.options import TOLERANCES, RewriteConfig
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy

__all__ = ["TOLERANCES", "FlashAttentionStrategy", "RewriteConfig"]
