"""Fit the cost model on the published times, write its constants, and print how it does on the points held out.

python -m benchmarks.fit_cost [--write]    every third point is held out; --write also makes docs/cost_model.md
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import traces
from benchmarks.measurements import KERNEL, NATIVE, Point
from neuron_attn_rewrite.strategy import cost
from neuron_attn_rewrite.strategy.cost import COMPILER_ATTENTION, HARDWARE, Fit

HERE = Path(cost.__file__).parent
DOCS = Path(__file__).parents[1] / "docs" / "cost_model.md"
COVERED = 0.9
"""Share of the held-out points that lie within the spread."""
UNMEASURED = 1.5
"""A judgement: nothing was published to fit it on."""
LEAST_NATIVE_SPREAD = 1.3
"""A judgement: the native points below the compiler's own attention are all of one shape."""


def held_out(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """The points to fit on, and every third to check with."""
    return [p for i, p in enumerate(points) if i % 3 != 1], [p for i, p in enumerate(points) if i % 3 == 1]


def fit_kernel(points: Sequence[Point]) -> tuple[float, float, float]:
    """fixed, per_group and slack, by least squares of the relative error."""
    rows = []
    for p in points:
        _, bound = HARDWARE["trn2"].tile_bound(p.head_dim, p.head_dim, 2)
        groups, tiles = cost.work(p.problem, p.cores, skips_rows=False)
        rows.append([value / p.micros for value in (1.0, groups, bound * tiles)])
    solution = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.float64), torch.ones(len(rows), 1).double())
    fixed, per_group, slack = solution.solution[:, 0].tolist()
    return fixed, per_group, slack


def bytes_per_score(points: Sequence[Point]) -> float:
    """Bytes that the native operators move for each score: the geometric mean."""
    each = [p.micros * 1e3 * HARDWARE["trn2"].dma_gbs * p.cores / (p.heads * p.q_len * p.kv_len) for p in points]
    return math.exp(sum(map(math.log, each)) / len(each))


def spread(factors: Sequence[float]) -> float:
    """The factor within which most of these lie."""
    off = sorted(abs(math.log(f)) for f in factors)
    return max(math.exp(off[math.ceil(COVERED * len(off)) - 1]), 1.1)


def kernel_factor(point: Point, fitted: Fit) -> float:
    """Published over predicted."""
    return point.micros / cost.kernel_time("attention_cte", point.problem, "trn2", point.cores, fitted).micros


def native_factor(point: Point, fitted: Fit) -> float:
    """Published over predicted."""
    return point.micros / cost.native_time(point.problem, "trn2", point.cores, fitted).micros


def fit() -> Fit:
    """The constants."""
    training, checking = held_out(KERNEL)
    short = [p for p in NATIVE if p.kv_len < COMPILER_ATTENTION]
    long = [p for p in NATIVE if p.kv_len >= COMPILER_ATTENTION]
    short_training, _ = held_out(short)
    fixed, per_group, slack = fit_kernel(training)
    first = Fit(fixed, per_group, slack, bytes_per_score(short_training), bytes_per_score(long), 1, 1, 1, UNMEASURED)
    values = {
        **asdict(first),
        "kernel_spread": spread([kernel_factor(p, first) for p in checking]),
        "native_spread": max(spread([native_factor(p, first) for p in short]), LEAST_NATIVE_SPREAD),
        "compiler_spread": spread([native_factor(p, first) for p in long]),
    }
    return Fit(**{name: float(f"{value:.4g}") for name, value in values.items()})


def page(fitted: Fit) -> str:
    """The documentation: the model, its constants, and the points that it was not fitted on."""
    _, checking = held_out(KERNEL)
    lines = [
        "# The cost model",
        "",
        'Made by `python -m benchmarks.fit_cost --write`. `policy="profitable"` takes a kernel where this model',
        "predicts that it is faster. All times are published by other people and of trn2; this project has measured",
        "none. Other targets and other kernels are scaled by the engines' clocks and bandwidths, with a wider range.",
        "",
        "    kernel = fixed + per_group * groups + slack * bound * tiles       (microseconds, on the busier core)",
        "    native = bytes * scores / bandwidth",
        "",
        "A group is 128 query rows of a head, a tile 128 rows by 512 keys, `bound` the time of its busiest engine.",
        "",
        "| constant | value |",
        "| --- | --- |",
        *(f"| {name} | {value:g} |" for name, value in asdict(fitted).items()),
        "",
        f"## Kernel: the {len(checking)} of {len(KERNEL)} points that were held out",
        "",
        "| attention_cte | published us | predicted us | factor | source |",
        "| --- | --- | --- | --- | --- |",
    ]
    for p in checking:
        factor = kernel_factor(p, fitted)
        lines.append(f"| {p} | {p.micros:.0f} | {p.micros / factor:.0f} | {factor:.2f} | {p.source} |")
    short = sum(p.kv_len < COMPILER_ATTENTION for p in NATIVE)
    lines += [
        "",
        f"## Native operators: {len(NATIVE)} points",
        "",
        f"Too few to hold out more than one of the {short} below {COMPILER_ATTENTION} keys, and all of one shape: the",
        f"range is {LEAST_NATIVE_SPREAD} at least. From there on the compiler has an attention of its own, and the two",
        "published points lie a factor of eight apart: the model takes their geometric middle, and says so.",
        "",
        "| native | published us | predicted us | factor | source |",
        "| --- | --- | --- | --- | --- |",
    ]
    for p in NATIVE:
        factor = native_factor(p, fitted)
        lines.append(f"| {p} | {p.micros:.0f} | {p.micros / factor:.0f} | {factor:.2f} | {p.source} |")
    lines += [
        "",
        "## Our own kernel",
        "",
        "It has run on the simulator alone, so it is given the constants of attention_cte. That this is fair is seen",
        "from traces of both on the simulator (`python -m benchmarks.traces`): the time of the busiest engine, which",
        "is a lower bound and no latency. Ours is preferred if it is predicted to be more than 1.25 times faster.",
        "",
        *traces.table(),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the constants and docs/cost_model.md")
    chosen = parser.parse_args(arguments)
    fitted = fit()
    text = page(fitted)
    print(text)
    if chosen.write:
        (HERE / "cost.json").write_text(json.dumps({"fit": asdict(fitted)}, indent=1) + "\n")
        DOCS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
