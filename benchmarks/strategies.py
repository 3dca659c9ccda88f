"""What is chosen for the attention of real models: kernels, clauses, costs, and what NxD Inference would do.

python -m benchmarks.strategies [--write]    --write makes docs/strategies.md
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neuron_attn_rewrite.config import RewriteConfig
from neuron_attn_rewrite.masks.spec import Band, KeyPadding, MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem, EmptyRows
from neuron_attn_rewrite.strategy.choose import NATIVE, by_table, candidates, choose, fastest, notes, time_of
from neuron_attn_rewrite.strategy.legality import OURS
from neuron_attn_rewrite.strategy.strategies import FlashAttentionStrategy

DOCS = Path(__file__).parents[1] / "docs" / "strategies.md"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
PLACES = (("trn1", 1), ("trn2", 1), ("trn2", 2), ("trn3", 1), ("trn3", 2))
KERNELS = {
    "trn1": ("2.28", (OURS, "attention_isa_kernel", "neuronxcc_flash_fwd", "sliding_window_flash_fwd")),
    "trn2": ("2.32", (OURS, "attention_cte")),
    "trn3": ("2.32", (OURS, "attention_cte")),
}
"""The newest SDK for each target, and the kernels that are assumed to be installed."""
CAUSAL = Band(upper=0)


@dataclass(frozen=True)
class Model:
    """One kind of attention of a model, on one rank."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    causal: bool = True
    both_sides: bool = False
    padded: bool = False
    v_head_dim: int | None = None
    softcap: float | None = None
    sink: bool = False
    bias: bool = False
    scale: float | None = None
    fixed: int | None = None
    """The one length that the model has."""

    def problem(self, length: int) -> AttentionProblem:
        """The attention over `length` tokens."""
        claims: tuple[Band | KeyPadding, ...] = (CAUSAL,) if self.causal else ()
        if self.window is not None and self.both_sides:
            claims = (Band(-(self.window // 2), self.window // 2),)
        elif self.window is not None:
            claims = (Band(1 - self.window, 0),)
        if self.padded:
            claims = (*claims, KeyPadding("attention_mask"))
        return AttentionProblem(
            batch=1,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            q_len=length,
            kv_len=length,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim or self.head_dim,
            dtype=torch.bfloat16,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            mask=MaskSpec(claims),
            bias_shape=(1, self.num_heads, length, length) if self.bias else None,
            softcap=self.softcap,
            sink=self.sink,
            empty_rows=EmptyRows.ANY if self.padded else EmptyRows.NEVER,
        )


MODELS = (
    Model("Llama 3 8B, TP 8", 4, 1, 128),
    Model("Llama 3 8B, TP 32", 1, 1, 128),
    Model("Llama 3 70B, TP 8", 8, 1, 128),
    Model("Llama 3 70B, TP 32", 2, 1, 128),
    Model("Qwen 3 0.6B", 16, 8, 128),
    Model("Qwen 3 8B, TP 8", 4, 1, 128),
    Model("Qwen 3 32B, TP 8", 8, 1, 128),
    Model("Mistral 7B (window 4096), TP 8", 4, 1, 128, window=4096),
    Model("Gemma 2 9B, global layers, TP 8", 2, 1, 256, softcap=50.0, scale=256**-0.5),
    Model("Gemma 2 9B, window layers, TP 8", 2, 1, 256, window=4096, softcap=50.0, scale=256**-0.5),
    Model("Gemma 3 4B, global layers, TP 4", 2, 1, 256),
    Model("Gemma 3 4B, window layers, TP 4", 2, 1, 256, window=1024),
    Model("GPT-OSS 20B, full layers, TP 8", 8, 1, 64, sink=True),
    Model("GPT-OSS 20B, window layers, TP 8", 8, 1, 64, window=128, sink=True),
    Model("GPT-OSS 120B, full layers, TP 32", 2, 1, 64, sink=True),
    Model("GPT-OSS 120B, window layers, TP 32", 2, 1, 64, window=128, sink=True),
    Model("DeepSeek V3, TP 32", 4, 4, 192, v_head_dim=128),
    Model("ModernBERT base, global layers", 12, 12, 64, causal=False, padded=True),
    Model("ModernBERT base, local layers", 12, 12, 64, window=128, both_sides=True, padded=True),
    Model("ViT-L/16 at 224", 16, 16, 64, causal=False, fixed=197),
    Model("SigLIP so400m at 384", 16, 16, 72, causal=False, fixed=729),
    Model("Whisper large v3, encoder", 20, 20, 64, causal=False, fixed=1500),
    Model("T5 XXL, encoder, TP 8", 8, 8, 64, causal=False, padded=True, bias=True, scale=1.0),
    Model("BGE large, encoder", 16, 16, 64, causal=False, padded=True),
    Model("Flux, TP 8", 3, 3, 128, causal=False),
)
"""Heads are those of one rank. Key padding is taken as of batches whose padding rows do not matter."""

SHORT = {
    "flash_fwd": "ours",
    "attention_cte": "cte",
    "attention_isa_kernel": "isa",
    "neuronxcc_flash_fwd": "flash",
    "sliding_window_flash_fwd": "window",
    NATIVE: "native",
}
LETTERS = {"NONE": "-", "UNSHARDED_KERNEL": "U", "SHARDED_KERNEL": "S", "SLIDING_WINDOW_KERNEL": "W"}


@dataclass(frozen=True)
class Cell:
    """What is chosen at one length, and why."""

    words: str
    because: str
    """What speaks for the choice, in words: clauses, or what dominates the cost."""
    theirs: tuple[str, ...]
    """What NxD Inference's kernel would get wrong, where its table takes one."""


def cell(model: Model, length: int, target: str, cores: int) -> Cell:
    """The choice, the predicted speed against the native operators, and what NxD Inference would do."""
    sdk, kernels = KERNELS[target]
    config = RewriteConfig(target=target, lnc=cores, sdk=sdk, kernels=kernels)
    problem = model.problem(length)
    decision, (able, refused) = choose(problem, config), candidates(problem, config)
    strategy, _ = by_table(problem, config)
    wrong = notes(problem, config) if strategy is not FlashAttentionStrategy.NONE else ()
    words = SHORT[decision.kernel]
    clauses = list(refused.values()) if decision.kernel == OURS or not able else []
    if able:
        kernel, native = time_of(fastest(able, problem, config), problem, config), time_of(NATIVE, problem, config)
        words += f" {native.micros / kernel.micros:.2g}"
        if decision.kernel == NATIVE:
            clauses = [f"{SHORT[fastest(able, problem, config)]} would not pay: {kernel.because}"]
    text = re.sub(r"\d+ tiles", "the tiles", "; ".join(clauses)).replace(f" {length}", " n")
    theirs = tuple(note.rpartition(" (")[0] for note in wrong)
    return Cell(f"{words} / {LETTERS[strategy.name]}", text, theirs)


def page() -> str:
    """docs/strategies.md."""
    newest = [f"* {target}: SDK {sdk} with {', '.join(kernels)}" for target, (sdk, kernels) in KERNELS.items()]
    lines = [
        "# What is chosen for real models",
        "",
        "Made by `python -m benchmarks.strategies --write`, in bfloat16 and batch 1, with the default policy and these",
        "kernels installed (inf2 is as trn1):",
        "",
        *newest,
        "",
        "A cell says which kernel is chosen, how many times faster than the native operators the fastest kernel that",
        "can do it is predicted to be, and what NxD Inference's rule table for that SDK says: S is SHARDED_KERNEL, U",
        "is UNSHARDED_KERNEL, W is SLIDING_WINDOW_KERNEL, - is NONE. `ours` is flash_fwd, `cte` attention_cte, `isa`",
        "attention_isa_kernel, `flash` neuronxcc_flash_fwd, `window` sliding_window_flash_fwd. Below each table stand",
        "the clauses behind the choices (n is the number of tokens), and what NxD Inference's kernel would get wrong",
        "or raise where its table takes it.",
        "",
        "Speeds are a model's, fitted on published numbers, and from 4096 keys on uncertain by a factor of three",
        "([cost_model.md](cost_model.md)). None was measured by this project.",
    ]
    for model in MODELS:
        lines += ["", *_section(model)]
    return "\n".join(lines) + "\n"


def _section(model: Model) -> list[str]:
    p = model.problem(512)
    extras = [f"softcap {p.softcap:g}"] if p.softcap else []
    extras += [word for word, there in (("sink", p.sink), ("bias", p.bias_shape)) if there]
    dims = f"{p.head_dim}" if p.head_dim == p.v_head_dim else f"{p.head_dim} / {p.v_head_dim}"
    lengths = LENGTHS if model.fixed is None else (model.fixed,)
    lines = [f"## {model.name}", ""]
    lines += [f"{p.num_heads} / {p.num_kv_heads} heads of {dims}; mask {', '.join([str(p.mask), *extras])}.", ""]
    lines += [f"| target, LNC | {' | '.join(map(str, lengths))} |", "| --- " * (1 + len(lengths)) + "|"]
    everywhere = " ".join(map(str, lengths))
    because: dict[str, list[str]] = defaultdict(list)
    theirs: set[str] = set()
    for target, cores in PLACES:
        cells = [cell(model, length, target, cores) for length in lengths]
        lines.append(f"| {target}, {cores} | {' | '.join(c.words for c in cells)} |")
        theirs |= {words for c in cells for words in c.theirs}
        for length, c in zip(lengths, cells, strict=True):
            if c.because:
                because[c.because.replace(target, "this target")].append(f"{target} {cores} at {length}")
    if because or theirs:
        lines.append("")
    for words, places in because.items():
        where = "everywhere" if len(places) == len(PLACES) * len(lengths) else _joined(places)
        lines.append(f"* {where.replace(everywhere, 'all lengths')}: {words}")
    lines += [f"* NxD Inference: {words}" for words in sorted(theirs)]
    return lines


def _joined(places: list[str]) -> str:
    """Lengths of the same target and LNC together."""
    groups: dict[str, list[str]] = defaultdict(list)
    for place in places:
        where, _, length = place.partition(" at ")
        groups[where].append(length)
    return "; ".join(f"{where.replace(' ', ', ')} at {' '.join(lengths)}" for where, lengths in groups.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/strategies.md")
    text = page()
    if parser.parse_args(arguments).write:
        DOCS.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
