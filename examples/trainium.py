"""What to run on a Trainium or Inferentia machine: rewrite, check on the CPU, trace, compare, time.

    python examples/trainium.py              # all of it, with the AWS Neuron SDK
    python examples/trainium.py --check      # up to the trace, on any machine with torch-xla

Without the SDK it says so and ends with exit code 2. Nothing here has been run on Neuron hardware by its authors.
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec

import torch
from transformers import BertConfig, BertModel

from neuron_attn_rewrite import FlashAttentionStrategy, RewriteConfig, rewrite_for_trace, verify_trace

TARGET = "trn2"
CONFIG = BertConfig(num_hidden_layers=4)
RUNS = 20


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with padding. Some models drop a mask of ones, and then the traced graph has no mask either."""
    mask = torch.ones(1, 512, dtype=torch.int64)
    mask[:, 400:] = 0
    return torch.randint(0, CONFIG.vocab_size, (1, 512)), mask


def sdk_is_here() -> bool:
    if find_spec("torch_neuronx") is None:
        return False
    import torch_neuronx

    return hasattr(torch_neuronx, "trace")  # a package index also has an empty package of this name


@torch.no_grad()
def main() -> int:
    torch.manual_seed(0)
    model, inputs = BertModel(CONFIG).eval(), example()
    always = RewriteConfig(target=TARGET, policy="always", require="all")
    rewritten = rewrite_for_trace(model, inputs, always)
    print(rewritten.report)

    if find_spec("torch_xla") is None:
        print("\nverify_trace is left out: it needs torch-xla (pip install torch-xla)")
    else:
        print(f"\n{verify_trace(rewritten, inputs)}")
    if "--check" in sys.argv[1:]:
        return 0
    if not sdk_is_here():
        print("\ntorch_neuronx is not installed, so nothing is traced: run this on a machine with the AWS Neuron SDK.")
        return 2

    import torch_neuronx

    native = RewriteConfig(target=TARGET, sites={"*": FlashAttentionStrategy.NONE})
    expected = model(*inputs).last_hidden_state
    for name, module in (("native", rewrite_for_trace(model, inputs, native)), ("rewritten", rewritten)):
        traced = torch_neuronx.trace(module, inputs, compiler_args=["--model-type", "transformer", "--target", TARGET])
        got = traced(*inputs)["last_hidden_state"]
        start = time.perf_counter()
        for _ in range(RUNS):
            traced(*inputs)
        milliseconds = (time.perf_counter() - start) / RUNS * 1e3
        shown = inputs[1].bool()
        error = (got[shown] - expected[shown]).abs().max() / expected.abs().max()
        print(f"{name:<10} {milliseconds:8.2f} ms a run, differs from the CPU by {error:.1e} of the largest value")
    return 0


if __name__ == "__main__":
    sys.exit(main())
