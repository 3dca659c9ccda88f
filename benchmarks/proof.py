"""What a proof costs by length: the masks of a tiny llama. Capture runs nothing, so only the proof holds memory.

python -m benchmarks.proof [length ...]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

LENGTHS = (2048, 8192, 32768)


def measure(implementation: str, length: int) -> str:
    """One line: seconds of capture and proof, and by how much the proof raised the peak of memory."""
    import torch
    import transformers

    from neuron_attn_rewrite import RewriteConfig
    from neuron_attn_rewrite.capture.export import capture
    from neuron_attn_rewrite.masks.proof import Proof
    from neuron_attn_rewrite.masks.prove import Prover
    from neuron_attn_rewrite.patterns.find import find
    from neuron_attn_rewrite.patterns.site import AttentionSite

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
        max_position_embeddings=length,
        attn_implementation=implementation,
    )
    model = transformers.LlamaModel(config).eval()
    ids = torch.zeros(1, length, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    start = time.perf_counter()
    module = capture(model, (), inputs).module
    captured, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prover = Prover(module, RewriteConfig())
    proofs = [prover.prove(s) for s in find(module, prover.evaluator) if isinstance(s, AttentionSite)]
    seconds = time.perf_counter() - captured
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**20
    (mask,) = {str(p.mask) if isinstance(p, Proof) else str(p) for p in proofs}
    return f"| {implementation} | {length} | {captured - start:.1f} | {seconds:.1f} | {grown:.2f} | {mask} |"


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--one":
        print(measure(sys.argv[2], int(sys.argv[3])))
        return
    print("| attention | length | capture, s | proof, s | memory of the proof, GB | mask |\n|---|---|---|---|---|---|")
    for implementation in ("sdpa", "eager"):
        for length in map(int, sys.argv[1:] or LENGTHS):
            # A process each: the peak of memory only ever grows.
            command = [sys.executable, "-m", "benchmarks.proof", "--one", implementation, str(length)]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
