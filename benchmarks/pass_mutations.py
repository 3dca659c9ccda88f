"""Break the pass, one place at a time, and see whether the tests notice.

    python -m benchmarks.pass_mutations                        every mutant of the modules of which none survives
    python -m benchmarks.pass_mutations masks/read.py          every mutant of another module, or of a folder
    python -m benchmarks.pass_mutations masks --part 0/40      one fortieth of them, always the same ones
    python -m benchmarks.pass_mutations masks --list           the mutants, without running a test

Cosmic Ray makes the mutants: it turns one operator, comparison, number or condition of the source into another. Each
one runs in a process of its own, in which that module has the broken source: no file changes. It runs the tests that
run its line, quickest first (`tested_lines`). A mutant is noticed if a test fails or takes too long, and survives if
all pass. The command fails if one survives that `equivalent_mutants` does not list, and if a listed one is noticed.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib.machinery
import itertools
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.equivalent_mutants import EQUIVALENT
from benchmarks.tested_lines import PACKAGE, QUIET, Test, in_child, tests_in, tests_of

CLEAN = {
    "capture/autocast.py": ("capture/test_casts.py",),
    "capture/scatters.py": ("capture/test_scatters.py",),
    "masks/affine.py": ("masks/test_affine.py",),
    "masks/bounds.py": ("masks/test_bounds.py", "masks/test_conditions.py"),
    "masks/cases.py": ("masks/test_cases.py", "masks/test_elementwise.py"),
    "masks/conditions.py": ("masks/test_conditions.py",),
    "masks/fit.py": ("masks/test_fit.py",),
    "masks/movement.py": ("masks/test_movement.py",),
    "masks/nan_readers.py": ("masks/test_nan_readers.py",),
    "masks/spec.py": ("masks/test_spec.py",),
    "masks/stored.py": ("masks/test_stored.py",),
    "masks/symbolic.py": ("masks/test_symbolic.py", "masks/test_elementwise.py"),
    "replace/commit.py": ("replace/test_commit.py",),
    "replace/differences.py": ("replace/test_differences.py",),
    "replace/exact.py": ("replace/test_exact.py",),
    "replace/graft.py": ("replace/test_commit.py",),
    "replace/operands.py": ("replace/test_operands.py",),
    "replace/running.py": ("replace/test_running.py",),
    "replace/verify.py": ("replace/test_compare.py",),
}
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
"""The tests of each folder of the package."""
NOTICED, SURVIVED, UNTESTED = "noticed", "survived", "survived: no test runs this line"
PATIENCE = 30
"""Seconds until a test that takes no time has taken too long. For one that takes a second, twice as many."""
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
    def keys(self) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
        """How `EQUIVALENT` lists its line, and how it lists the mutant itself."""
        return (self.path, self.old, self.old), (self.path, self.old, self.new)

    @property
    def part(self) -> int:
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


def places_of(path: str) -> tuple[str, ...]:
    """The tests for a module, as files and folders of `tests/`."""
    return CLEAN.get(path) or TESTS[path.split("/")[0]]


class _Stripped(ast.NodeTransformer):
    """Removes what does not change what is computed.

    These are annotations, assertions (also `strict` of `zip`), what makes a dataclass immutable, and words of errors.
    """

    def visit_Assert(self, node: ast.Assert) -> None:
        return None

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc.args = []
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "zip":
            node.keywords = []
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        for call in (decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call)):
            call.keywords = [keyword for keyword in call.keywords if keyword.arg != "frozen"]
        return self.generic_visit(node)

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
        is_for_types = {part.id for part in ast.walk(node.test) if isinstance(part, ast.Name)} == {"TYPE_CHECKING"}
        return None if is_for_types else self.generic_visit(node)


def _meaning(source: str) -> str | None:
    try:
        return ast.dump(_Stripped().visit(ast.parse(source)))
    except SyntaxError:
        return None


def run(mutant: Mutant, tests: list[Test]) -> int:
    """Start tests in a child process, with the mutant's source in place of its module. Gives the process.

    A test that takes far longer than without the mutant ends the process.
    """
    places = {test.name: place for place, test in enumerate(tests)}

    class Plugin:
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            items[:] = sorted((item for item in items if item.nodeid in places), key=lambda item: places[item.nodeid])

        def pytest_runtest_setup(self, item: pytest.Item) -> None:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE * (1 + tests[places[item.nodeid]].seconds))

    def body() -> int:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        _replace_source(str(PACKAGE / mutant.path), mutant.source)
        return int(pytest.main([*QUIET, *dict.fromkeys(str(test.file) for test in tests)], plugins=[Plugin()]))

    return in_child(body)


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
    """Import what takes long and is not ours, and let hypothesis draw the same values in each child process."""
    import anyio.pytest_plugin  # noqa: F401
    import sympy  # noqa: F401
    import transformers
    from hypothesis import Phase, settings
    from torch._export import non_strict_utils  # noqa: F401

    for name in ("LlamaForCausalLM", "BertModel", "GPT2LMHeadModel"):
        getattr(transformers, name)
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", derandomize=True, database=None, deadline=None, phases=phases)
    settings.load_profile("mutants")
    gc.freeze()  # the child processes share this memory


def outcomes(wanted: list[Mutant], jobs: int, seconds: float) -> Iterator[tuple[Mutant, str]]:
    """Run the tests of each mutant, `jobs` at a time, and say for each whether a test notices it."""
    waiting, running = list(reversed(wanted)), dict[int, Mutant]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            tests = tests_of(mutant.path, mutant.number, tests_in(places_of(mutant.path)))
            taken = itertools.accumulate(test.seconds for test in tests)
            chosen = [test for test, total in zip(tests, taken, strict=True) if total - test.seconds < seconds]
            if chosen:
                running[run(mutant, chosen)] = mutant
            else:
                yield mutant, UNTESTED
        if running:
            process, status = os.waitpid(-1, 0)
            is_noticed = os.waitstatus_to_exitcode(status) not in (
                pytest.ExitCode.OK,
                pytest.ExitCode.NO_TESTS_COLLECTED,
            )
            yield running.pop(process), NOTICED if is_noticed else SURVIVED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", default=list(CLEAN), help="modules or folders inside the package")
    parser.add_argument("--part", default="0/1", help="I/N: one of N parts, always the same mutants")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="run the quickest tests, this long for each mutant")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    given = parser.parse_args()
    index, count = map(int, given.part.split("/"))
    files = [file for place in given.places for file in sorted((PACKAGE / place).glob("*.py")) or [PACKAGE / place]]
    every = [mutant for file in files for mutant in mutants(file)]
    wanted = [mutant for mutant in every if mutant.part % count == index]
    if given.list:
        print(*wanted, sep="\n")
        return 0
    paths, known = {mutant.path for mutant in every}, {key for mutant in every for key in mutant.keys}
    gone = [key for key in EQUIVALENT if key[0] in paths and key not in known]
    for path, old, new in gone:
        print(f"listed, but there is no such mutant: {path}\n    - {old}\n    + {new}")
    _preload()
    found, wrong = Counter[str](), len(gone)
    for mutant, outcome in outcomes(wanted, given.jobs, given.seconds):
        of_line, of_itself = (key in EQUIVALENT for key in mutant.keys)
        is_listed = of_line or of_itself
        found["equivalent" if is_listed and outcome != NOTICED else outcome] += 1
        if of_itself if outcome == NOTICED else not is_listed:
            wrong += 1
            print(f"{outcome}{' though listed' if is_listed else ''}: {mutant}", flush=True)
    print(f"{len(wanted)} mutants: {', '.join(f'{n} {outcome}' for outcome, n in sorted(found.items()))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
