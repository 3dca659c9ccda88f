"""The ops that replace attention; importing `neuron_attn_rewrite.ops.definitions` registers them."""
