"""What each kernel can compute, as data: clauses in words, with a test each. The first that is broken says no."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from neuron_attn_rewrite.kernels.vendor.layouts import Mask, mask_of
from neuron_attn_rewrite.masks.spec import KeyPadding
from neuron_attn_rewrite.problem import AttentionProblem, EmptyRows
from neuron_attn_rewrite.reasons import Reason

OURS = "flash_fwd"
"""Our own kernel."""
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DECODE_ROWS = 7
"""Query rows for which attention_tkg is meant."""
SDK_HEAD_DIM = 128
"""Largest head_dim of every kernel of the SDK, by its documentation."""


@dataclass(frozen=True)
class Setting:
    """Where a kernel is to run, and which build of it."""

    target: str = "trn2"
    cores: int = 2
    """Physical cores in a logical NeuronCore."""
    sdk: str = "2.29"
    parameters: frozenset[str] | None = None
    """What the installed kernel takes; None where none is installed, and the release decides."""
    loose: frozenset[torch.dtype] = frozenset({torch.bfloat16})
    """Dtypes in which the caller accepts products rounded to bfloat16."""


@dataclass(frozen=True)
class Clause:
    """One thing that a kernel or a strategy demands."""

    code: str
    """The code of the reason that a broken demand is."""
    demand: str
    """In words, with the fields of the problem as {p.name} and of the setting as {s.name}."""
    holds: Callable[[AttentionProblem, Setting], bool]


@dataclass(frozen=True)
class Bridge:
    """A step that brings a problem into a kernel's reach, exactly."""

    words: str
    needed: Callable[[AttentionProblem, Setting], bool]


@dataclass(frozen=True)
class Kernel:
    """What is known of a kernel before it runs."""

    clauses: tuple[Clause, ...]
    bridges: tuple[Bridge, ...] = ()
    folds_groups: bool = False
    """The query heads of a group are the rows of one tile."""
    skips_rows: bool = False
    """Tiles that bounds hide are skipped, not only those that causal and window hide."""


def broken(clauses: Iterable[Clause], problem: AttentionProblem, setting: Setting) -> Reason | None:
    """The first demand that the problem breaks, in words; None without one."""
    found = next((c for c in clauses if not c.holds(problem, setting)), None)
    return Reason(found.code, found.demand.format(p=problem, s=setting)) if found else None


def bridged(name: str, problem: AttentionProblem, setting: Setting) -> tuple[Reason, ...]:
    """What is done around a call so that the kernel can compute the problem."""
    return tuple(Reason("bridge", f"{name}: {b.words}") for b in KERNELS[name].bridges if b.needed(problem, setting))


def mask(problem: AttentionProblem) -> Mask:
    """The mask as the SDK's kernels name it, key padding aside."""
    band = problem.mask.band
    return mask_of(band.lower, band.upper, bool(problem.mask.runs.claims), problem.q_len, problem.kv_len)


def is_padded(problem: AttentionProblem) -> bool:
    """Whether some keys are hidden by a run-time vector."""
    return any(isinstance(claim, KeyPadding) for claim in problem.mask.claims)


SINCE: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"attention_cte": MappingProxyType({"bound_min": "2.29", "position_bias": "2.31"})}
)
"""The release in which a parameter of a kernel came, used where none is installed."""


def takes(name: str, parameter: str, setting: Setting) -> bool:
    """Whether the kernel has this parameter: by its signature, or by its release."""
    if setting.parameters is not None:
        return parameter in setting.parameters
    return setting.sdk >= SINCE[name][parameter]


def _widest(problem: AttentionProblem) -> int:
    """head_dim of the call of attention_cte: it takes one for keys and values, and padding adds a feature."""
    return max(problem.head_dim + is_padded(problem), problem.v_head_dim)


SIZES = Clause(
    "size-zero",
    "no size may be 0",
    lambda p, _: 0 not in (p.batch, p.num_kv_heads, p.q_len, p.kv_len, p.head_dim, p.v_head_dim),
)
GROUPS = Clause(
    "head-groups",
    "num_heads {p.num_heads} must be a multiple of num_kv_heads {p.num_kv_heads}",
    lambda p, _: p.num_heads % p.num_kv_heads == 0,
)
SCALE = Clause("scale-not-finite", "scale {p.scale} must be finite", lambda p, _: math.isfinite(p.scale))
NONZERO_SCALE = Clause(
    "scale-not-finite", "scale {p.scale} must not be 0: the kernel takes its own", lambda p, _: p.scale != 0
)
NO_SOFTCAP = Clause("kernel-softcap", "it has no softcap, and here is {p.softcap}", lambda p, _: p.softcap is None)
NO_BIAS = Clause(
    "kernel-bias", "it takes no bias, and here is one of {p.bias_shape}", lambda p, _: p.bias_shape is None
)
NO_SINK = Clause("kernel-sink", "it takes no sink", lambda p, _: not p.sink)
NO_PADDING = Clause("kernel-mask", "it takes no key padding, and the mask is {p.mask}", lambda p, _: not is_padded(p))
NEVER_EMPTY = Clause(
    "empty-rows",
    "it leaves rows that see no key undefined, and here they are {p.empty_rows.value}; "
    'empty_rows="any" or padding="right" says that such rows do not matter',
    lambda p, _: p.empty_rows in (EmptyRows.NEVER, EmptyRows.ANY),
)
ROUNDED = Clause(
    "dtype",
    "it computes products in bfloat16, and here is {p.dtype}; tolerances={{{p.dtype}: 0.016}} would accept that",
    lambda p, s: p.dtype in s.loose and p.dtype in DTYPES,
)
ONE_HEAD_DIM = Clause(
    "head-dim",
    "v_head_dim {p.v_head_dim} must be head_dim {p.head_dim}, and at most 128",
    lambda p, _: p.v_head_dim == p.head_dim <= SDK_HEAD_DIM,
)


