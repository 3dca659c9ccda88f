"""What an attention costs, by kernel and natively: a model with few constants, fitted on published measurements.

A kernel takes

    fixed + per_group * (groups of 128 query rows) + slack * bound * (tiles of 128 rows x 512 keys)

on the busier physical core, and the traffic of a bias, where `bound` is the busiest engine's time for one tile of the
documented loop. The native operators read and write the whole score matrix several times: bytes per score over the
bandwidth. From 4096 keys on the compiler has an attention of its own, which the published numbers put between as fast
as a kernel and eight times slower.

`python -m benchmarks.fit_cost` fits the constants; they lie in `cost.json`, with the spread of the points held out.
Every number is of other people's devices: this project has measured none.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

import torch

from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy.clauses import mask
from neuron_attn_rewrite.strategy.legality import KERNELS, OURS

ROWS, KEYS = 128, 512
"""A tile of scores."""
COMPILER_ATTENTION = 4096
"""Keys from which on the compiler uses an attention of its own."""
SPLIT_ROWS = 1024
"""Rows from which on the two cores share the last of an odd number of heads."""
CAUSAL_SPLIT = 0.65
"""Share of the first core in the rows of a causal head that both compute."""


@dataclass(frozen=True)
class Hardware:
    """One physical NeuronCore. Sources: the SDK's architecture guides and its DMA bandwidth guide."""

    tensor_ghz: float
    vector_ghz: float
    scalar_ghz: float
    dma_gbs: float

    def tile_bound(self, head_dim: int, v_head_dim: int, element: int) -> tuple[str, float]:
        """The busiest engine and its microseconds for one tile of flash attention."""
        contractions = -(-head_dim // 128)
        slow = 4 if element == 4 else 1
        busy = {
            "TensorE": slow * (KEYS * contractions + KEYS // 128 * max(128, v_head_dim)) / self.tensor_ghz,
            "VectorE": (KEYS + 64 + max(64, v_head_dim) / 4) / self.vector_ghz,
            "ScalarE": (KEYS + 64) / self.scalar_ghz,
            # The transposed weights go from SBUF to SBUF at half the bandwidth.
            "DMA": ROWS * KEYS * 2 / (0.5 * self.dma_gbs),
        }
        engine = max(busy, key=lambda name: busy[name])
        return engine, busy[engine] / 1e3


HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        "trn1": Hardware(2.8, 1.12, 1.4, 272),
        "inf2": Hardware(2.8, 1.12, 1.4, 272),
        "trn2": Hardware(2.4, 0.96, 1.2, 368),
        "trn3": Hardware(2.4, 1.2, 1.2, 528),
    }
)


@dataclass(frozen=True)
class Fit:
    """The fitted constants, and how far held-out points lie from them."""

    fixed: float
    """Microseconds of a call."""
    per_group: float
    """Microseconds for each 128 rows of a head on one core: dependent small operations."""
    slack: float
    """How much longer a tile takes than its busiest engine."""
    native_bytes: float
    """Bytes that the native operators move for each score."""
    compiler_bytes: float
    """The same from 4096 keys on, the geometric middle of what was published."""
    kernel_spread: float
    """Factor within which the kernel's held-out points lie."""
    native_spread: float
    compiler_spread: float
    unmeasured_spread: float
    """Further factor for a target or a kernel of which nothing was published."""


@functools.cache
def fit() -> Fit:
    """The constants in `cost.json`."""
    return Fit(**json.loads(files(__package__).joinpath("cost.json").read_text())["fit"])


@dataclass(frozen=True)
class Time:
    """Predicted microseconds, and the factor by which they may be off either way."""

    micros: float
    spread: float
    because: str
    """What most of it is."""


