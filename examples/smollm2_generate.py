"""SmolLM2-135M-Instruct with its real weights generates from rewritten graphs: the same tokens, and more a second.

Run by `make example`, or with its packages installed: python examples/smollm2_generate.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
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
MORE_TOKENS = 16
"""As many new tokens are enough to measure the exported graph, which goes on where the rewritten one ends."""
TOKENS = NEW_TOKENS + MORE_TOKENS
LENGTH = PROMPTS[-1] + TOKENS

console = Console(highlight=False)


def prompts(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """One batch of prompts of different lengths, padded on the left, and its mask."""
    text = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    tokens = torch.stack([torch.nn.functional.pad(text[:n], (PROMPTS[-1] - n, 0)) for n in PROMPTS])
    return tokens, (torch.arange(PROMPTS[-1]) >= PROMPTS[-1] - torch.tensor(PROMPTS)[:, None]).long()


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each new token comes."""

    def __init__(self, after: Callable[[], None]) -> None:
        """After `NEW_TOKENS` new tokens, `after` is called."""
        self.times: list[float] = []
        self.after = after

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with the next token of each sequence."""
        self.times.append(time.perf_counter())
        if len(self.times) == 1 + NEW_TOKENS:
            self.after()

    def end(self) -> None:
        """Called at the end."""

    def rates(self) -> tuple[float, float]:
        """Tokens a second of all sequences together: from the first new token to the last of `NEW_TOKENS`, and then."""
        times, last = self.times[1:], NEW_TOKENS - 1
        parts = times[0 : last + 1], times[last:]
        first, then = (len(PROMPTS) * (len(part) - 1) / (part[-1] - part[0]) for part in parts)
        return first, then


def generate(
    model: Any, inputs: tuple[Tensor, Tensor], after: Callable[[], None] = lambda: None, **options: Any
) -> tuple[Tensor, tuple[float, float]]:
    """The new tokens, and how many come a second."""
    tokens, mask = inputs
    clock = Clock(after)
    options |= {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "streamer": clock}
    found = model.generate(tokens, attention_mask=mask, **options)
    return found[:, tokens.shape[1] :], clock.rates()


def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    console.print("Loading SmolLM2-135M-Instruct")
    model, tokenizer = load()
    model.config.use_cache = model.generation_config.use_cache = True
    inputs = prompts(tokenizer)

    # Nothing is compared while the graphs are made: the tokens are, below.
    sizes: dict[str, Any] = {"max_length": LENGTH, "batch_size": len(PROMPTS), "verify": False}
    with console.status("Rewriting: one graph for the prompts, one for each step"):
        config = RewriteConfig(policy="always", verify=False)
        generator = rewrite_for_generation(model, config=config, **sizes)
    with console.status("Exporting the step alone"):
        kept = RewriteConfig(strategy=FlashAttentionStrategy.NONE, verify=False)
        exported = rewrite_for_generation(model, config=kept, prompt_lengths=1, **sizes).graphs["decode"]
    reports = generator.reports
    for name, report in reports.items():
        console.print(f"{name}: {len(report.replaced)} of {len(report.sites)} attentions replaced", markup=False)

    with console.status(f"Generating {TOKENS} tokens for each of {len(PROMPTS)} prompts: the model"):
        wanted, (eager, _) = generate(model, inputs, cache_implementation="static", disable_compile=True)
    with console.status("The rewritten graphs, then the exported one"):
        found, (rewritten, alone) = generate(generator, inputs, lambda: generator.graphs.update(decode=exported))
    found, again = found.split((NEW_TOKENS, MORE_TOKENS), 1)

    for row, length in enumerate(PROMPTS):
        console.print(f"{length:5} tokens, then {tokenizer.decode(found[row])!r}", markup=False, soft_wrap=True)
    console.print("\nTokens a second while decoding, all sequences together:")
    for name, rate in (("rewritten", rewritten), ("eager, static cache", eager), ("torch.export alone", alone)):
        console.print(f"{rate:8.1f}  {name:20} rewritten is {rewritten / rate:.2f} times as fast", markup=False)
    checks = {
        "all attentions are replaced": all(len(r.replaced) == len(r.sites) == 30 for r in reports.values()),
        f"all {found.numel()} tokens are those of model.generate": torch.equal(found, wanted[:, :NEW_TOKENS]),
        f"the {again.numel()} tokens of the exported graph are too": torch.equal(again, wanted[:, NEW_TOKENS:]),
    }
    for claim, holds in checks.items():
        console.print(f"[green]ok[/]      {claim}" if holds else f"[bold red]WRONG[/]   {claim}", soft_wrap=True)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
