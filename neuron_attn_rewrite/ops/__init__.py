"""The operators `torch.ops.neuron_attn`."""
