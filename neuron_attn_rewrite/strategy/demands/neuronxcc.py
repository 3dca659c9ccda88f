"""What the kernels of neuronx-cc and of NxD Inference demand, up to SDK 2.28."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from neuron_attn_rewrite.kernels.vendor.layouts import Mask
from neuron_attn_rewrite.strategy.clauses import (
    GRADIENTS,
    NARROW,
    NEVER_EMPTY,
    NO_BIAS,
    NO_PADDING,
    NO_SINK,
    NONZERO_SCALE,
    SCALED,
    Bridge,
    Clause,
    Kernel,
    causal_band,
    mask,
    shipped,
    targets,
)

_OLD = (targets("trn1", "inf2", "trn2"), shipped("2.26", "2.28"))
"""The hardware and releases of the kernels of neuronx-cc and of NxD Inference."""
_TILES = (
    Clause(
        "kernel-size",
        "kv_len {p.kv_len} must be a multiple of 512, q_len {p.q_len} of 128",
        lambda p, _: p.kv_len % 512 == 0 and p.q_len % 128 == 0,
    ),
    Clause(
        "kernel-size",
        "num_kv_heads {p.num_kv_heads} must be even on two cores",
        lambda p, s: p.num_kv_heads % s.cores == 0,
    ),
)
"""The tile sizes of the first `flash_fwd` and its gradients."""
REPEATED = Bridge(
    "keys and values are repeated for each query head",
    lambda p, _: p.num_heads != p.num_kv_heads,
    lambda p: (p.key_bytes + p.value_bytes) * (1 + p.num_heads // p.num_kv_heads),
)


def _undocumented(what: str) -> Clause:
    """A clause that is never met: the public documentation does not say how to call the kernel."""
    return Clause("kernel-undocumented", f"undocumented: {what}", lambda *_: False)


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "attention_isa_kernel": Kernel(
            (
                *_OLD,
                *NARROW,
                NO_BIAS,
                NO_SINK,
                NO_PADDING,
                NEVER_EMPTY,
                Clause(
                    "kernel-size",
                    "q_len {p.q_len} and kv_len {p.kv_len} must be at least 512",
                    lambda p, _: min(p.q_len, p.kv_len) >= 512,
                ),
                Clause("kernel-size", "num_heads {p.num_heads} must be at most 128", lambda p, _: p.num_heads <= 128),
                Clause(
                    "kernel-size",
                    "batch {p.batch} times num_heads {p.num_heads} must be even on two cores",
                    lambda p, s: p.batch * p.num_heads % s.cores == 0,
                ),
                Clause(
                    "kernel-mask",
                    "the mask must be none or causal with as many queries as keys, and is {p.mask}",
                    lambda p, _: mask(p) == Mask("full") or (mask(p) == Mask("causal") and p.q_len == p.kv_len),
                ),
            ),
            (
                SCALED,
                REPEATED,
            ),
            computed_band=causal_band,
        ),
        "neuronxcc_flash_fwd": Kernel(
            (
                *_OLD,
                *NARROW,
                NONZERO_SCALE,
                NO_SINK,
                NO_PADDING,
                NEVER_EMPTY,
                *_TILES,
                Clause(
                    "kernel-mask",
                    "the mask must be none, causal or a causal window from the first key on, and is {p.mask}",
                    lambda p, _: mask(p).kind in ("full", "causal"),
                ),
                Clause(
                    "kernel-bias",
                    "a bias must be [1, 1, q_len, kv_len] and not meet a window, and here is {p.bias_shape}",
                    lambda p, _: (
                        p.bias_shape is None or (p.bias_shape == (1, 1, p.q_len, p.kv_len) and mask(p).window is None)
                    ),
                ),
            ),
            computed_band=causal_band,
            step=2048,
        ),
        "sliding_window_flash_fwd": Kernel(
            (
                *_OLD,
                *NARROW,
                NONZERO_SCALE,
                NO_BIAS,
                NO_SINK,
                NO_PADDING,
                NEVER_EMPTY,
                Clause(
                    "kernel-size",
                    "q_len {p.q_len} and kv_len {p.kv_len} must be the same multiple of 512",
                    lambda p, _: p.q_len == p.kv_len and p.kv_len % 512 == 0,
                ),
                Clause(
                    "kernel-mask",
                    "the mask must be a causal window of at least 2 keys, and is {p.mask}",
                    lambda p, _: mask(p).kind == "causal" and (mask(p).window or 0) >= 2,
                ),
            ),
            (REPEATED,),
            computed_band=causal_band,
            step=2048,
        ),
        "prefix_caching_attention_fwd_isa_kernel": Kernel(
            (
                _undocumented(
                    "how many new and cached keys it takes, and whether its mask [batch, prior], int32 in NxD "
                    "Inference, may hide other cached keys than the last: it is closed, and its one caller says no more"
                ),
            )
        ),
        "attention_tkg_fwd_isa_kernel": Kernel(
            (
                _undocumented(
                    "which lengths it takes, which cached keys its pos_id admits, and how it scales: it is closed, and "
                    "its one caller, NxD Inference, gives the query unscaled and lets the kernel rotate it (fuse_rope)"
                ),
            )
        ),
    }
)
"""By the name in `kernels.vendor.ADAPTERS`; some are known, and have no adapter."""

BACKWARD: Mapping[str, Kernel] = MappingProxyType(
    {
        "flash_attn_bwd": Kernel(
            (
                *_OLD,
                *GRADIENTS,
                NO_SINK,
                *_TILES,
            ),
            (
                SCALED,
                Bridge("output and log-sum-exp are computed once more by flash_fwd", lambda *_: True),
            ),
        ),
    }
)
"""By the name in `kernels.vendor.BACKWARD`."""
