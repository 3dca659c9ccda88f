"""What each kernel can compute, as data: clauses in words, with a test each. The first that is broken says no."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch

from neuron_attn_rewrite.kernels.vendor.layouts import Mask
from neuron_attn_rewrite.kernels.vendor.nkilib import BLOCK, segment
from neuron_attn_rewrite.masks.spec import Band
from neuron_attn_rewrite.problem import AttentionProblem, EmptyRows
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.strategy.clauses import (
    DTYPES,
    GROUPS,
    NEVER_EMPTY,
    NO_BIAS,
    NO_PADDING,
    NO_SINK,
    NO_SOFTCAP,
    NONZERO_SCALE,
    ONE_HEAD_DIM,
    ROUNDED,
    SCALE,
    SDK_HEAD_DIM,
    SIZES,
    Bridge,
    Clause,
    Kernel,
    Setting,
    broken,
    is_padded,
    mask,
    shipped,
    takes,
    targets,
)

OURS = "flash_fwd"
"""Our own kernel."""
MAX_HEAD_DIM = 256
DECODE_ROWS = 7
"""Query rows for which attention_tkg is meant."""


def _widest(problem: AttentionProblem) -> int:
    """head_dim of the call of attention_cte: it takes one for keys and values, and padding adds a feature."""
    return max(problem.head_dim + is_padded(problem), problem.v_head_dim)


def _undocumented(what: str) -> Clause:
    """For a kernel of the SDK that nobody can be sure to call right."""
    return Clause("kernel-undocumented", f"undocumented: {what}", lambda *_: False)


_NARROW = (SIZES, GROUPS, ONE_HEAD_DIM, ROUNDED, SCALE, NO_SOFTCAP)
"""What every kernel of the SDK demands but attention_cte."""
_OLD = (targets("trn1", "inf2", "trn2"), shipped("2.26", "2.28"))
"""Where the kernels of neuronx-cc are, and NxD Inference's own."""
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
"""What the first `flash_fwd` and its gradients are tiled by."""
SCALED = Bridge("the scale goes into the query", lambda p, _: p.scale != 1.0, lambda p: 2 * p.query_bytes)
REPEATED = Bridge(
    "keys and values are repeated for each query head",
    lambda p, _: p.num_heads != p.num_kv_heads,
    lambda p: (p.key_bytes + p.value_bytes) * (1 + p.num_heads // p.num_kv_heads),
)


def _causal_band(problem: AttentionProblem) -> Band:
    """The band of a mask that the SDK's kernels call causal, with its window: of no other they skip anything."""
    return problem.mask.band if mask(problem).kind == "causal" else Band()


def _skipped_by_cte(problem: AttentionProblem) -> Band:
    """As causal; behind a prefix, whose keys are all looked at, the new keys are causal."""
    behind = Band(upper=problem.mask.band.upper)
    return behind if mask(problem).kind == "prior" else _causal_band(problem)


def _spilled(problem: AttentionProblem) -> int:
    """Of attention_segmented_cte: a copy of the query, and the running output, in float32 once for each segment."""
    seen = mask(problem)
    passes = 1 if seen.window else 2 * (1 + math.ceil(seen.offset / segment(seen)))
    return 2 * problem.query_bytes + 2 * passes * problem.result_bytes


def _padded_features(problem: AttentionProblem) -> int:
    """Bytes read and written to bring query, key, value and result to one head_dim."""
    widest = _widest(problem)
    by_dim = {problem.head_dim: 0, problem.v_head_dim: 0}
    by_dim[problem.head_dim] += problem.query_bytes + problem.key_bytes
    by_dim[problem.v_head_dim] += problem.value_bytes + problem.result_bytes
    return sum(size * (dim + widest) // dim for dim, size in by_dim.items() if dim != widest)


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        OURS: Kernel(
            (
                SIZES,
                GROUPS,
                Clause(
                    "head-dim",
                    f"head_dim {{p.head_dim}} must be at most {MAX_HEAD_DIM}",
                    lambda p, _: p.head_dim <= MAX_HEAD_DIM,
                ),
                Clause(
                    "head-dim",
                    f"v_head_dim {{p.v_head_dim}} must be at most {MAX_HEAD_DIM}",
                    lambda p, _: p.v_head_dim <= MAX_HEAD_DIM,
                ),
                Clause(
                    "dtype",
                    f"dtype {{p.dtype}} must be one of {', '.join(map(str, DTYPES))}",
                    lambda p, _: p.dtype in DTYPES,
                ),
                SCALE,
                Clause(
                    "softcap-sign",
                    "softcap {p.softcap} must be positive",
                    lambda p, _: p.softcap is None or p.softcap > 0,
                ),
                Clause(
                    "empty-rows",
                    "a query that sees no key must give zeros or the mean of all values, and here gives neither; "
                    'empty_rows="any" or padding="right" says that such rows do not matter',
                    lambda p, _: p.empty_rows is not EmptyRows.OTHER,
                ),
                Clause(
                    "kernel-target",
                    "band and row masks need an instruction that {s.target} lacks, and the mask is {p.mask}",
                    lambda p, s: s.target in ("trn2", "trn3") or mask(p).kind == "full",
                ),
            ),
            folds_groups=True,
            # Bounds are a tensor on the device, whose values are not known when the kernel is built.
            skips=lambda p: p.mask.band,
        ),
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
                    lambda p, _: mask(p).kind == "prior",
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
            skips=_skipped_by_cte,
            skips_strided=True,
            bias_bytes=4,
        ),
        "attention_tkg": Kernel(
            (
                targets("trn2", "trn3"),
                shipped("2.28", "2.32"),
                *_NARROW,
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
                    lambda *_: True,
                    lambda p: 2 * (p.key_bytes + p.value_bytes),
                ),
                Bridge("keys are padded to a multiple of 128 a core", lambda p, s: p.kv_len % (128 * s.cores) > 0),
            ),
            folds_groups=True,
        ),
        "attention_segmented_cte": Kernel(
            (
                targets("trn2", "trn3"),
                shipped("2.31", "2.32"),
                *_NARROW,
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
            skips=lambda p: p.mask.band,
            spills=_spilled,
        ),
        "attention_isa_kernel": Kernel(
            (
                *_OLD,
                *_NARROW,
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
            skips=_causal_band,
        ),
        "neuronxcc_flash_fwd": Kernel(
            (
                *_OLD,
                *_NARROW,
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
            skips=_causal_band,
            step=2048,
        ),
        "sliding_window_flash_fwd": Kernel(
            (
                *_OLD,
                *_NARROW,
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
            skips=_causal_band,
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
"""What each kernel demands, by the name in `kernels.vendor.ADAPTERS`; some are known, and have no adapter."""

_GRADIENTS = (
    *_NARROW,
    NO_BIAS,
    NO_PADDING,
    NEVER_EMPTY,
    Clause(
        "kernel-mask",
        "the mask must be none, or causal or a causal window with as many queries as keys, and is {p.mask}",
        lambda p, _: mask(p) == Mask("full") or (mask(p).kind == "causal" and p.q_len == p.kv_len),
    ),
)
BACKWARD: Mapping[str, Kernel] = MappingProxyType(
    {
        "attention_bwd": Kernel(
            (
                targets("trn2", "trn3"),
                shipped("2.29", "2.32"),
                *_GRADIENTS,
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
        "flash_attn_bwd": Kernel(
            (
                *_OLD,
                *_GRADIENTS,
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
"""The same for gradients, by the name in `kernels.vendor.BACKWARD`."""


def illegal(name: str, problem: AttentionProblem, setting: Setting) -> Reason | None:
    """Why this kernel can't compute this problem; None if it can."""
    reason = broken((KERNELS.get(name) or BACKWARD[name]).clauses, problem, setting)
    return reason and reason.behind(f"{name}: ")


def bridged(name: str, problem: AttentionProblem, setting: Setting) -> tuple[Reason, ...]:
    """What is done around a call so that the kernel can compute the problem."""
    return tuple(Reason("bridge", f"{name}: {b.words}") for b in KERNELS[name].bridges if b.needed(problem, setting))
