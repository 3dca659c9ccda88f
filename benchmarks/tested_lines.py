"""Which tests run which lines of the pass, and how long each test takes.

Each file of tests runs once under coverage.py, which notes the test beside each line that it runs. The result is kept
in `.mutations/` under a hash of the sources, so a file of tests runs again only if something has changed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "neuron_attn_rewrite"
KEPT = ROOT / ".mutations"
QUIET = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging")
"""Arguments of pytest."""


@dataclass(frozen=True)
class Test:
    """A test by its pytest node id, its duration, and the lines that it runs, by module."""

    name: str
    seconds: float
    lines: dict[str, frozenset[int]]

    @property
    def file(self) -> Path:
        return ROOT / self.name.split("::")[0]

    def runs(self, path: str, numbers: Iterable[int]) -> bool:
        return not self.lines.get(path, frozenset()).isdisjoint(numbers)


def in_child(body: Callable[[], int]) -> int:
    """Start `body` in a child process without output. Gives the process, whose exit code is the result of `body`."""
    child = os.fork()
    if child:
        return child
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    code = 70
    try:
        code = body()
    finally:
        os._exit(code)


@cache
def tests_in(places: tuple[str, ...]) -> list[Test]:
    """All tests of some files and folders in `tests/`, quickest first. Runs those of which nothing is known yet."""
    given = [ROOT / "tests" / place for place in places]
    files = dict.fromkeys(file for place in given for file in (sorted(place.rglob("test_*.py")) or [place]))
    noted = [test for file in files for test in json.loads(_noted(file).read_text())]
    found = [Test(name, taken, {path: frozenset(lines[path]) for path in lines}) for name, taken, lines in noted]
    return sorted(found, key=lambda test: test.seconds)


def _noted(file: Path) -> Path:
    """Where the tests of a file are kept."""
    shared = [f for f in (ROOT / "tests").rglob("*.py") if not f.name.startswith("test_")]
    state = hashlib.sha256()
    for source in (*sorted(PACKAGE.rglob("*.py")), *sorted(shared), file):
        state.update(f"{source}\n{source.read_text()}".encode())
    kept = KEPT / f"{state.hexdigest()[:20]}.json"
    if not kept.exists():
        KEPT.mkdir(exist_ok=True)
        process = in_child(lambda: _note(file, kept))
        if os.waitpid(process, 0)[1]:
            raise SystemExit(f"The tests fail without a mutant: {file.relative_to(ROOT)}")
    return kept


def _note(file: Path, kept: Path) -> int:
    """Run the tests of a file under coverage.py, and write what they do. Gives pytest's exit code."""
    from coverage import Coverage

    coverage, seconds = Coverage(data_file=None, config_file=False, source=[str(PACKAGE)]), dict[str, float]()

    class Plugin:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
            coverage.switch_context(item.nodeid)
            start = time.perf_counter()
            try:
                return (yield)
            finally:
                seconds[item.nodeid] = time.perf_counter() - start
                coverage.switch_context("")

    coverage.start()
    code = pytest.main([*QUIET, str(file)], plugins=[Plugin()])
    coverage.stop()
    data, lines = coverage.get_data(), dict[str, dict[str, list[int]]]()
    for module in data.measured_files():
        for number, tests in data.contexts_by_lineno(module).items():
            for test in tests:
                path = Path(module).relative_to(PACKAGE).as_posix()
                lines.setdefault(test, {}).setdefault(path, []).append(number)
    found = [(name, taken, lines.get(name, {})) for name, taken in seconds.items()]
    written = kept.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(found))
    written.rename(kept)
    return int(code)


def tests_of(path: str, number: int, tests: list[Test]) -> list[Test]:
    """The tests that run a line of a module. For a line that is run at import, all tests that run the module."""
    is_import, statement = _statements(path)[number]
    here = [test for test in tests if test.runs(path, (number,))] or [t for t in tests if t.runs(path, statement)]
    return [*here, *(test for test in tests if is_import and path in test.lines and test not in here)]


@cache
def _statements(path: str) -> dict[int, tuple[bool, range]]:
    """For each line of a module: whether it is run at import, and the lines of its statement without its body."""
    found = dict[int, tuple[bool, range]]()

    def visit(node: ast.AST, is_import: bool) -> None:
        if isinstance(node, ast.stmt | ast.excepthandler):
            body = getattr(node, "body", None)
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
            lines = range(first, body[0].lineno if body else (node.end_lineno or first) + 1)
            found.update(dict.fromkeys(lines or (first,), (is_import, lines)))
        for child in ast.iter_child_nodes(node):
            visit(child, is_import and not isinstance(node, ast.FunctionDef))

    visit(ast.parse((PACKAGE / path).read_text()), True)
    return found
