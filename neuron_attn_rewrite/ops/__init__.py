"""The operators `torch.ops.neuron_attn`. Importing this package registers them."""

import neuron_attn_rewrite.ops.definitions  # noqa: F401
