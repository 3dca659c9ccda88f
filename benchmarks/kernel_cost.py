"""What the NKI prefill kernel moves and how busy it keeps the engines, from traces of the simulator.

python -m benchmarks.kernel_cost [length ...]      lengths 2048 8192 16384 if none is given

All rows are causal, bfloat16, head_dim 128, on one core: one head; 16 query heads on 8 kv heads, of which one group is
simulated and counted eight times; and one head with a window of 512. The times are lower bounds, not latencies: no
engine ever waits. If NKI_LIBRARY is set to a checkout of aws-neuron/nki-library, its `attention_cte` is measured too.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from neuron_attn_rewrite import simulator
from neuron_attn_rewrite.kernels.nki import prepare
from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.ops import simulated
from neuron_attn_rewrite.simulator.cost import lower_bound

LENGTHS = (2048, 8192, 16384)
HEAD_DIM = 128
TARGETS = {"gen3": "trn2", "gen4": "trn3"}


@dataclass(frozen=True)
class Row:
    """`group` query heads on one kv head, simulated once and counted `times` times."""

    heads: str
    length: int
    group: int = 1
    times: int = 1
    window: int | None = None

    @property
    def useful_flops(self) -> float:
        """Two matrix products for each pair of a query and a key that it sees."""
        n, w = self.length, min(self.window or self.length, self.length)
        pairs = n * w - w * (w - 1) / 2
        return 4.0 * HEAD_DIM * pairs * self.group * self.times


def ours(row: Row, target: str) -> simulator.Trace:
    q = torch.zeros(1, row.group, row.length, HEAD_DIM, dtype=torch.bfloat16)
    k = v = q[:, :1].contiguous()
    lower = None if row.window is None else 1 - row.window
    launch = prepare.flash_fwd(q, k, v, Terms(1.0, band_lower=lower, band_upper=0), target=target)
    return simulated.run(launch, target)[1]


def attention_cte(row: Row, target: str) -> simulator.Trace:
    source = str(Path(os.environ["NKI_LIBRARY"]) / "src")
    if source not in sys.path:
        sys.path.insert(0, source)
    with simulator.active():
        kernel = importlib.import_module("nkilib_src.nkilib.core.attention.attention_cte").attention_cte
    q = torch.zeros(row.group, row.length, HEAD_DIM, dtype=torch.bfloat16)
    k, v = q[:1].transpose(1, 2).contiguous(), q[:1].contiguous()
    trace = simulator.run(kernel, q, k, v, sliding_window=row.window, target=target).trace
    assert trace is not None
    return trace


def line(name: str, kernel: Callable[[Row, str], simulator.Trace], row: Row, target: str) -> str:
    trace = kernel(row, target)
    b = lower_bound(trace)
    busy = ", ".join(f"{e} {s * row.times * 1e6:.0f}" for e, s in sorted(b.busy.items(), key=lambda x: -x[1]) if s > 0)
    peak = {"gen3": 78.6e12, "gen4": 78.6e12}[target]
    window = "" if row.window is None else f", window {row.window}"
    return (
        f"| {name} | {TARGETS[target]} | {row.heads} | {row.length}{window} | {b.seconds * row.times * 1e6:.0f} | "
        f"{b.engine} | {row.useful_flops / (b.seconds * row.times * peak):.0%} | {b.hbm_read * row.times / 1e6:.1f} | "
        f"{b.hbm_written * row.times / 1e6:.1f} | {len(trace) * row.times} | {busy} |"
    )


def main() -> None:
    lengths = [int(n) for n in sys.argv[1:]] or LENGTHS
    rows = [Row("1", n) for n in lengths] + [Row("16/8", n, 2, 8) for n in lengths]
    rows += [Row("1", n, window=512) for n in lengths]
    kernels: dict[str, Callable[[Row, str], simulator.Trace]] = {"flash_fwd": ours}
    if os.environ.get("NKI_LIBRARY"):
        kernels["attention_cte"] = attention_cte
    print(
        "| kernel | target | heads | length | lower bound, us | bound by | utilisation at most | HBM read, MB | "
        "HBM written, MB | instructions | busy, us |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        for target in TARGETS:
            for name, kernel in kernels.items():
                print(line(name, kernel, row, target), flush=True)


if __name__ == "__main__":
    main()
