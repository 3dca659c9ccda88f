"""Lower rewritten models, and count what is in their HLO."""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from neuron_attn_rewrite import FlashAttentionStrategy, RewriteConfig, rewrite_for_trace, verify_trace
from neuron_attn_rewrite.backends.trace import lowered_hlo, score_buffers
from tests.models import FAMILIES

MODELS = (("llama", "sdpa"), ("bert", "eager"), ("vit", "sdpa"), ("gpt2", "sdpa"))


def operators(hlo: str, name: str) -> int:
    return len(re.findall(rf"\}} {name}\(", hlo))


def look(name: str, implementation: str) -> dict[str, Any]:
    family = next(f for f in FAMILIES if f.name == name)
    model, call = family.build(implementation), family.call("none" if family.inputs == "image" else "right")
    inputs = tuple(call.values())
    model.requires_grad_(False)
    rewritten = rewrite_for_trace(model, call, RewriteConfig(policy="always", require="all"))
    kept = rewrite_for_trace(model, call, RewriteConfig(sites={"*": FlashAttentionStrategy.NONE}))
    before = rewritten(*inputs)
    check = verify_trace(rewritten, call, strict=False)
    old, new = lowered_hlo(kept, inputs), lowered_hlo(rewritten, inputs)
    again = rewritten(*inputs)
    sites = rewritten.report.sites
    return {
        "problems": list(check.problems),
        "kernels": check.kernels,
        "attentions": family.attentions,
        "max_error": check.max_error,
        "exponentials": operators(new, "exponential"),
        "dots": [operators(old, "dot"), operators(new, "dot")],
        "scores_before": score_buffers(old, sites[0]),
        "scores_after": score_buffers(new, sites[0]),
        "cpu_again": max(float((before[key] - again[key]).abs().max()) for key in before),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({f"{name} {how}": look(name, how) for name, how in MODELS}))
