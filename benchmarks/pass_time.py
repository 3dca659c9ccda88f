"""What the pass costs beside the capture, by the number of layers: a tiny llama.

python -m benchmarks.pass_time [layers ...]
"""

from __future__ import annotations

import sys
import time

import torch
import transformers

from neuron_attn_rewrite import RewriteConfig
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.rewriter import rewrite_graph

LAYERS = (2, 8, 32, 64)


def measure(implementation: str, layers: int) -> tuple[float, float]:
    """Seconds of CPU of the capture; and of find, prove, choose, replace and report."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
        attn_implementation=implementation,
    )
    model = transformers.LlamaModel(config).eval()
    ids = torch.zeros(1, 64, dtype=torch.int64)
    start = time.process_time()
    module = capture(model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).module
    captured = time.process_time()
    report = rewrite_graph(module, None, RewriteConfig(policy="always"))
    seconds = time.process_time() - captured
    assert len(report.replaced) == layers
    return captured - start, seconds


def main() -> None:
    print("| attention | layers | capture, s | pass, s | pass / capture | pass, ms a layer |")
    print("|---|---|---|---|---|---|")
    for implementation in ("sdpa", "eager"):
        measure(implementation, 1)  # imports and tables are made once
        for layers in map(int, sys.argv[1:] or LAYERS):
            capture_s, pass_s = measure(implementation, layers)
            print(
                f"| {implementation} | {layers} | {capture_s:.2f} | {pass_s:.3f} "
                f"| {pass_s / capture_s:.3f} | {1e3 * pass_s / layers:.1f} |"
            )


if __name__ == "__main__":
    main()
