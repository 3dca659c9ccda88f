"""The operators `torch.ops.neuron_attn`: their arguments, and what each runs as on each device.

Importing this package registers them.
"""

import neuron_attn_rewrite.ops.definitions  # noqa: F401
