"""The cost model: predicted times of kernels and native operators, fitted on published measurements.

A kernel takes

    fixed + per_group * (groups of 128 query rows) + slack * bound * (tiles of 128 rows x 512 keys)

on the busier physical core, where `bound` is the busiest engine's time for one tile of the documented loop. To this
it adds the time of other memory traffic: a bias, the bridges of the kernel (`Bridge.moves`), and transposes of operands
whose order the kernel does not take. The native operators read and write the whole score matrix several times: their
time is bytes per score over the bandwidth, with more bytes beyond 4096 keys.

`python -m benchmarks.fit_cost` fits the constants and writes them to `cost.json`, with the spread of held-out points.
All measurements were published by others. This project has measured none.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from importlib.resources import files

import torch

from neuron_attn_rewrite.hardware import HARDWARE, Hardware
from neuron_attn_rewrite.masks.spec import Band, MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy.clauses import Kernel, Setting, mask
from neuron_attn_rewrite.strategy.legality import KERNELS, OURS, PRIOR

ROWS, KEYS = 128, 512
"""A tile of scores."""
LONG = 4096
"""Keys beyond which the native operators were published to slow down."""
SPLIT_ROWS = 1024
"""From this many rows on, the two cores share the last head of an odd number."""
CAUSAL_SPLIT = 0.65
"""The share of the first core in the rows of a causal head that both cores compute."""


def tile_bound(chip: Hardware, head_dim: int, v_head_dim: int, element: int) -> tuple[str, float]:
    """The busiest engine and its microseconds for one tile of flash attention."""
    contractions = -(-head_dim // 128)
    slow = 4 if element == 4 else 1
    busy = {
        "TensorE": slow * (KEYS * contractions + KEYS // 128 * max(128, v_head_dim)) / chip.tensor_ghz,
        "VectorE": (KEYS + 64 + max(64, v_head_dim) / 4) / chip.vector_ghz,
        "ScalarE": (KEYS + 64) / chip.scalar_ghz,
        # The transposed weights go from SBUF to SBUF at half the bandwidth.
        "DMA": ROWS * KEYS * 2 / (0.5 * chip.dma_gbs),
    }
    engine = max(busy, key=lambda name: busy[name])
    return engine, busy[engine] / 1e3


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
    """Bytes that the native operators move for each score, beside query, key, value and result once."""
    long_bytes: float
    """The same beyond 4096 keys: the geometric middle of that and of what was published there."""
    kernel_spread: float
    """Factor within which the kernel's held-out points lie."""
    native_spread: float
    long_spread: float
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
    """Its largest part, in words."""


