"""Every model of transformers that generates text, tiny: are the tokens those of `model.generate`?

python -m benchmarks.generation                      run what has no result yet, then print the table
python -m benchmarks.generation --sample             a fixed sample; fails where a promise is broken
python -m benchmarks.generation --only llama t5      these, again
python -m benchmarks.generation --left               those that do not give equal tokens, again
python -m benchmarks.generation --known --write      no run: the table of what is known, into docs/generation.md

Each model generates 8 tokens after a prompt of 12, greedily: without padding, and with padding on the left of one row.
The prompt of a model with an encoder is what the encoder reads, so it is padded on the right too, and beams repeat it.
Results go to .generation/, one line of JSON for each model, so that a run can be resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.pages import write_table
from benchmarks.zoo import tiny
from neuron_attn_rewrite import RewriteConfig, rewrite_for_generation

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "generation.md"
RESULTS = ROOT / ".generation" / f"{tiny.version().replace(', ', '-').replace(' ', '-')}.jsonl"

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
}
SAMPLE = """
    bart bloom codegen cohere2 deepseek_v3 falcon gemma2 gpt2 gpt_neox gptj llama mamba mistral mpt olmo2 opt phi phi3
    qwen2 qwen3 seq2seq:bart seq2seq:t5 stablelm starcoder2
