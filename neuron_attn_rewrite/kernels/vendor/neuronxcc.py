"""neuronx-cc up to SDK 2.28: closed ISA kernels and the first open `flash_fwd`.

Sources: NxD Inference 2.26 and 2.28, modules/attention/attention_base.py and experimental/functional/attention;
nki-samples, reference/attention.py.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.kernels.orders import Accepted
from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.kernels.vendor.adapter import Adapter, How, flash_config, isa_jit, own_grid
from neuron_attn_rewrite.kernels.vendor.layouts import Mask, folded, mask_in, repeated, scaled

FULL, CAUSAL = "AttentionMMSoftmaxMMWithoutSwap", "CausalAttentionMMSoftmaxMMWithoutSwap"


def _attention_isa(adapter: Adapter, query: Tensor, key: Tensor, value: Tensor, terms: Terms, how: How) -> Tensor:
    """query, key and output as [batch * heads, dim, length], value as [batch * heads, length, dim], one head each."""
    batch, heads, dim, q_len = query.shape
    mask = mask_in(terms, q_len, key.shape[3])
    out = torch.zeros(batch * heads, dim, q_len, dtype=query.dtype, device=query.device)
    adapter(
        how.lnc,
        q=folded(scaled(query, terms.scale)).contiguous(),
        k=folded(repeated(key, heads)).contiguous(),
        v=folded(repeated(value, heads)).contiguous(),
        scale=1.0,
        out=out,
        kernel_name=CAUSAL if mask.kind == "causal" else FULL,
    )
    return out.reshape(batch, heads, dim, q_len)


def _flash_fwd(adapter: Adapter, query: Tensor, key: Tensor, value: Tensor, terms: Terms, how: How) -> Tensor:
    """query and key as [batch, heads, dim, length], value and output as [batch, heads, length, dim]."""
    q_len, kv_len = query.shape[3], key.shape[3]
    mask = mask_in(terms, q_len, kv_len)
    out: Tensor = adapter.kernel[query.shape[0], _heads(key, how.lnc)](
        q=query.contiguous(),
        k=key.contiguous(),
        v=value.contiguous(),
        seed=None,
        logit_bias=terms.bias,
        config=flash_config(adapter, kv_len, training=False),
        **_options(mask, terms.scale),
    )
    return out


def _options(mask: Mask, scale: float) -> dict[str, Any]:
    """The arguments that `flash_fwd` and its gradients share."""
    return {
        "use_causal_mask": mask.kind == "causal",
        "sliding_window": mask.window or -1,
        "softmax_scale": scale,
        "mixed_precision": True,
        "dropout_p": 0.0,
    }


def _flash_attn_bwd(
    adapter: Adapter, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, terms: Terms, lnc: int
) -> tuple[Tensor, ...]:
    """Everything as [batch, heads, dim, length]; output and log-sum-exp come from `flash_fwd` in its training form."""
    forward = adapter.forward
    assert forward is not None
    mask = mask_in(terms, query.shape[2], key.shape[2])
    # Both kernels get the same scaled and rounded query. Neither takes a scale of 0.
    query_t, key_t, value_t = (t.mT.contiguous() for t in (scaled(query, terms.scale), key, value))
    grid = query.shape[0], _heads(key, lnc)
    shared = _options(mask, 1.0)
    config = flash_config(forward, key.shape[2], training=True)
    out, lse = forward.kernel[grid](q=query_t, k=key_t, v=value.contiguous(), seed=None, config=config, **shared)
    by_query, by_key, by_value = adapter.kernel[grid](
        q_ref=query_t,
        k_ref=key_t,
        v_ref=value_t,
        o_ref=out.mT.contiguous(),
        dy_ref=grad.mT.contiguous(),
        lse_ref=lse,
        seed_ref=None,
        **shared,
    )
    none = query.new_empty(0)
    return scaled(by_query.mT, terms.scale), by_key.mT, by_value.mT, none, none


def _heads(key: Tensor, lnc: int) -> Any:
    """The second axis of the grid: the kv heads, in pairs for two physical cores."""
    heads = key.shape[1]
    return import_module("neuronxcc.nki.language").nc(lnc) * (heads // lnc) if lnc > 1 else heads


ATTENTION_ISA = Adapter(
    name="attention_isa_kernel",
    places=(
        "neuronxcc.nki._private_kernels.attention:attention_isa_kernel",
        "neuronxcc.nki.kernels.attention:attention_isa_kernel",
    ),
    needs="q k v scale out kernel_name",
    launch=isa_jit,
    run=_attention_isa,
    accepts=Accepted(("BHDS",), ("BHDS",), ("BHSD",), ("BHDS",)),
)
FLASH_FWD = Adapter(
    name="neuronxcc_flash_fwd",
    places=("neuronxcc.nki.kernels.attention:flash_fwd", "neuronxcc.nki.kernels:flash_fwd"),
    needs="q k v seed logit_bias softmax_scale use_causal_mask sliding_window mixed_precision",
    launch=own_grid,
    run=_flash_fwd,
    accepts=Accepted(("BHDS",), ("BHDS",)),
)
FLASH_ATTN_BWD = Adapter(
    name="flash_attn_bwd",
    places=("neuronxcc.nki.kernels.attention:flash_attn_bwd", "neuronxcc.nki.kernels:flash_attn_bwd"),
    needs=(
        "q_ref k_ref v_ref o_ref dy_ref lse_ref seed_ref use_causal_mask mixed_precision dropout_p softmax_scale "
        "sliding_window"
    ),
    launch=own_grid,
    run=_flash_attn_bwd,
    forward=FLASH_FWD,
)
