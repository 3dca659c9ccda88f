"""64 requests to SmolLM2-135M-Instruct, with its real weights, by continuous batching on the kernel of a paged cache.

Each request must get the text that it gets alone. Needs transformers >= 5. Run by `make example`, or with its packages
installed: python examples/serve_smollm2.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from smollm2 import load
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from neuron_attn_rewrite import RewriteConfig, register_with_transformers

TEXT = Path(__file__).parents[1] / "LICENSE"
REQUESTS = 64
LENGTHS = (8, 48)
"""Tokens of the shortest prompt and of the longest one."""
NEW_TOKENS = 8
PAGE = 32
"""Tokens in a block of the cache."""
BATCH_TOKENS = 512
"""The most tokens in one step: new tokens of some requests, prompts of others."""

console = Console(highlight=False)


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Parts of the licence, of mixed length."""
    tokens = tokenizer(TEXT.read_text(encoding="utf-8")).input_ids
    shortest, longest = LENGTHS
    lengths = [shortest + 37 * i % (longest - shortest + 1) for i in range(REQUESTS)]
    return [tokens[29 * i : 29 * i + length] for i, length in enumerate(lengths)]


def one_by_one(
    model: PreTrainedModel, requests: list[list[int]], settings: GenerationConfig, progress: Progress
) -> list[list[int]]:
    """The new tokens of each request, alone: `generate` with the attention of transformers."""
    found = []
    for prompt in progress.track(requests, description="alone, one after the other"):
        ids = transformers.BatchEncoding({"input_ids": [prompt]}, tensor_type="pt").input_ids
        found.append(model.generate(ids, generation_config=settings)[0, len(prompt) :].tolist())
    return found


def batched(
    model: PreTrainedModel, requests: list[list[int]], settings: GenerationConfig, progress: Progress
) -> list[list[int]]:
    """The new tokens of each request, by continuous batching."""
    blocks = sum(-(-(len(prompt) + NEW_TOKENS) // PAGE) for prompt in requests)
    sizes = ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=BATCH_TOKENS)
    task, found = progress.add_task("batched", total=len(requests)), {}
    with model.continuous_batching_context_manager(settings, continuous_batching_config=sizes) as manager:
        names = manager.add_requests(requests, max_new_tokens=NEW_TOKENS)
        while len(found) < len(requests) and (manager.is_running() or not manager.output_router.output_queue.empty()):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
                progress.advance(task)
    return [found.get(name, []) for name in names]


def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    console.print("Loading SmolLM2-135M-Instruct")
    model, tokenizer = load()
    model.config.use_cache = True
    requests = prompts(tokenizer)
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    registration = register_with_transformers(RewriteConfig(target="trn2"))

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    tokens, seconds = {}, {}
    with Progress(*columns, console=console) as progress:
        for way, implementation, run in (
            ("alone", "sdpa", one_by_one),
            ("batched on flash_paged", "neuron_nki", batched),
        ):
            model.set_attn_implementation(implementation)
            start = time.perf_counter()
            tokens[way] = run(model, requests, settings, progress)
            seconds[way] = time.perf_counter() - start

    report = registration.report
    console.print(str(report), markup=False, soft_wrap=True)
    for way, found in tokens.items():
        count = sum(map(len, found))
        rate = f"{count / seconds[way]:.1f} tokens per second"
        console.print(f"{way + ':':24}{count} tokens in {seconds[way]:.1f} s, {rate}")
    alone, together = ([tokenizer.decode(t) for t in found] for found in tokens.values())
    console.print(f"\n{tokenizer.decode(requests[1])!r}\n-> {together[1]!r}\n", markup=False, soft_wrap=True)
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    checks = {
        f"{same} of {REQUESTS} requests get the text that they get alone": same == REQUESTS,
        "30 of 30 layers read the cache in place": len(report.replaced) == len(report.sites) == 30,
    }
    for claim, holds in checks.items():
        console.print(f"[green]ok[/]      {claim}" if holds else f"[bold red]WRONG[/]   {claim}", soft_wrap=True)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
