"""What is chosen for the attention of real models: kernels, clauses, costs, and what NxD Inference would do.

python -m benchmarks.strategies [--write]    --write makes docs/strategies.md
"""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.masks.spec import Band, Chunked, Claim, EmptyRows, KeyPadding, Limited, MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy import cost
from neuron_attn_rewrite.strategy.choose import NATIVE, by_table, candidates, choose_among, fastest, notes, time_of
from neuron_attn_rewrite.strategy.legality import OURS

DOCS = Path(__file__).parents[1] / "docs" / "strategies.md"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
PLACES = (("trn1", 1), ("trn2", 1), ("trn2", 2), ("trn3", 1), ("trn3", 2))
KERNELS = {
    "trn1": ("2.28", (OURS, "attention_isa_kernel", "neuronxcc_flash_fwd", "sliding_window_flash_fwd")),
    "trn2": ("2.32", (OURS, "attention_cte", "attention_segmented_cte", "attention_tkg")),
    "trn3": ("2.32", (OURS, "attention_cte", "attention_segmented_cte", "attention_tkg")),
}
"""The newest SDK for each target, and the kernels that are assumed to be installed."""
CACHED = {"attention_tkg": (1,), "attention_segmented_cte": (512,)}
"""Kernels that are asked for these numbers of new tokens alone: for keys of a cache."""
SHOWN = (("trn2", 2), (1024, 4096, 16384))
"""Where and at which lengths the table at the top shows the choice."""


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
    chunk: int | None = None
    """Each token sees its own chunk alone."""
    batch: int = 1
    rows: int | None = None
    """New tokens, the last of the keys; None for as many as there are keys."""
    static_cache: bool = False
    """Keys lie in a buffer of fixed length, and how many are there is known at run time."""

    def problem(self, length: int) -> AttentionProblem:
        """The attention over `length` keys."""
        rows = self.rows or length
        earlier = length - rows
        claims: tuple[Claim, ...] = (Band(upper=earlier),) if self.causal and rows > 1 else ()
        if self.window is not None and self.both_sides:
            claims = (Band(-(self.window // 2), self.window // 2),)
        elif self.window is not None:
            claims = (Band(earlier + 1 - self.window, earlier),)
        claims += (Chunked(self.chunk),) if self.chunk and self.chunk < length else ()
        claims += (KeyPadding("attention_mask"),) if self.padded else ()
        claims += (Limited("key <= cache_position[query]"),) if self.static_cache else ()
        return AttentionProblem(
            batch=self.batch,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            q_len=rows,
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

    def forms(self, length: int) -> tuple[AttentionProblem, ...]:
        """The attention, then with its chunks as elements of the batch where they fill it, as `forms.in_chunks`."""
        found, size = self.problem(length), self.chunk
        if not size or length % size or length == size:
            return (found,)
        mask = MaskSpec(tuple(claim for claim in found.mask.claims if not isinstance(claim, Chunked)))
        return found, replace(found, batch=found.batch * (length // size), q_len=size, kv_len=size, mask=mask)


MODELS = (
    Model("Llama 3 8B, TP 8", 4, 1, 128),
    Model("Llama 3 8B, TP 32", 1, 1, 128),
    Model("Llama 3 70B, TP 8", 8, 1, 128),
    Model("Llama 3 70B, TP 32", 2, 1, 128),
    Model("Qwen 3 0.6B", 16, 8, 128),
    Model("Qwen 3 8B, TP 8", 4, 1, 128),
    Model("Qwen 3 32B, TP 8", 8, 1, 128),
    Model("Llama 4 Scout, chunked layers, TP 8", 5, 1, 128, chunk=8192),
    Model("Llama 4 Scout, full layers, TP 8", 5, 1, 128),
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
    Model("Llama 3 8B, TP 8, 512 new tokens behind a cache", 4, 1, 128, rows=512),
    Model("Llama 3 8B, TP 8, 512 new tokens in a static cache", 4, 1, 128, rows=512, static_cache=True),
    Model("Llama 3 8B, TP 8, decode", 4, 1, 128, rows=1),
    Model("Llama 3 8B, TP 8, decode of 32 requests in a static cache", 4, 1, 128, rows=1, batch=32, static_cache=True),
    Model("GPT-OSS 20B, window layers, TP 8, decode", 8, 1, 64, window=128, sink=True, rows=1),
)
"""Heads are those of one rank. Key padding is taken as of batches whose padding rows do not matter."""

SHORT = {
    "flash_fwd": "ours",
    "attention_cte": "cte",
    "attention_segmented_cte": "segmented",
    "attention_tkg": "tkg",
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
    sdk, known = KERNELS[target]
    kernels = tuple(name for name in known if model.rows in CACHED.get(name, (model.rows,)))
    config = RewriteConfig(target=target, lnc=cores, sdk=sdk, kernels=kernels)
    forms = model.forms(length)
    i, decision = choose_among(forms, config)
    problem = forms[i]
    able, refused = candidates(problem, config)
    strategy, _ = by_table(forms[0], config)
    wrong = notes(forms[0], config) if strategy is not FlashAttentionStrategy.NONE else ()
    words = SHORT[decision.kernel]
    clauses = list(refused.values()) if decision.kernel == OURS or not able else []
    if able:
        best = fastest(able, problem, config)
        kernel, native = time_of(best, problem, config), time_of(NATIVE, forms[0], config)
        words += f" {native.micros / kernel.micros:.2g}{' folded' if i else ''}"
        if decision.kernel == NATIVE:
            clauses = [f"{SHORT[best]} would not pay: {kernel.because}"]
    text = re.sub(r"\d+ tiles", "the tiles", _of_any_length("; ".join(clauses), model, length))
    theirs = tuple(note.rpartition(" (")[0] for note in wrong)
    return Cell(f"{words} / {LETTERS[strategy.name]}", text, theirs)


def _of_any_length(words: str, model: Model, length: int) -> str:
    """With n for the length, and the earlier keys unnumbered."""
    lengths = "kv_len" if model.rows else "q_len|kv_len"
    words = re.sub(rf"\b({lengths}) {length}\b", r"\1 n", words)
    words = re.sub(rf"(?<=, ){length}(?=[,)])", "n", words)
    return re.sub(r"offset=[1-9]\d*", "offset=earlier keys", words) if model.rows else words


def page() -> str:
    """docs/strategies.md."""
    newest = [f"* {target}: SDK {sdk} with {', '.join(kernels)}" for target, (sdk, kernels) in KERNELS.items()]
    lines = [
        "# What is chosen for real models",
        "",
        "Made by `python -m benchmarks.strategies --write`, in bfloat16, with batch 1, the default policy, and",
        "these kernels installed (inf2 is as trn1):",
        "",
        *newest,
        "",
        "A cell has three parts: the kernel that is chosen; how many times faster than the native operators the",
        "fastest possible kernel is predicted to be; and the row of NxD Inference's rule table for that SDK. There,",
        "S is SHARDED_KERNEL, U is UNSHARDED_KERNEL, W is SLIDING_WINDOW_KERNEL, and - is NONE.",
        "",
        "`ours` is flash_fwd, `cte` attention_cte, `segmented` attention_segmented_cte, `tkg` attention_tkg (both",
        "only with a cache), `isa` attention_isa_kernel, `flash` neuronxcc_flash_fwd, `window`",
        "sliding_window_flash_fwd. `folded` means that chunks become elements of the batch. Lengths are of the",
        "keys. Below each table are the clauses behind the choices (n is the length), and what NxD Inference's",
        "kernel would get wrong or raise where its table takes it.",
        "",
        "The speeds come from a model that is fitted on published numbers. They are uncertain by a factor of",
        f"{spread(False):.1f}, beyond {cost.LONG} keys of {spread(True):.1f}, and more for kernels and targets",
        "without published numbers ([The cost model](cost_model.md)). This project has measured none of them.",
        "Factors on the query, such as the temperature of Llama 4's full layers, change no choice.",
        "",
        *_index(),
    ]
    for model in MODELS:
        lines += ["", *_section(model)]
    return "\n".join(lines) + "\n"


def spread(long: bool) -> float:
    """The factor by which a ratio of trn2 and attention_cte may be off."""
    c = cost.fit()
    return math.exp(math.hypot(math.log(c.kernel_spread), math.log(c.long_spread if long else c.native_spread)))


def _index() -> list[str]:
    """What is chosen for each model at a few lengths, with a link to the rest."""
    (target, cores), lengths = SHOWN
    lines = [f"| {target}, {cores} | {' | '.join(map(str, lengths))} |", "| --- " * (1 + len(lengths)) + "|"]
    for model in MODELS:
        shown = lengths if model.fixed is None else (model.fixed,)
        cells = [cell(model, length, target, cores).words.partition(" /")[0] for length in shown]
        cells = cells if model.fixed is None else [f"{cells[0]} (at {model.fixed})", *[""] * (len(lengths) - 1)]
        anchor = re.sub(r"[^\w\- ]", "", model.name.lower()).replace(" ", "-")
        lines.append(f"| [{model.name}](#{anchor}) | {' | '.join(cells)} |")
    return lines


def _section(model: Model) -> list[str]:
    p = model.problem(LENGTHS[-1] if model.rows or model.chunk else 512)
    extras = [f"softcap {p.softcap:g}"] if p.softcap else []
    extras += [word for word, there in (("sink", p.sink), ("bias", p.bias_shape)) if there]
    dims = f"{p.head_dim}" if p.head_dim == p.v_head_dim else f"{p.head_dim} / {p.v_head_dim}"
    lengths = LENGTHS if model.fixed is None else (model.fixed,)
    lines = [f"## {model.name}", ""]
    mask = _of_any_length(str(p.mask), model, LENGTHS[-1])
    lines += [f"{p.num_heads} / {p.num_kv_heads} heads of {dims}; mask {', '.join([mask, *extras])}.", ""]
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
