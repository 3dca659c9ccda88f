"""Break the pass, one place at a time, and see whether the tests notice.

    python -m benchmarks.pass_mutations                        every mutant of the modules of which none survives
    python -m benchmarks.pass_mutations masks/read.py          every mutant of another module, or of a folder
    python -m benchmarks.pass_mutations masks --part 0/40      one fortieth of them, always the same ones
    python -m benchmarks.pass_mutations masks --list           the mutants, without running a test

Cosmic Ray makes the mutants: it turns one operator, comparison, number or condition of the source into another. Each
one runs its tests in a process of its own, in which that module has the broken source: no file changes. A mutant is
noticed if a test fails or takes too long, and survives if all pass. The command fails if one survives that
`equivalent_mutants` does not list, and if a listed one is noticed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.machinery
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.equivalent_mutants import EQUIVALENT

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "neuron_attn_rewrite"
CLEAN = {"masks/stored.py": ("masks/test_stored.py",)}
"""Modules of which no mutant survives but those that are listed, with the tests that notice all others."""
TESTS = {
    "values": ("masks/test_fit.py", "values", "masks/test_prove.py", "masks/test_dtypes.py", "masks"),
    "masks": (
        "masks/test_fit.py",
        "masks/test_spec.py",
        "masks/test_prove.py",
        "masks/test_dtypes.py",
        "values",
        "masks",
    ),
    "patterns": ("patterns/test_axes.py", "patterns/test_spellings.py", "patterns"),
    "replace": ("replace", "test_rewriter.py", "test_memory.py", "patterns/test_spellings.py"),
    "capture": ("capture", "test_state.py", "graph/test_memory.py", "test_rewriter.py", "patterns/test_dialects.py"),
    "graph": ("graph", "test_memory.py", "capture/test_functionalise.py", "test_state.py"),
}
"""The tests of each folder of the package, quick ones first: the first that fails ends the run."""


def tests_of(path: str) -> tuple[str, ...]:
    return CLEAN.get(path) or TESTS[path.split("/")[0]]


SECONDS = 900
OPERATORS = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in "Add_Sub Sub_Add Mul_Add FloorDiv_Mul Mod_Add Div_Mul".split()),
    *(f"ReplaceBinaryOperator_{pair}" for pair in "BitAnd_BitOr BitOr_BitAnd BitXor_BitAnd".split()),
    *(f"ReplaceComparisonOperator_{pair}" for pair in "Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is".split()),
    *(
        f"ReplaceComparisonOperator_{pair}"
        for pair in "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_Gt Gt_Lt LtE_GtE GtE_LtE".split()
    ),
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in "Not USub Invert".split()),
    *"ReplaceAndWithOr ReplaceOrWithAnd ReplaceTrueWithFalse ReplaceFalseWithTrue AddNot NumberReplacer".split(),
    *"ReplaceBreakWithContinue ReplaceContinueWithBreak ZeroIterationForLoop".split(),
)


@dataclass(frozen=True)
class Mutant:
    """A source with one change: line `number` of `path`, a path inside the package, was `old` and is `new`."""

    path: str
    number: int
    old: str
    new: str
    source: bytes

    @property
    def key(self) -> int:
        """The same number as long as the line is the same, wherever in its module it stands."""
        return int(hashlib.sha256(f"{self.path}\n{self.old}\n{self.new}".encode()).hexdigest()[:12], 16)

    def __str__(self) -> str:
        return f"{self.path}:{self.number}\n    - {self.old}\n    + {self.new}"


def mutants(path: Path) -> Iterator[Mutant]:
    """Each mutant of a module. Those that change annotations or texts only are left out."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = path.read_text()
    seen = {_meaning(source)}
    for name in OPERATORS:
        operator, occurrence = get_operator(f"core/{name}")(), 0
        while (broken := mutate_code(source, operator, occurrence)) is not None:
            occurrence += 1
            meaning = _meaning(broken)
            if meaning is not None and meaning not in seen:
                seen.add(meaning)
                lines = zip(source.splitlines(), broken.splitlines(), strict=False)
                number, old, new = next((i, a, b) for i, (a, b) in enumerate(lines, start=1) if a != b)
                place = path.relative_to(PACKAGE).as_posix()
                yield Mutant(place, number, old.strip(), new.strip(), broken.encode())


