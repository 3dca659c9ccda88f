"""SmolLM2-135M-Instruct with its real weights generates from rewritten graphs: the same tokens, and more a second.

With the packages of `make example` installed: python examples/smollm2_generate.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from smollm2 import load
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from neuron_attn_rewrite import FlashAttentionStrategy, RewriteConfig, rewrite_for_generation

TEXT = Path(__file__).parents[1] / "LICENSE"
PROMPTS = (16, 100, 400, 1024)
NEW_TOKENS = 64
LENGTH = PROMPTS[-1] + NEW_TOKENS
EXPORTED_TOKENS = 16
"""As many new tokens are enough to measure the slowest way."""

console = Console(highlight=False)


def prompts(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """One batch of prompts of different lengths, padded on the left, and its mask."""
    text = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    tokens = torch.stack([torch.nn.functional.pad(text[:n], (PROMPTS[-1] - n, 0)) for n in PROMPTS])
    return tokens, (torch.arange(PROMPTS[-1]) >= PROMPTS[-1] - torch.tensor(PROMPTS)[:, None]).long()


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each new token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with the next token of each sequence."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""

    def tokens_per_second(self, sequences: int) -> float:
        """Of all sequences together, from the first new token to the last."""
        first, *later = self.times[1:]
        return sequences * len(later) / (later[-1] - first)


def generate(model: Any, inputs: tuple[Tensor, Tensor], count: int, **options: Any) -> tuple[Tensor, float]:
    """The new tokens, and how many come a second."""
    tokens, mask = inputs
    clock = Clock()
    options |= {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "streamer": clock}
    found = model.generate(tokens, attention_mask=mask, **options)
    return found[:, tokens.shape[1] :], clock.tokens_per_second(len(tokens))


def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    console.print("Loading SmolLM2-135M-Instruct")
    model, tokenizer = load()
    model.config.use_cache = model.generation_config.use_cache = True
    inputs = prompts(tokenizer)

    # Nothing is compared while the graphs are made: the tokens are, below.
    sizes: dict[str, Any] = {"max_length": LENGTH, "batch_size": len(PROMPTS), "verify": False}
    with console.status("Rewriting: one graph for the prompts, one for each step"):
        generator = rewrite_for_generation(model, config=RewriteConfig(policy="always", verify=False), **sizes)
    with console.status("Exporting the step alone"):
        kept = RewriteConfig(strategy=FlashAttentionStrategy.NONE, verify=False)
        exported = rewrite_for_generation(model, config=kept, prompt_lengths=1, **sizes).graphs["decode"]
    reports = generator.reports
    for name, report in reports.items():
        console.print(f"{name}: {len(report.replaced)} of {len(report.sites)} attentions replaced", markup=False)

    with console.status(f"Generating {NEW_TOKENS} tokens for each of {len(PROMPTS)} prompts: the model"):
        static = {"cache_implementation": "static", "disable_compile": True}
        wanted, eager = generate(model, inputs, NEW_TOKENS, **static)
    with console.status("The rewritten graphs"):
        found, rewritten = generate(generator, inputs, NEW_TOKENS)
    with console.status("The exported graph"):
        generator.graphs["decode"] = exported
        again, alone = generate(generator, inputs, EXPORTED_TOKENS)

    for row, length in enumerate(PROMPTS):
        console.print(f"{length:5} tokens, then {tokenizer.decode(found[row])!r}", markup=False, soft_wrap=True)
    console.print("\nTokens a second while decoding, all sequences together:")
    for name, rate in (("rewritten", rewritten), ("eager, static cache", eager), ("torch.export alone", alone)):
        console.print(f"{rate:8.1f}  {name:20} rewritten is {rewritten / rate:.2f} times as fast", markup=False)
    checks = {
        "all attentions are replaced": all(len(r.replaced) == len(r.sites) == 30 for r in reports.values()),
        f"all {found.numel()} tokens are those of model.generate": torch.equal(found, wanted),
        "the exported graph gives them too": torch.equal(again, wanted[:, :EXPORTED_TOKENS]),
    }
    for claim, holds in checks.items():
        console.print(f"[green]ok[/]      {claim}" if holds else f"[bold red]WRONG[/]   {claim}", soft_wrap=True)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