def _targets(*names: str) -> Clause:
    return Clause(
        "kernel-target", f"it runs on {', '.join(names)}, not on {{s.target}}", lambda _, s: s.target in names
    )


def _shipped(name: str, since: str, until: str) -> Clause:
    return Clause(
        "kernel-sdk",
        f"it comes with SDK {since} to {until}, not with {{s.sdk}}",
        lambda _, s: s.parameters is not None or since <= s.sdk <= until,
    )


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
            skips_rows=True,
        ),
        "attention_cte": Kernel(
            (
                _targets("trn2", "trn3"),
                _shipped("attention_cte", "2.27", "2.32"),
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
                Bridge("the scale goes into the query", lambda p, _: p.scale != 1.0),
                Bridge("key padding becomes one more feature of query and key", lambda p, _: is_padded(p)),
                Bridge("head_dim and v_head_dim are padded to the larger", lambda p, _: p.head_dim != p.v_head_dim),
                Bridge("the first keys become a prefix", lambda p, _: mask(p).kind == "prior"),
                Bridge("the mask becomes one interval of keys a row", lambda p, _: mask(p).kind == "rows"),
                Bridge(
                    "query rows are padded to a multiple of 128",
                    lambda p, _: p.q_len % 128 > 0 and (mask(p).kind == "rows" or p.bias_shape is not None),
                ),
                Bridge(
                    "the bias is written out for each head",
                    lambda p, _: p.bias_shape is not None and p.bias_shape != (p.batch, p.num_heads, p.q_len, p.kv_len),
                ),
            ),
        ),
        "attention_tkg": Kernel(
            (
                _targets("trn2", "trn3"),
                _shipped("attention_tkg", "2.28", "2.32"),
                SIZES,
                GROUPS,
                ONE_HEAD_DIM,
                ROUNDED,
                SCALE,
                NO_SOFTCAP,
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
                Bridge("the scale goes into the query", lambda p, _: p.scale != 1.0),
                Bridge("the mask is written out as 0 and 1", lambda *_: True),
                Bridge("keys are padded to a multiple of 128 a core", lambda p, s: p.kv_len % (128 * s.cores) > 0),
            ),
            folds_groups=True,
        ),
        "attention_isa_kernel": Kernel(
            (
                _targets("trn1", "inf2", "trn2"),
                _shipped("attention_isa_kernel", "2.26", "2.28"),
                SIZES,
                GROUPS,
                ONE_HEAD_DIM,
                ROUNDED,
                SCALE,
                NO_SOFTCAP,
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
                Bridge("the scale goes into the query", lambda p, _: p.scale != 1.0),
                Bridge("keys and values are repeated for each query head", lambda p, _: p.num_heads != p.num_kv_heads),
            ),
        ),
        "neuronxcc_flash_fwd": Kernel(
            (
                _targets("trn1", "inf2", "trn2"),
                _shipped("neuronxcc_flash_fwd", "2.26", "2.28"),
                SIZES,
                GROUPS,
                ONE_HEAD_DIM,
                ROUNDED,
                SCALE,
                NONZERO_SCALE,
                NO_SOFTCAP,
                NO_SINK,
                NO_PADDING,
                NEVER_EMPTY,
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
        ),
        "sliding_window_flash_fwd": Kernel(
            (
                _targets("trn1", "inf2", "trn2"),
                _shipped("sliding_window_flash_fwd", "2.26", "2.28"),
                SIZES,
                GROUPS,
                ONE_HEAD_DIM,
                ROUNDED,
                SCALE,
                NONZERO_SCALE,
                NO_SOFTCAP,
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
            (Bridge("keys and values are repeated for each query head", lambda p, _: p.num_heads != p.num_kv_heads),),
        ),
    }
)
"""What each kernel demands, by the name in `kernels.vendor.ADAPTERS`."""


def illegal(name: str, problem: AttentionProblem, setting: Setting) -> Reason | None:
    """Why this kernel can't compute this problem; None if it can."""
    reason = broken(KERNELS[name].clauses, problem, setting)
    return reason and reason.behind(f"{name}: ")