def _per_group(problem: AttentionProblem, kernel: Kernel, ranks: int) -> list[int]:
    """Tiles that the kernel computes for each group of rows of a head."""
    q_len, kv_len = problem.q_len, problem.kv_len
    groups, band = -(-q_len // ROWS), kernel.computed_band(problem)
    strided = ranks > 1 and kernel.skips_for_strided_rows
    if band == Band() and not strided:
        return [-(-kv_len // KEYS)] * groups
    rows = MaskSpec((band,)).rows(q_len, kv_len)
    if strided:
        # Row i is token i * ranks + rank, and the kernel is built for the last rank.
        rows = torch.stack([torch.zeros(q_len), (torch.arange(q_len) + 1) * ranks], 1).long()
    short = -q_len % ROWS
    lo = torch.cat([rows[:, 0].where(rows[:, 1] > 0, kv_len), rows.new_full((short,), kv_len)])
    hi = torch.cat([rows[:, 1], rows.new_zeros(short)])
    first = lo.reshape(-1, ROWS).amin(1) // kernel.step * kernel.step
    last = (-(-hi.reshape(-1, ROWS).amax(1) // kernel.step) * kernel.step).clamp_max(kv_len)
    per_group: list[int] = (-((first - last) // KEYS)).clamp_min(0).tolist()
    return per_group


def work(problem: AttentionProblem, cores: int, kernel: Kernel, ranks: int = 1) -> tuple[float, float]:
    """Groups and tiles of the busier core. Heads alternate between cores; the last of an odd number is split by rows.

    Args:
        problem: what is computed.
        cores: physical cores of the call.
        kernel: what computes it.
        ranks: number of context parallel ranks, if the rows are strided over them. 1 otherwise.
    """
    per_group = _per_group(problem, kernel, ranks)
    folded = kernel.folds_groups and problem.q_len * (problem.num_heads // problem.num_kv_heads) <= ROWS
    heads = problem.batch * (problem.num_kv_heads if folded else problem.num_heads)
    groups, total = len(per_group), sum(per_group)
    if cores == 1:
        return heads * groups, heads * total
    whole, odd = divmod(heads, 2)
    if not odd:
        return whole * groups, whole * total
    if problem.q_len < SPLIT_ROWS:
        return (whole + 1) * groups, (whole + 1) * total
    causal = ranks > 1 or (mask(problem).kind == "causal" and mask(problem).window is None)
    cut = int(groups * (CAUSAL_SPLIT if causal else 0.5))
    parts = (cut, sum(per_group[:cut])), (groups - cut, sum(per_group[cut:]))
    most = max(parts, key=lambda part: part[1])
    return whole * groups + most[0], whole * total + most[1]


def copies(name: str, problem: AttentionProblem, target: str, cores: int) -> dict[str, int]:
    """Bytes that a call of the kernel moves in addition to its operands and result, by their cause."""
    kernel = KERNELS[name]
    moved = {"what the kernel keeps in memory": kernel.spills(problem)}
    if problem.bias_shape is not None:
        # One row for all queries is read once; else each score is given its own element.
        elements = problem.scores if problem.bias_shape[2] > 1 else math.prod(problem.bias_shape)
        moved["traffic of the bias"] = elements * (kernel.bias_bytes or problem.dtype.itemsize)
    for bridge in kernel.bridges:
        if bridge.needed(problem, Setting(target, cores)):
            moved[f"copying ({bridge.words})"] = bridge.moves(problem)
    return moved


def kernel_time(
    name: str,
    problem: AttentionProblem,
    target: str,
    cores: int,
    constants: Fit | None = None,
    *,
    ranks: int = 1,
    layout_bytes: int = 0,
) -> Time:
    """The predicted time of one call of a kernel, with the copies around it.

    Args:
        name: of the kernel.
        problem: what it computes.
        target: the hardware.
        cores: physical cores of the call.
        constants: None for those of `fit`.
        ranks: as for `work`.
        layout_bytes: bytes moved to bring operands and result into an order that the kernel takes. Negative if more
            of the model's own copies become unused.
    """
    c = constants or fit()
    element = problem.dtype.itemsize if name in (OURS, PRIOR) else 2
    engine, bound = tile_bound(HARDWARE[target], problem.head_dim, problem.v_head_dim, element)
    groups, count = work(problem, cores, KERNELS[name], ranks)
    moved = {**copies(name, problem, target, cores), "copying (operands or the result are turned)": layout_bytes}
    parts = {
        "the kernel's fixed cost": c.fixed,
        "small operations for each 128 rows": c.per_group * groups,
        f"{engine} time of {count:.0f} tiles": c.slack * bound * count,
        **{what: size / (HARDWARE[target].dma_gbs * cores) / 1e3 for what, size in moved.items()},
    }
    spread = c.kernel_spread
    if target != "trn2" or name != "attention_cte":
        spread *= c.unmeasured_spread
    return Time(sum(parts.values()), spread, max(parts, key=lambda part: parts[part]))


def native_time(problem: AttentionProblem, target: str, cores: int, constants: Fit | None = None) -> Time:
    """The predicted time of the native operators. They compute every score, whatever the mask."""
    c = constants or fit()
    long = problem.kv_len > LONG
    moved = problem.scores * (c.long_bytes if long else c.native_bytes) + problem.operand_bytes
    spread = c.long_spread if long else c.native_spread
    if target != "trn2":
        spread *= c.unmeasured_spread
    because = f"traffic of the {'operands' if 2 * problem.operand_bytes > moved else 'score matrix'}"
    return Time(moved / (HARDWARE[target].dma_gbs * cores) / 1e3, spread, because)


def ratio_words(problem: AttentionProblem, kernel: Time, native: Time) -> str:
    """The comparison in words: how many times faster the kernel is, within which bounds, and why."""
    ratio, spread = native.micros / kernel.micros, math.hypot(math.log(kernel.spread), math.log(native.spread))
    low, high = ratio * math.exp(-spread), ratio * math.exp(spread)
    why = native.because if ratio > 1 else kernel.because
    return f"{ratio:.2g} times native speed ({low:.2g} to {high:.2g}), q_len {problem.q_len}: {why} dominates"
