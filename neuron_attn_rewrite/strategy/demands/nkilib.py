"""What nkilib's kernels demand, SDK 2.27 and later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch

from neuron_attn_rewrite.kernels.vendor.nkilib import BLOCK, segment
from neuron_attn_rewrite.masks.spec import Band
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy.clauses import (
    GRADIENTS,
    GROUPS,
    NARROW,
    NEVER_EMPTY,
    NO_BIAS,
    NO_PADDING,
    NO_SOFTCAP,
    ROUNDED,
    SCALE,
    SCALED,
    SDK_HEAD_DIM,
    SIZES,
    Bridge,
    Clause,
    Kernel,
    behind_cache,
    causal_band,
    is_limited,
    is_padded,
    mask,
    shipped,
    takes,
    targets,
)

DECODE_ROWS = 7
"""The most query rows that attention_tkg takes."""


def _widest(problem: AttentionProblem) -> int:
    """The head_dim of a call of attention_cte: one for keys and values. Key padding adds a feature to the keys."""
    return max(problem.head_dim + is_padded(problem), problem.v_head_dim)


def _band_of_cte(problem: AttentionProblem) -> Band:
    """As `causal_band`. Behind a prefix the new keys are causal, and every key of the prefix is computed."""
    if problem.prior is not None:
        return behind_cache(problem)
    behind = Band(upper=problem.mask.band.upper)
    return behind if mask(problem).kind == "prior" else causal_band(problem)


def _padded_features(problem: AttentionProblem) -> int:
    """Bytes read and written to pad query, key, value and result to one head_dim."""
    widest = _widest(problem)
    by_dim = {problem.head_dim: 0, problem.v_head_dim: 0}
    by_dim[problem.head_dim] += problem.query_bytes + problem.key_bytes
    by_dim[problem.v_head_dim] += problem.value_bytes + problem.result_bytes
    return sum(size * (dim + widest) // dim for dim, size in by_dim.items() if dim != widest)


def _spilled(problem: AttentionProblem) -> int:
    """Bytes of HBM that attention_segmented_cte writes and reads: the query once, the running output once a segment."""
    seen = mask(problem)
    passes = 1 if seen.window else 2 * (1 + math.ceil(seen.offset / segment(seen)))
    return 2 * problem.query_bytes + 2 * passes * problem.result_bytes


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "attention_cte": Kernel(
            (
                targets("trn2", "trn3"),
                shipped("2.27", "2.32"),
                SIZES,
                GROUPS,
                Clause(
                    "kernel-size",
                    "batch {p.batch} times num_heads {p.num_heads} must be at most 512, before SDK 2.29 at most 32",
                    lambda p, s: p.batch * p.num_heads <= (512 if takes("attention_cte", "bound_min", s) else 32),
                ),
                Clause(
                    "kernel-size",
                    "q_len {p.q_len} and kv_len {p.kv_len} must be at most 131072, before SDK 2.29 at most 36864",
                    lambda p, s: (
                        max(p.q_len, p.kv_len) <= (131072 if takes("attention_cte", "bound_min", s) else 36864)
                    ),
                ),
                Clause(
                    "head-dim",
                    "head_dim {p.head_dim} (key padding adds 1) and v_head_dim {p.v_head_dim} must be at most 128",
                    lambda p, _: _widest(p) <= SDK_HEAD_DIM,
                ),
                ROUNDED,
                Clause(
                    "dtype",
                    "key padding needs the range of bfloat16, and here is {p.dtype}",
                    lambda p, _: not is_padded(p) or p.dtype != torch.float16,
                ),
                SCALE,
                NO_SOFTCAP,
                NEVER_EMPTY,
                Clause(
                    "kernel-mask",
                    "before SDK 2.29 it has no bounds, and the mask is {p.mask}",
                    lambda p, s: mask(p).kind != "rows" or takes("attention_cte", "bound_min", s),
                ),
                Clause(
                    "kernel-mask",
                    "before SDK 2.31 it has no bounds for each of the batch {p.batch}, and the mask is {p.mask}",
                    lambda p, s: (
                        p.batch == 1
                        or p.prior is not None
                        or not is_limited(p)
                        or takes("attention_cte", "position_bias", s)
                    ),
                ),
                Clause(
                    "kernel-mask",
                    "of a cache it takes one length for the whole batch, without padding, and the mask is {p.mask}",
                    lambda p, _: p.prior is None or (p.prior.is_shared and not p.prior.is_masked),
                ),
                Clause(
                    "kernel-bias",
                    "before SDK 2.31 it takes no bias, and here is one of {p.bias_shape}",
                    lambda p, s: p.bias_shape is None or takes("attention_cte", "position_bias", s),
                ),
                Clause(
                    "kernel-bias",
                    "it takes no bias behind a prefix, and the mask is {p.mask}",
                    lambda p, _: p.bias_shape is None or mask(p).kind != "prior",
                ),
            ),
            (
                SCALED,
                Bridge(
                    "key padding becomes one more feature of query and key",
                    lambda p, _: is_padded(p),
                    lambda p: 2 * (p.query_bytes + p.key_bytes),
                ),
                Bridge(
                    "head_dim and v_head_dim are padded to the larger",
                    lambda p, _: p.head_dim != p.v_head_dim,
                    _padded_features,
                ),
                Bridge(
                    "the first keys become a prefix",
                    lambda p, _: p.prior is None and mask(p).kind == "prior",
                    lambda p: 2 * (p.key_bytes + p.value_bytes),
                ),
                Bridge("the mask becomes one interval of keys a row", lambda p, _: mask(p).kind == "rows"),
                Bridge(
                    "query rows are padded to a multiple of 128",
                    lambda p, _: p.q_len % 128 > 0 and (mask(p).kind == "rows" or p.bias_shape is not None),
                    lambda p: 2 * p.query_bytes,
                ),
                Bridge(
                    "the bias is written out in float32 for each head",
                    lambda p, _: p.bias_shape is not None,
                    lambda p: math.prod(p.bias_shape or ()) * p.dtype.itemsize + 4 * p.scores,
                ),
            ),
            computed_band=_band_of_cte,
            skips_for_strided_rows=True,
            bias_bytes=4,
            sources=(1, 2),
        ),
        "attention_tkg": Kernel(
            (
                targets("trn2", "trn3"),
                shipped("2.28", "2.32"),
                *NARROW,
                NO_BIAS,
                NEVER_EMPTY,
                Clause(
                    "kernel-size",
                    f"q_len {{p.q_len}} must be at most {DECODE_ROWS} and less than kv_len {{p.kv_len}}",
                    lambda p, _: p.q_len <= DECODE_ROWS and p.q_len < p.kv_len,
                ),
                Clause(
                    "kernel-size",
                    "batch times num_heads times q_len times the keys of a tile, up to 8192, must fit 16 MiB of SBUF",
                    lambda p, _: 8 * p.batch * p.num_heads * p.q_len * min(p.kv_len, 8192) <= 2**24,
                ),
                Clause(
                    "kernel-sink",
                    "it takes sinks of one kv head, and here are {p.num_kv_heads}",
                    lambda p, _: not p.sink or p.num_kv_heads == 1,
                ),
            ),
            (
                SCALED,
                Bridge("the mask is written out as 0 and 1", lambda *_: True, lambda p: 2 * p.scores),
                Bridge(
                    "earlier and new keys are copied apart",
                    lambda p, _: p.prior is None,
                    lambda p: 2 * (p.key_bytes + p.value_bytes),
                ),
                Bridge(
                    "the cache is copied, with room for the new keys",
                    lambda p, _: p.prior is not None,
                    lambda p: 2 * (p.key_bytes + p.value_bytes),
                ),
                Bridge("keys are padded to a multiple of 128 a core", lambda p, s: p.kv_len % (128 * s.cores) > 0),
            ),
            folds_groups=True,
            sources=(1, 2),
        ),
        "attention_segmented_cte": Kernel(
            (
                targets("trn2", "trn3"),
                shipped("2.31", "2.32"),
                *NARROW,
                Clause(
                    "head-dim",
                    "head_dim {p.head_dim} must be 128: its source warns of wrong transposes for others on hardware",
                    lambda p, _: p.head_dim == SDK_HEAD_DIM,
                ),
                Clause(
                    "dtype",
                    "its buffers are of bfloat16, and here is {p.dtype}",
                    lambda p, _: p.dtype == torch.bfloat16,
                ),
                NO_BIAS,
                NO_PADDING,
                Clause(
                    "kernel-mask",
                    "the mask must be causal, or a causal window, with a key for each query, and is {p.mask}",
                    lambda p, _: mask(p).kind in ("causal", "prior") and p.q_len <= p.kv_len,
                ),
                Clause(
                    "kernel-size",
                    "q_len {p.q_len}, the keys before the first query's own and the window must be multiples of 128, "
                    "and the mask is {p.mask}",
                    lambda p, _: not (p.q_len % BLOCK or mask(p).offset % BLOCK or (mask(p).window or 0) % BLOCK),
                ),
                Clause(
                    "kernel-size",
                    "q_len {p.q_len} and the window together must be at most 8192, and all keys 131072, and the mask "
                    "is {p.mask}",
                    lambda p, _: p.q_len + (mask(p).window or 0) <= 8192 and mask(p).offset + p.q_len <= 131072,
                ),
                Clause(
                    "kernel-size",
                    "batch {p.batch} times num_heads {p.num_heads} must be at most 128: its tables and sinks lie on "
                    "that many partitions",
                    lambda p, _: p.batch * p.num_heads <= 128,
                ),
            ),
            (SCALED, Bridge("keys and values are read as the blocks of a cache, as they lie", lambda *_: True)),
            computed_band=lambda p: p.mask.band,
            spills=_spilled,
        ),
    }
)
"""By the name in `kernels.vendor.ADAPTERS`."""

BACKWARD: Mapping[str, Kernel] = MappingProxyType(
    {
        "attention_bwd": Kernel(
            (
                targets("trn2", "trn3"),
                shipped("2.29", "2.32"),
                *GRADIENTS,
                Clause(
                    "kernel-size",
                    "q_len {p.q_len} must be a multiple of 128; kv_len {p.kv_len} of 512, below 512 of 128",
                    lambda p, _: p.q_len % 128 == 0 and p.kv_len % (512 if p.kv_len > 512 else 128) == 0,
                ),
                Clause(
                    "kernel-size",
                    "batch {p.batch} times num_heads {p.num_heads} must be at most 512",
                    lambda p, _: p.batch * p.num_heads <= 512,
                ),
            ),
            (
                SCALED,
                Bridge("output and log-sum-exp are computed once more by attention_cte", lambda *_: True),
            ),
        ),
    }
)
"""By the name in `kernels.vendor.BACKWARD`."""
