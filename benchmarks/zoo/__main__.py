"""Every base model of the installed transformers, tiny: attentions counted, found, proven, replaced, and the error.

python -m benchmarks.zoo                      run what has no result yet, then print the table
python -m benchmarks.zoo --sample             a fixed sample of architectures; fails where a promise is broken
python -m benchmarks.zoo --only llama t5      these, again
python -m benchmarks.zoo --left               those at which something is left, again
python -m benchmarks.zoo --known --write      no run: the table of what is known, into docs/coverage.md

Results go to .zoo/, one line of JSON for each architecture and implementation, so that a run can be resumed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import track

from benchmarks.pages import write_table
from benchmarks.zoo import tiny
from benchmarks.zoo.examine import examine_apart
from benchmarks.zoo.table import Line, shares, summary, table, verdict

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs" / "coverage.md"
RESULTS = ROOT / ".zoo" / f"{tiny.version().replace(', ', '-').replace(' ', '-')}.jsonl"

SAMPLE = """
    albert bart bert bloom clip deberta-v2 distilbert falcon gemma2 gpt2 gpt_neox gptj llama mistral modernbert mpnet
    mpt opt phi qwen3 swin t5 vit whisper
""".split()
PROMISED = {"explained": 1.0, "found": 0.99, "replaced": 0.98}
"""Least share of the attentions counted, those listed apart not among them."""

Results = dict[tuple[str, str], Line]


def load() -> Results:
    """The last result of each architecture and implementation."""
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {(line["model"], line["attention"]): line for line in lines}


def measure(names: Sequence[str], known: Results, jobs: int, quick: bool) -> Results:
    """Examine what is not known of these, in mixed order, and keep what it gives."""
    RESULTS.parent.mkdir(exist_ok=True)
    done: Results = {}
    mixed = random.Random(0).sample(list(names), len(names))
    having = {name: frozenset(how for model, how in known if model == name) for name in mixed}
    with RESULTS.open("a") as file, ThreadPoolExecutor(jobs) as pool:
        for lines in track(
            pool.map(lambda name: examine_apart(name, having[name], quick), mixed), "the zoo", len(mixed)
        ):
            for line in lines:
                file.write(json.dumps(line) + "\n")
                file.flush()
                done[line["model"], line["attention"]] = line
    return done


def something_left(line: Line) -> bool:
    return "failed" in line or any("failed" in c or verdict(c) for c in line["captures"].values())


def broken(lines: list[Line]) -> list[str]:
    """The promises that these results break, in words."""
    n = shares(lines)
    least = {name: share * (n["counted"] - n["apart"]) for name, share in PROMISED.items()}
    said = [f"{name}: {n[name]:.0f}, promised {least[name]:.1f}" for name in PROMISED if n[name] < least[name]]
    said += [f"{n['wrong']:.0f} wrong outputs"] * bool(n["wrong"])
    return said + [f"{line['model']} {line['attention']}: {line['failed']}" for line in lines if "failed" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="a fixed sample, checked against what is promised")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these architectures, again")
    parser.add_argument("--left", action="store_true", help="those at which something is left, again")
    parser.add_argument("--known", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="capture without a mask only where a model takes none")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md")
    given = parser.parse_args()
    everything = tiny.architectures()
    chosen = given.only or (SAMPLE if given.sample else sorted(everything))
    names = [name for name in chosen if name in everything]
    known: Results = {} if given.only or given.sample else load()
    if given.left:
        known = {pair: line for pair, line in known.items() if not something_left(line)}
    results = {**known, **measure([] if given.known else names, known, given.jobs, given.quick)}
    lines = [line for (name, _), line in sorted(results.items()) if name in names]
    print(table(lines))
    if given.write:
        write_table(DOCS, "zoo", table(lines))
    if given.sample and (said := broken(lines)):
        sys.exit(f"{summary(lines)}\n\nbroken: {'; '.join(said)}")


if __name__ == "__main__":
    main()
