"""Engine time of our kernel and of the SDK's attention_cte, counted from traces of the simulator: lower bounds.

NKI_LIBRARY=<checkout of aws-neuron/nki-library> python -m benchmarks.traces [--write]

--write keeps the numbers in benchmarks/traces.json, from which benchmarks.fit_cost makes its page.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.kernels.nki import prepare
from neuron_attn_rewrite.ops.arguments import checked_terms
from neuron_attn_rewrite.simulator import active, load, run
from neuron_attn_rewrite.simulator.cost import LowerBound, lower_bound

NUMBERS = Path(__file__).with_name("traces.json")
CASES: tuple[tuple[str, int, int, int, dict[str, int]], ...] = (
    ("full", 1, 2048, 128, {}),
    ("causal", 1, 2048, 128, {"band_upper": 0}),
    ("causal", 1, 4096, 128, {"band_upper": 0}),
    ("causal", 1, 2048, 64, {"band_upper": 0}),
    ("window 128", 1, 2048, 64, {"band_upper": 0, "band_lower": -127}),
    ("causal, 4 heads of one group", 4, 1024, 128, {"band_upper": 0}),
)
"""Name, query heads of the one kv head, length, head_dim, mask."""


def measure() -> list[dict[str, Any]]:
    """Microseconds of the busiest engine and HBM bytes of both kernels, on one core of trn2."""
    sys.path.insert(0, str(Path(os.environ["NKI_LIBRARY"]) / "src" / "nkilib_src"))
    with active():
        cte = importlib.import_module("nkilib.core.attention.attention_cte").attention_cte
    rows = []
    for name, heads, length, dim, mask in CASES:
        torch.manual_seed(0)
        query = torch.randn(1, heads, length, dim).bfloat16()
        key, value = torch.randn(2, 1, 1, length, dim).bfloat16()
        terms = checked_terms(query, key, value, scale=0.1, **mask)
        made = prepare.flash_fwd(query, key, value, terms, lnc=1, target="gen3")
        result = run(getattr(load(made.module), made.kernel), lnc=1, target="gen3", **made.tensors, **made.static)
        theirs: list[LowerBound] = []

        def launch(kernel: Any, lnc: int, theirs: list[LowerBound] = theirs) -> Any:
            def call(**arguments: Any) -> Any:
                result = run(kernel, lnc=lnc, target="gen3", same_instructions=False, **arguments)
                theirs.append(lower_bound(result.trace, "gen3"))
                return result.outputs

            return call

        adapter = replace(vendor.ADAPTERS["attention_cte"], kernel=cte, launch=launch)
        with contextlib.redirect_stdout(io.StringIO()):
            adapter.call(query, key, value, terms, 1)
        rows.append({"case": f"{name}, {length} x {dim}", "ours": _numbers(lower_bound(result.trace, "gen3"))})
        rows[-1]["attention_cte"] = _numbers(theirs[0])
    return rows


def _numbers(of: LowerBound) -> dict[str, Any]:
    return {"engine": of.engine, "micros": round(of.seconds * 1e6, 1), "megabytes": round(of.hbm_bytes / 1e6, 2)}


def table() -> list[str]:
    """The kept numbers as lines of markdown."""
    lines = ["| one core of trn2 | ours: us, engine, MB | attention_cte: us, engine, MB | ratio |"]
    lines.append("| --- | --- | --- | --- |")
    for row in json.loads(NUMBERS.read_text()):
        ours, theirs = row["ours"], row["attention_cte"]
        cells = [f"{k['micros']}, {k['engine']}, {k['megabytes']}" for k in (ours, theirs)]
        lines.append(f"| {row['case']} | {' | '.join(cells)} | {ours['micros'] / theirs['micros']:.2f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, keep if asked to, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the numbers")
    chosen = parser.parse_args(arguments)
    if not os.environ.get("NKI_LIBRARY"):
        sys.exit("Set NKI_LIBRARY to a checkout of https://github.com/aws-neuron/nki-library.")
    rows = measure()
    if chosen.write:
        NUMBERS.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
