"""Random programs, rewritten on benign inputs and compared with themselves on hostile ones.

    python -m benchmarks.fuzz --programs 300              a third of each kind
    python -m benchmarks.fuzz --seconds 600 --kind graphs
    python -m benchmarks.fuzz --kind memory --seed 7 --only   shows one program

`plain` programs are attentions drawn from a grammar. `memory` puts copies, views and writes through views into them.
`graphs` are real models with such steps, casts and folds near their attentions. Programs are rewritten without
verification, on inputs in which every mask is all ones and every position in order. The command fails if one of them
gives other numbers, or an error that is not its own.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from multiprocessing import get_context

from benchmarks.fuzz.kinds import KINDS, attack


def main() -> int:
    """Run seeds until their number or the time is reached, and list those that fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all in turn")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--programs", type=int, help="how many seeds, over all kinds")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", action="store_true", help="show the one program of the seed")
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    if options.only:
        found = KINDS[kinds[0]](options.seed)
        print(*found.words, found.rewritten and found.rewritten.report, found.wrong, sep="\n")
        return int(found.wrong is not None)
    if options.programs is None and options.seconds == float("inf"):
        parser.error("say how long: --programs or --seconds")
    every = ((kind, seed) for seed in itertools.count(options.seed) for kind in kinds)
    seeds, end = itertools.islice(every, options.programs), time.monotonic() + options.seconds
    seen, failed = {kind: Counter[str]() for kind in kinds}, 0
    with get_context("spawn").Pool(options.jobs) as pool:
        while time.monotonic() < end and (some := list(itertools.islice(seeds, 10 * options.jobs))):
            for kind, seed, ended, wrong, words in pool.starmap(attack, some, chunksize=1):
                seen[kind][ended] += 1
                if wrong:
                    failed += 1
                    print(f"{kind} {seed}: {wrong[:300]}\n    {'; '.join(words)}", flush=True)
    for kind, counts in seen.items():
        print(f"{kind}: {counts.total()} programs, {', '.join(f'{n} {what}' for what, n in counts.most_common())}")
    print(f"{failed} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
