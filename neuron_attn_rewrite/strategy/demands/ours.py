"""What our own kernels demand."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from neuron_attn_rewrite.masks.spec import EmptyRows
from neuron_attn_rewrite.strategy.clauses import (
    DTYPES,
    GROUPS,
    NO_BIAS,
    NO_PADDING,
    SCALE,
    SIZES,
    Clause,
    Kernel,
    behind_cache,
    mask,
    targets,
)

OURS: Final = "flash_fwd"
"""Our own kernel."""
PRIOR: Final = "flash_prior"
"""The same kernel with two sources of keys."""
MAX_HEAD_DIM = 256

_BOTH = (
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
)

KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        OURS: Kernel(
            (
                *_BOTH,
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
            in_blocks=(
                NO_BIAS,
                NO_PADDING,
                Clause(
                    "empty-rows",
                    "a query that sees no key of a cache in blocks must give zeros, and here gives the mean of all",
                    lambda p, _: p.empty_rows is not EmptyRows.MEAN,
                ),
                targets("trn2", "trn3"),
            ),
            # Bounds skip no keys: their values are not known when the kernel is built.
            computed_band=lambda p: p.mask.band,
        ),
        PRIOR: Kernel(
            (
                *_BOTH,
                Clause(
                    "empty-rows",
                    "a query that sees no key must give zeros, and here gives {p.empty_rows.value}; "
                    'empty_rows="any" says that such rows do not matter',
                    lambda p, _: p.empty_rows in (EmptyRows.NEVER, EmptyRows.ZERO, EmptyRows.ANY),
                ),
                Clause(
                    "kernel-target",
                    "it needs an instruction that {s.target} lacks",
                    lambda _, s: s.target in ("trn2", "trn3"),
                ),
            ),
            folds_groups=True,
            # The length of the cache is not known when the kernel is built: every key of it is computed.
            computed_band=behind_cache,
            sources=(2,),
        ),
    }
)
"""By name."""
