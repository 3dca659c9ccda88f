"""What describes a kernel: clauses (what it demands), bridges (what is done around a call), and what it skips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from neuron_attn_rewrite.kernels.vendor.layouts import Mask, mask_of
from neuron_attn_rewrite.masks.spec import Band, EmptyRows, KeyPadding, Limited
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.reasons import Reason

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SDK_HEAD_DIM = 128
"""Largest head_dim of every kernel of the SDK, by its documentation."""


@dataclass(frozen=True)
class Setting:
    """Where a kernel runs, and which build of it."""

    target: str = "trn2"
    cores: int = 2
    """Physical cores in a logical NeuronCore."""
    sdk: str = "2.29"
    parameters: frozenset[str] | None = None
    """The parameters of the installed kernel. None if it is not installed: then the release decides."""
    loose: frozenset[torch.dtype] = frozenset({torch.bfloat16})
    """Dtypes for which the caller's tolerances accept products in bfloat16."""


@dataclass(frozen=True)
class Clause:
    """One thing that a kernel or a strategy demands."""

    code: str
    """The code of the reason, if the demand is not met. See `reasons.REASONS`."""
    demand: str
    """A sentence, with the fields of the problem as {p.name} and those of the setting as {s.name}."""
    holds: Callable[[AttentionProblem, Setting], bool]


@dataclass(frozen=True)
class Bridge:
    """An exact step around a kernel call, without which the kernel could not compute the problem."""

    words: str
    needed: Callable[[AttentionProblem, Setting], bool]
    moves: Callable[[AttentionProblem], int] = lambda _: 0
    """Bytes of HBM that it reads and writes."""


@dataclass(frozen=True)
class Kernel:
    """What a kernel can compute, and what it costs beyond its scores."""

    clauses: tuple[Clause, ...]
    bridges: tuple[Bridge, ...] = ()
    folds_groups: bool = False
    """Whether the query heads of a group share one tile of 128 rows, if they fit."""
    computed_band: Callable[[AttentionProblem], Band] = lambda _: Band()
    """The part of the mask by which it skips keys: a tile of keys outside of this band for all of its rows is not
    computed. An open band means that it computes every key."""
    skips_for_strided_rows: bool = False
    """Whether it also skips keys by the strided rows of a rank: those that these rows see on no rank."""
    step: int = 512
    """It skips keys in multiples of this number."""
    spills: Callable[[AttentionProblem], int] = lambda _: 0
    """Bytes that it writes to HBM and reads again, which other kernels keep on the core."""
    in_blocks: tuple[Clause, ...] | None = None
    """What it demands besides if key and value lie in the blocks of a cache. None if it reads no such cache."""
    bias_bytes: int | None = None
    """Bytes of one element of a bias as it is read. None for the operands' dtype."""
    sources: tuple[int, ...] = (1,)
    """From how many tensors it reads keys: 1 for all in one, 2 for a cache apart from the new ones."""


def first_refusal(clauses: Iterable[Clause], problem: AttentionProblem, setting: Setting) -> Reason | None:
    """The first clause that the problem does not meet, as a reason. None if it meets all."""
    found = next((c for c in clauses if not c.holds(problem, setting)), None)
    return Reason(found.code, found.demand.format(p=problem, s=setting)) if found else None


def mask(problem: AttentionProblem) -> Mask:
    """The mask without its key padding, as the SDK's kernels name it."""
    if problem.prior is not None:
        return Mask("prior", problem.prior.window, problem.prior.keys)
    band = problem.mask.band
    return mask_of(band.lower, band.upper, bool(problem.mask.row_bounds.claims), problem.q_len, problem.kv_len)


def is_padded(problem: AttentionProblem) -> bool:
    """Whether a run-time vector hides keys."""
    return any(isinstance(claim, KeyPadding) for claim in problem.mask.claims)


def is_limited(problem: AttentionProblem) -> bool:
    """Whether some bounds are known only at run time. They may differ for each batch element."""
    return any(isinstance(claim, Limited) for claim in problem.mask.claims)


SINCE: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"attention_cte": MappingProxyType({"bound_min": "2.29", "position_bias": "2.31"})}
)
"""The release that added a parameter to a kernel. It decides where the kernel is not installed."""


def takes(name: str, parameter: str, setting: Setting) -> bool:
    """Whether the kernel has this parameter: by its signature if it is installed, else by the release."""
    if setting.parameters is not None:
        return parameter in setting.parameters
    return setting.sdk >= SINCE[name][parameter]


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
    "scale-not-finite",
    "scale {p.scale} must not be 0: the kernel would use its default scale",
    lambda p, _: p.scale != 0,
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


def targets(*names: str) -> Clause:
    """The clause that the hardware is one of these."""
    return Clause(
        "kernel-target", f"it runs on {', '.join(names)}, not on {{s.target}}", lambda _, s: s.target in names
    )


def shipped(since: str, until: str) -> Clause:
    """The clause that the kernel is installed, or is part of the configured release."""
    return Clause(
        "kernel-sdk",
        f"it comes with SDK {since} to {until}, not with {{s.sdk}}",
        lambda _, s: s.parameters is not None or since <= s.sdk <= until,
    )


NARROW = (SIZES, GROUPS, ONE_HEAD_DIM, ROUNDED, SCALE, NO_SOFTCAP)
"""What every kernel of the SDK except attention_cte demands."""
GRADIENTS = (
    *NARROW,
    NO_BIAS,
    NO_PADDING,
    NEVER_EMPTY,
    Clause(
        "kernel-mask",
        "the mask must be none, or causal or a causal window with as many queries as keys, and is {p.mask}",
        lambda p, _: mask(p) == Mask("full") or (mask(p).kind == "causal" and p.q_len == p.kv_len),
    ),
)
SCALED = Bridge("the scale goes into the query", lambda p, _: p.scale != 1.0, lambda p: 2 * p.query_bytes)


def causal_band(problem: AttentionProblem) -> Band:
    """The band of a mask that the SDK's kernels call causal, with its window. They skip keys by no other mask."""
    return problem.mask.band if mask(problem).kind == "causal" else Band()


def behind_cache(problem: AttentionProblem) -> Band:
    """The band of causal new keys behind all keys of a cache: how many of these are used is known only at run time."""
    assert problem.prior is not None
    return Band(upper=problem.prior.keys)
