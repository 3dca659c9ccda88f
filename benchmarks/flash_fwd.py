"""Time of `neuron_attn::flash_fwd` on the CPU against `scaled_dot_product_attention` with the same mask.

Both run in turn, so that whatever else the machine does falls on both alike. A ratio above 1 means that the op is
faster. Where SDPA needs a mask tensor it is dense and made beforehand, as models make it once for all layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neuron_attn_rewrite.kernels.reference import visible
from neuron_attn_rewrite.ops.arguments import checked_terms

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One attention: sizes, and the keyword arguments of `flash_fwd` that make its mask."""

    name: str
    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    mask: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    """Number of visible keys of each batch element, the rest being padding on the right."""
    left: bool = False
    """The padding is on the left."""

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key and value."""
        query = torch.randn(self.batch, self.num_heads, self.q_len, self.head_dim, dtype=dtype)
        key, value = torch.randn(2, self.batch, self.num_kv_heads, self.kv_len, self.head_dim, dtype=dtype)
        return query, key, value

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `flash_fwd`."""
        options = {"scale": self.head_dim**-0.5, **self.mask}
        if self.lengths:
            seen = torch.arange(self.kv_len) < torch.tensor(self.lengths)[:, None]
            options["key_padding"] = seen.flip(1) if self.left else seen
        return options


CASES = (
    Case("full", 1, 12, 12, 1024, 1024, 64),
    Case("full, small", 8, 12, 12, 128, 128, 32),
    Case("full, tiny", 1, 4, 4, 16, 16, 16),
    Case("causal", 1, 9, 3, 2048, 2048, 64, {"band_upper": 0}),
    Case("causal, wide", 1, 32, 8, 2048, 2048, 128, {"band_upper": 0}),
    Case("causal, small", 4, 8, 2, 128, 128, 64, {"band_upper": 0}),
    Case("causal, cached keys", 1, 9, 3, 1024, 2048, 64, {"band_upper": 1024}),
    Case("decode", 1, 32, 8, 1, 4096, 128, {"band_upper": 4095}),
    Case("decode, batch", 8, 32, 8, 1, 1024, 128, {"band_upper": 1023}),
    Case("window 512", 1, 32, 8, 4096, 4096, 128, {"band_lower": -511, "band_upper": 0}),
    Case("window 128", 1, 9, 3, 2048, 2048, 64, {"band_lower": -127, "band_upper": 0}),
    Case("padding", 8, 12, 12, 128, 128, 32, lengths=(128, 100, 77, 128, 50, 90, 128, 110)),
    Case("padding, long", 4, 12, 12, 1024, 1024, 64, lengths=(1024, 700, 500, 900)),
    Case("causal, left padding", 4, 9, 3, 1024, 1024, 64, {"band_upper": 0}, (1024, 700, 500, 900), left=True),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row of the table")
    chosen = parser.parse_args(arguments)
    rows = [("case", "dtype", "SDPA ms", "flash_fwd ms", "ratio")]
    for case in CASES:
        if chosen.only in case.name:
            for dtype in chosen.dtype:
                theirs, ours, ratio = compare(case, DTYPES[dtype], chosen.seconds)
                rows.append((case.name, dtype, f"{theirs * 1e3:.3f}", f"{ours * 1e3:.3f}", f"{ratio:.2f}"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print_table(rows)


def compare(case: Case, dtype: torch.dtype, seconds: float) -> tuple[float, float, float]:
    """Median seconds of SDPA and of the op, and the median ratio of neighbouring runs."""
    torch.manual_seed(0)
    query, key, value = case.operands(dtype)
    options = case.options()
    terms = checked_terms(query, key, value, **options)
    seen = visible(terms, case.q_len, case.kv_len)
    causal = case.mask == {"band_upper": 0} and not case.lengths
    mask = None if causal or bool(seen.all()) else seen

    def theirs() -> Tensor:
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)

    def ours() -> Tensor:
        result: Tensor = torch.ops.neuron_attn.flash_fwd(query, key, value, **options)
        return result

    with torch.inference_mode():
        torch.testing.assert_close(ours(), theirs(), rtol=0, atol=2e-2)
        pairs: list[tuple[float, float]] = []
        end = time.perf_counter() + seconds
        while len(pairs) < 5 or time.perf_counter() < end:
            # Who goes second finds warmer caches: take turns.
            first, second = (theirs, ours) if len(pairs) % 2 else (ours, theirs)
            times = duration(first), duration(second)
            pairs.append(times if first is theirs else (times[1], times[0]))
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return medians[0], medians[1], statistics.median(a / b for a, b in pairs)


def duration(run: Callable[[], Tensor]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """With rich where it is installed, else as aligned text."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