def _per_group(problem: AttentionProblem, skips_rows: bool) -> list[int]:
    """Tiles of each group of rows of a head."""
    q_len, kv_len = problem.q_len, problem.kv_len
    if not problem.mask.claims or not (skips_rows or mask(problem).kind == "causal"):
        return [-(-kv_len // KEYS)] * -(-q_len // ROWS)
    rows = problem.mask.rows(q_len, kv_len)
    short = -q_len % ROWS
    lo = torch.cat([rows[:, 0].where(rows[:, 1] > 0, kv_len), rows.new_full((short,), kv_len)])
    hi = torch.cat([rows[:, 1], rows.new_zeros(short)])
    first = lo.reshape(-1, ROWS).amin(1) // KEYS
    last = -(-hi.reshape(-1, ROWS).amax(1) // KEYS)
    per_group: list[int] = (last - first).clamp_min(0).tolist()
    return per_group


def work(problem: AttentionProblem, cores: int, skips_rows: bool, folds_groups: bool = False) -> tuple[float, float]:
    """Groups and tiles of the busier core: heads are dealt out, and the last of an odd number is split by rows."""
    per_group = _per_group(problem, skips_rows)
    heads = problem.batch * (problem.num_kv_heads if folds_groups else problem.num_heads)
    groups, total = len(per_group), sum(per_group)
    if cores == 1:
        return heads * groups, heads * total
    whole, odd = divmod(heads, 2)
    if not odd:
        return whole * groups, whole * total
    if problem.q_len < SPLIT_ROWS:
        return (whole + 1) * groups, (whole + 1) * total
    cut = int(groups * (CAUSAL_SPLIT if mask(problem).kind == "causal" and mask(problem).window is None else 0.5))
    parts = (cut, sum(per_group[:cut])), (groups - cut, sum(per_group[cut:]))
    most = max(parts, key=lambda part: part[1])
    return whole * groups + most[0], whole * total + most[1]


def kernel_time(name: str, problem: AttentionProblem, target: str, cores: int, constants: Fit | None = None) -> Time:
    """What one call of a kernel takes."""
    c = constants or fit()
    element = problem.dtype.itemsize if name == OURS else 2
    engine, bound = HARDWARE[target].tile_bound(problem.head_dim, problem.v_head_dim, element)
    groups, count = work(problem, cores, KERNELS[name].skips_rows, KERNELS[name].folds_groups)
    parts = {
        "the kernel's fixed cost": c.fixed,
        "small operations for each 128 rows": c.per_group * groups,
        f"{engine} time of {count:.0f} tiles": c.slack * bound * count,
    }
    if problem.bias_shape is not None:
        # Read by ours as it is; for the SDK's kernels it is first written out in float32 for each head.
        moved = math.prod(problem.bias_shape) * element
        moved += 0 if name == OURS else 8 * problem.batch * problem.num_heads * problem.q_len * problem.kv_len
        parts["traffic of the bias"] = moved / (HARDWARE[target].dma_gbs * cores) / 1e3
    spread = c.kernel_spread
    if target != "trn2" or name != "attention_cte":
        spread *= c.unmeasured_spread
    return Time(sum(parts.values()), spread, max(parts, key=lambda part: parts[part]))


def native_time(problem: AttentionProblem, target: str, cores: int, constants: Fit | None = None) -> Time:
    """What the native operators take: no mask skips anything."""
    c = constants or fit()
    scores = problem.batch * problem.num_heads * problem.q_len * problem.kv_len
    compiler = problem.kv_len >= COMPILER_ATTENTION
    moved = scores * (c.compiler_bytes if compiler else c.native_bytes)
    spread = c.compiler_spread if compiler else c.native_spread
    if target != "trn2":
        spread *= c.unmeasured_spread
    because = "the compiler's own attention" if compiler else "traffic of the score matrix"
    return Time(moved / (HARDWARE[target].dma_gbs * cores) / 1e3, spread, because)


def ratio_words(problem: AttentionProblem, kernel: Time, native: Time) -> str:
    """The comparison in words: how many times faster the kernel is, within which bounds, and why."""
    ratio, spread = native.micros / kernel.micros, math.hypot(math.log(kernel.spread), math.log(native.spread))
    low, high = ratio * math.exp(-spread), ratio * math.exp(spread)
    why = native.because if ratio > 1 else kernel.because
    return f"{ratio:.2g} times native speed ({low:.2g} to {high:.2g}), q_len {problem.q_len}: {why} dominates"
