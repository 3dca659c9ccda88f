"""Old errors of the pass, put back on purpose: the fuzzer must find each.

    python -m benchmarks.fuzz.roots                      every root, with the programs of its kinds
    python -m benchmarks.fuzz.roots --only autocast      one of them
    python -m benchmarks.fuzz.roots --only autocast --programs 300 --seed 1000

A root is one function through which many rules pass, and what it was before it knew of dtypes, memory or change. While
it is broken, random programs are attacked until one is wrong. The command fails if none is for some root.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch

from benchmarks.fuzz.kinds import KINDS
from neuron_attn_rewrite.graph.memory import Memory, _may_alias
from neuron_attn_rewrite.masks.spec import EmptyRows

PACKAGE = "neuron_attn_rewrite"


@dataclass(frozen=True)
class Root:
    """A function or a method of the package, what is put in its place, and which programs notice."""

    where: str
    """Module and name, such as "graph.writes:Writes.mark"."""
    broken: Callable[[Any], Any]
    """Gives the wrong function for the right one."""
    kinds: tuple[str, ...] = ("graphs",)
    first: int = 0
    """Where the search starts: the programs that notice some roots are rare, about one in a thousand."""


def always(value: object) -> Callable[[Any], Any]:
    return lambda right: lambda *args, **kwargs: value


def shared_by_schema(right: Callable[..., Memory]) -> Callable[..., Memory]:
    """Which nodes share memory, as the schemas of the operators say: `reshape` always does, `dropout` never."""

    def memory(graph: Any) -> Memory:
        found, fresh = right(graph), itertools.count()
        storages: dict[Any, frozenset[int]] = {}
        for node in found.storages:
            source = node.args[0] if node.args else None
            is_alias = node.op == "call_function" and _may_alias(node) and source in storages
            storages[node] = storages[source] if is_alias else frozenset({next(fresh)})
        return Memory(storages, found.objects, found.values)

    return memory


ROOTS = {
    "a walk steps behind a write": Root("graph.writes:Writes.mark", always(None), ("memory",)),
    "written tensors have known values": Root(
        "graph.writes:Writes.changed", lambda right: property(always(frozenset())(right)), ("memory", "graphs")
    ),
    "memory by schema": Root("graph.memory:memory", shared_by_schema, ("memory", "graphs")),
    "sums in any dtype": Root("values.exact:is_algebraic", always(True), ("plain",)),
    "factors without a range": Root("values.exact:product", lambda right: lambda a, b: a * b, ("plain",)),
    "sums in 16 bits": Root("values.exact:sums_are_fine", always(True), ("plain",)),
    "literals in no dtype": Root("values.exact:number_in", lambda right: lambda kind, value: value, ("plain",), 1750),
    "integers without a range": Root("values.exact:holds", always(True), ("plain",)),
    "no bias hides": Root("masks.addends:may_hide", always(False), ("plain",)),
    "nobody reads NaN": Root("masks.nan_readers:nan_is_read", always(False), ("plain",)),
    "empty rows are alike": Root("masks.empty_rows:empty_row_value", always(EmptyRows.ANY), ("plain",)),
    "every row sees a key": Root("masks.prove:_sees_a_key", always(True), ("plain",)),
    "proven values are not compared": Root("module:RewrittenModule._check_proven_values", always(None), ("plain",)),
    "proven values are not noted": Root("graph.held:values_read", always(frozenset()), ("plain",)),
    "autocast": Root("capture.autocast:insert_casts", always(None)),
}


@contextlib.contextmanager
def put_back(root: Root) -> Iterator[None]:
    """Within the block the root is broken, in every module of the package that uses it."""
    module, _, path = root.where.partition(":")
    owner: Any = importlib.import_module(f"{PACKAGE}.{module}")
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    right = owner.__dict__[name]
    users = [owner] if classes else [m for key, m in sys.modules.items() if key.startswith(PACKAGE)]
    with contextlib.ExitStack() as stack:
        for user in users:
            for key in [key for key, value in vars(user).items() if value is right]:
                stack.enter_context(mock.patch.object(user, key, root.broken(right)))
        yield


def search(name: str, seed: int, programs: int) -> tuple[str, int, float, str]:
    """Attack programs while a root is broken. Gives its name, how many were run, the seconds, and what was wrong."""
    torch.set_num_threads(1)
    root, start = ROOTS[name], time.monotonic()
    every = ((kind, number) for number in itertools.count(seed + root.first) for kind in root.kinds)
    for count, (kind, number) in enumerate(itertools.islice(every, programs), start=1):
        with put_back(root):
            wrong = KINDS[kind](number).wrong
        if wrong and not KINDS[kind](number).wrong:  # it is right without the root
            return name, count, time.monotonic() - start, f"{kind} {number}: {wrong}"
    return name, programs, time.monotonic() - start, ""


def main() -> int:
    """Search with each root broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROOTS, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--programs", type=int, default=300, help="the most programs for a root")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    missed = 0
    with get_context("spawn").Pool(options.jobs) as pool:
        run = partial(search, seed=options.seed, programs=options.programs)
        for name, count, seconds, wrong in pool.imap_unordered(run, options.only or list(ROOTS)):
            missed += not wrong
            print(f"{name}: {'found' if wrong else 'NOT FOUND'} after {count} programs, {seconds:.0f} s  {wrong[:200]}")
            sys.stdout.flush()
    print(f"{missed} not found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