class _Stripped(ast.NodeTransformer):
    """Removes annotations and docstrings: nothing reads them at run time."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        is_for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if is_for_types else self.generic_visit(node)


def _meaning(source: str) -> str | None:
    try:
        return ast.dump(_Stripped().visit(ast.parse(source)))
    except SyntaxError:
        return None


def run(mutant: Mutant | None, tests: tuple[str, ...]) -> int:
    """Start the tests in a child process, with the mutant's source in place of its module. Gives the process."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    code = 70
    try:
        if mutant is not None:
            _replace_source(str(PACKAGE / mutant.path), mutant.source)
        import pytest

        places = list(dict.fromkeys(str(ROOT / "tests" / place) for place in tests))
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging", *places]))
    finally:
        os._exit(code)


def _replace_source(path: str, source: bytes) -> None:
    """Let Python's loader read `source` for one module, and never its compiled file."""
    loader = importlib.machinery.SourceFileLoader
    get_data, path_stats = loader.get_data, loader.path_stats

    def broken_data(self: importlib.machinery.SourceFileLoader, wanted: str) -> bytes:
        return source if wanted == path else get_data(self, wanted)

    def broken_stats(self: importlib.machinery.SourceFileLoader, wanted: str) -> object:
        if wanted == path:
            raise OSError  # then the loader looks for no compiled file
        return path_stats(self, wanted)

    sys.dont_write_bytecode = True
    loader.get_data, loader.path_stats = broken_data, broken_stats  # type: ignore[method-assign, assignment]


def _preload() -> None:
    """Import what takes long and is not ours: each child process has it then."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import sympy  # noqa: F401
    import transformers
    from torch._export import non_strict_utils  # noqa: F401

    for name in ("LlamaForCausalLM", "BertModel", "GPT2LMHeadModel"):
        getattr(transformers, name)


def outcomes(wanted: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, str]]:
    """Run the tests of each mutant, a few at a time: "noticed", "survived" or "too slow" for each."""
    waiting, running = list(reversed(wanted)), dict[int, tuple[Mutant, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[run(mutant, tests_of(mutant.path))] = mutant, time.monotonic()
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            mutant, _ = running.pop(process)
            yield mutant, "survived" if os.waitstatus_to_exitcode(status) == 0 else "noticed"
            continue
        for process, (mutant, start) in list(running.items()):
            if time.monotonic() - start > SECONDS:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                del running[process]
                yield mutant, "too slow"
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", default=list(CLEAN), help="modules or folders inside the package")
    parser.add_argument("--part", default="0/1", help="I/N: those whose key is I modulo N")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    given = parser.parse_args()
    index, count = map(int, given.part.split("/"))
    files = [file for place in given.places for file in sorted((PACKAGE / place).glob("*.py")) or [PACKAGE / place]]
    wanted = [mutant for file in files for mutant in mutants(file) if mutant.key % count == index]
    if given.list:
        print(*wanted, sep="\n")
        return 0
    _preload()
    for tests in {tests_of(m.path) for m in wanted}:
        process = run(None, tests)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
            print(f"The tests fail without a mutant: {' '.join(tests)}")
            return 1
    found, wrong = Counter[str](), 0
    for mutant, outcome in outcomes(wanted, given.jobs):
        why = EQUIVALENT.get((mutant.path, mutant.old, mutant.new))
        found["equivalent" if why and outcome == "survived" else outcome] += 1
        if (outcome == "survived") != (why is not None):
            wrong += 1
            print(f"{outcome}{' though listed' if why else ''}: {mutant}", flush=True)
    print(f"{len(wanted)} mutants: {', '.join(f'{n} {outcome}' for outcome, n in sorted(found.items()))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
