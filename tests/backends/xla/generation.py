"""The graphs of generators, lowered: what `verify_trace` says, and the shapes of inputs and outputs in HLO."""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from neuron_attn_rewrite import RewriteConfig, rewrite_for_generation, verify_trace
from neuron_attn_rewrite.backends.trace import lowered_hlo
from tests.generation.models import make

CONFIG = RewriteConfig(policy="always", verify=False)
LENGTHS: dict[str, Any] = {"max_length": 16, "batch_size": 2, "config": CONFIG, "verify": False}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Gemma2": {"sliding_window": 8, "head_dim": 16},
    "GPT2": {},
}


def shapes(hlo: str) -> list[list[int]]:
    """Of the outputs, as the last tuple of the HLO text gives them."""
    outputs = re.findall(r"ROOT \S+ = \((.*?)\) tuple\(", hlo)[-1]
    return [[int(size) for size in dims.split(",") if size] for dims in re.findall(r"\w+\[([\d,]*)\]", outputs)]


def seen(generator: Any, name: str) -> dict[str, Any]:
    module, inputs, aliases = generator.for_trace(name)
    found = verify_trace(module, inputs, aliases=aliases, strict=False)
    return {
        "problems": list(found.problems),
        "kernels": found.kernels,
        "max_error": found.max_error,
        "outputs": shapes(lowered_hlo(module, inputs)),
        "caches": [list(tensor.shape) for tensor in aliases],
    }


def main() -> dict[str, Any]:
    found = {}
    for kind, fields in MODELS.items():
        model = make(kind, **fields)
        generator = rewrite_for_generation(model, prompt_lengths=8, decode_lengths=(1, 4), **LENGTHS)
        found |= {f"{kind} {name}": seen(generator, name) for name in ("prefill[8]", "decode", "decode[4]")}
    whole = rewrite_for_generation(make("Llama"), **LENGTHS)
    return found | {"the prompt fills the cache": seen(whole, "prefill[16]")}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(main()))
