"""NxD Inference 2.26 to 2.29: its own kernel for causal windows.

Source: modules/sliding_window/attention.py.
"""

from __future__ import annotations

from torch import Tensor

from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.kernels.vendor.adapter import Adapter, flash_config, own_grid
from neuron_attn_rewrite.kernels.vendor.layouts import mask_of, repeated


def _sliding_window(adapter: Adapter, query: Tensor, key: Tensor, value: Tensor, terms: Terms, lnc: int) -> Tensor:
    """As the first `flash_fwd`, but its left window does not count the token itself, and heads are repeated."""
    batch, heads, q_len, _ = query.shape
    window = mask_of(terms.band_lower, terms.band_upper, False, q_len, key.shape[2]).window
    assert window is not None
    key, value = repeated(key, heads), repeated(value, heads)
    out: Tensor = adapter.kernel[batch, heads](
        q=query.mT.contiguous(),
        k=key.mT.contiguous(),
        v=value.contiguous(),
        softmax_scale=terms.scale,
        use_causal_mask=True,
        window_size=(window - 1, -1),
        mixed_precision=True,
        config=flash_config(adapter, key.shape[2]),
    )
    return out


SLIDING_WINDOW = Adapter(
    name="sliding_window_flash_fwd",
    places=("neuronx_distributed_inference.modules.sliding_window.attention:flash_fwd",),
    needs=frozenset("q k v softmax_scale use_causal_mask window_size mixed_precision config".split()),
    launch=own_grid,
    run=_sliding_window,
)
