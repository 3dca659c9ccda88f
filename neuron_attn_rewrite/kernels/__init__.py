"""The ops that replace attention; importing `neuron_attn_rewrite.kernels.ops` registers them."""