""".split()
if transformers.__version__.startswith("4."):
    SAMPLE.remove("deepseek_v3")  # its experts branch on values there
PROMISED_REPLACED = 0.97
"""Least share of the attentions of models with equal tokens."""

PROMPT, NEW, BATCH, MAX_LENGTH, PROMPT_GRAPH, BEAMS = 12, 8, 2, 32, 16, 2
SECONDS, MEMORY = 300, 5 * 2**30
"""The limits of one model."""

Line = dict[str, Any]


def names() -> list[str]:
    """All models: the type of a causal one, and `seq2seq:` with the type of one with an encoder."""
    return [
        name if task == "causal" else f"{task}:{name}"
        for task, mapping in TASKS.items()
        for name in sorted(CONFIG_MAPPING)
        if CONFIG_MAPPING[name] in mapping
    ]


def built(name: str) -> Any:
    """A tiny model that generates.

    Raises:
        NotBuilt: none was found.
    """
    task, _, kind = name.rpartition(":")
    # Models that are encoders too cache nothing unless they are told to be decoders.
    fields = {} if task else {"is_decoder": True}
    why = ""
    for rung in tiny.RUNGS:
        try:
            model: Any = tiny.build(kind, tiny.supports(kind)[0], *rung, TASKS[task or "causal"], fields)
            settings = model.generation_config
            settings.update(eos_token_id=None, pad_token_id=0, forced_eos_token_id=None, forced_bos_token_id=None)
            if model.config.is_encoder_decoder and settings.decoder_start_token_id is None:
                settings.update(decoder_start_token_id=1)
            generate(model, torch.ones(BATCH, PROMPT, dtype=torch.int64))
        except Exception as error:
            why = why or f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        else:
            return model
    raise tiny.NotBuilt(why)


def generate(model: Any, mask: Tensor, beams: int = 1) -> Tensor:
    """Tokens after a random prompt, of a greedy search or of one with beams."""
    tokens = torch.randint(3, 200, mask.shape, generator=torch.Generator().manual_seed(1))
    result: Tensor = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        num_beams=beams,
        use_cache=True,
    )
    return result


def examine(name: str) -> Line:
    """One line of the results."""
    try:
        model = built(name)
    except tiny.NotBuilt as error:
        return {"not built": str(error)}
    start = time.process_time()
    encodes = bool(model.config.is_encoder_decoder)
    sizes = {
        "encoder_lengths" if encodes else "prompt_lengths": PROMPT_GRAPH,
        "batch_size": BATCH * (BEAMS if encodes else 1),
    }
    try:
        generator = rewrite_for_generation(model, max_length=MAX_LENGTH, config=RewriteConfig(policy="always"), **sizes)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    seconds = time.process_time() - start
    full = torch.ones(BATCH, PROMPT, dtype=torch.int64)
    left = full.clone()
    left[1, :5] = 0
    cases = {"none": (full, 1), "left": (left, 1)}
    if encodes:
        cases |= {"right": (left.flip(1), 1), "right, with beams": (left.flip(1), BEAMS)}
    sites = [
        site
        for report in generator.reports.values()
        for site in report.sites
        if "one-key" not in {str(reason.code) for reason in site.reasons}  # its weight is 1: there is no attention
    ]
    try:
        equal = {
            padding: torch.equal(generate(model, *how), generate(generator, *how)) for padding, how in cases.items()
        }
    except Exception as error:
        return {"error": f"generate: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {
        "equal": equal,
        "attentions": len(sites),
        "replaced": sum(site.is_replaced for site in sites),
        "kept": sorted({str(reason.code) for s in sites if not s.is_replaced for reason in s.reasons[:1]}),
        "seconds": round(seconds, 1),
    }


def _child(name: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    try:
        pipe.send(examine(name))
    except Exception as error:  # while tokens are generated
        pipe.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def examine_apart(name: str) -> Line:
    """`examine` in a process of its own, with limits of time and memory."""
    here, there = Pipe(duplex=False)
    process = get_context("fork").Process(target=_child, args=(name, there), daemon=True)
    process.start()
    there.close()
    try:
        line: Line = here.recv() if here.poll(SECONDS) else {"error": f"more than {SECONDS} s"}
    except EOFError:
        line = {"error": f"the process died (limit {MEMORY // 2**30} GB)"}
    process.kill()
    process.join()
    return {"model": name, **line}


def load() -> dict[str, Line]:
    """The last result of each model."""
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {line["model"]: line for line in lines}


def measure(chosen: Sequence[str], jobs: int) -> dict[str, Line]:
    """Examine these, in mixed order, and keep what it gives."""
    RESULTS.parent.mkdir(exist_ok=True)
    mixed = random.Random(0).sample(list(chosen), len(chosen))
    done = {}
    with RESULTS.open("a") as file, ThreadPoolExecutor(jobs) as pool:
        for line in track(pool.map(examine_apart, mixed), "generation", len(mixed)):
            file.write(json.dumps(line) + "\n")
            file.flush()
            done[line["model"]] = line
    return done


def is_equal(line: Line) -> bool:
    """Whether all tokens are those of the model."""
    return "equal" in line and all(line["equal"].values())


def verdict(line: Line) -> str:
    """What is not as it should be, in words."""
    for key in ("not built", "error"):
        if key in line:
            return re.sub(r"'/\S*", "'...", f"{key}: {line[key]}").replace("|", "\\|")
    wrong = [padding for padding, equal in line["equal"].items() if not equal]
    if wrong:
        return f"WRONG tokens with padding {', '.join(wrong)}"
    kept = line["attentions"] - line["replaced"]
    return f"{kept} of {line['attentions']} attentions kept: {', '.join(line['kept'])}" if kept else ""


def counts(lines: Sequence[Line]) -> dict[str, int]:
    """Over models of one task."""
    equal = [line for line in lines if is_equal(line)]
    return {
        "models": len(lines),
        "built": sum("not built" not in line for line in lines),
        "equal tokens": len(equal),
        "an error of ours": sum("error" in line for line in lines),
        "wrong tokens": sum("equal" in line and not is_equal(line) for line in lines),
        "attentions": sum(line["attentions"] for line in equal),
        "... replaced": sum(line["replaced"] for line in equal),
    }


def table(lines: Sequence[Line]) -> str:
    """The summary, and a line for each model at which something is left."""
    by_task = {
        task: counts([line for line in lines if (line["model"].rpartition(":")[0] or "causal") == task])
        for task in TASKS
    }
    rows = [f"| {what} | {' | '.join(str(n[what]) for n in by_task.values())} |" for what in counts([])]
    seconds = sorted(line["seconds"] for line in lines if "seconds" in line) or [0.0]
    left = [f"| {line['model']} | {said} |" for line in lines if (said := verdict(line))]
    return "\n".join(
        [
            f"**{tiny.version()}**\n",
            f"| | {' | '.join(by_task)} |\n|---|{'---|' * len(by_task)}",
            *rows,
            f"\nSeconds to make a generator (processor time): median {seconds[len(seconds) // 2]:.0f}, "
            f"largest {seconds[-1]:.0f}.",
            "\n| model | what is left |\n|---|---|",
            *left,
            "",
        ]
    )


def broken(lines: Sequence[Line]) -> list[str]:
    """The promises that these results break, in words."""
    n: Mapping[str, int] = sum((Counter(counts([line])) for line in lines), Counter())
    said = [f"{line['model']}: {verdict(line)}" for line in lines if not is_equal(line)]
    if n["... replaced"] < PROMISED_REPLACED * n["attentions"]:
        said.append(f"{n['... replaced']} of {n['attentions']} attentions replaced, promised {PROMISED_REPLACED:.0%}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="a fixed sample, checked against what is promised")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models, again")
    parser.add_argument("--left", action="store_true", help="those that do not give equal tokens, again")
    parser.add_argument("--known", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--write", action="store_true", help="write docs/generation.md")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    chosen = given.only or (SAMPLE if given.sample else names())
    known = {} if given.only or given.sample else load()
    if given.left:
        known = {name: line for name, line in known.items() if is_equal(line) or "not built" in line}
    todo = [] if given.known else [name for name in chosen if name not in known]
    results = {**known, **measure(todo, given.jobs)}
    lines = [line for name, line in sorted(results.items()) if name in chosen]
    print(table(lines))
    if given.write:
        write_table(DOCS, "generation", table(lines))
    if given.sample and (said := broken(lines)):
        sys.exit("broken: " + "; ".join(said))


if __name__ == "__main__":
    main()
