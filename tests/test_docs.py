"""The documentation: its code runs, its generated pages are up to date, and what it names exists."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

import pytest
import tomllib
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from docs.generate import HERE, pages
from neuron_attn_rewrite import __all__ as public
from neuron_attn_rewrite import masks, patterns
from neuron_attn_rewrite.cli.commands import run
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.strategy.legality import BACKWARD, KERNELS, OURS

ROOT = HERE.parent
QUOTES = ROOT / "CONTRIBUTING.md"
"""A page whose code is quoted from the sources."""
PAGES = [ROOT / "README.md", QUOTES, ROOT / "CHANGELOG.md", *sorted(HERE.glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INCLUDED = (QUOTES, ROOT / "CHANGELOG.md")
"""Pages outside of docs/ that a page of docs/ includes."""
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNS = re.compile(r"^```(python|console)$", re.MULTILINE)
CODE_WITHOUT_FENCE = re.compile(r"^ {4,}(from \w|import |>>> |\$ )", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
CANNOT_RUN = {"generation.md": ["needs a Neuron device"], "serving.md": ["needs a Neuron device"]}
"""Every block that runs on none of the two stacks, and why."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


WITH_CODE = [page for page in PAGES if page != QUOTES and RUNS.search(text_of(page))]


# Code blocks


def printed(example: Example, action: Callable[[], object]) -> str:
    """What it prints to run something, kept for the text block behind it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        action()
    example.namespace["printed"] = example.end, out.getvalue()
    return out.getvalue()


def check(wanted: str, got: str) -> str | None:
    alike = doctest.OutputChecker().check_output(wanted, got, doctest.ELLIPSIS)
    return None if alike else f"it prints\n{got}\nand not\n{wanted}"


def run_python(example: Example) -> None:
    code = compile("\n" * example.line + example.parsed, example.path, "exec")
    printed(example, lambda: exec(code, example.namespace))


def run_console(example: Example) -> str | None:
    command, _, wanted = example.parsed.partition("\n")
    name, *arguments = shlex.split(command.removeprefix("$ "))
    assert name == "neuron-attn-rewrite", f"{command}: only this package's command runs in a console block"
    codes: list[int] = []
    said = printed(example, lambda: codes.append(run(arguments)))
    return check(wanted, said) or (f"exit code {codes[0]}" if codes[0] else None)


def compare_text(example: Example) -> str | None:
    """Only if nothing stands between the two blocks."""
    end, said = example.namespace.get("printed", (0, ""))
    is_right_behind = end and not example.document.text[end : example.start].strip()
    return check(example.parsed, said) if is_right_behind else None


SYBIL = Sybil(
    [
        CodeBlockParser("python", run_python),
        CodeBlockParser("console", run_console),
        CodeBlockParser("text", compare_text),
        SkipParser(),
    ]
)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, and each prints the text block right behind it (`...` stands for anything)."""
    monkeypatch.chdir(tmp_path)
    document = SYBIL.parse(page)
    transformers_4 = version("transformers").startswith("4.")
    document.namespace.update(__name__="page", find_spec=find_spec, transformers_4=transformers_4)
    for example in document:
        with contextlib.suppress(SkipTest):
            example.evaluate()


def test_quoted_code_is_in_the_sources() -> None:
    sources = [*ROOT.glob("neuron_attn_rewrite/**/*.py"), *ROOT.glob("tests/**/*.py")]
    known = {line.strip() for path in sources for line in text_of(path).splitlines()}
    for language, code in FENCE.findall(text_of(QUOTES)):
        if language == "python":
            assert {line.strip() for line in code.splitlines()} <= known | {""}


def test_what_cannot_run_is_listed() -> None:
    reasons = {page.name: re.findall(r'^<!-- skip: \w+ "(.*)" -->$', text_of(page), re.MULTILINE) for page in PAGES}
    assert {name: why for name, why in reasons.items() if why} == CANNOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    for language, code in FENCE.findall(text_of(page)):
        assert language in ("python", "console", "text", "sh")
        for line in code.splitlines() if language == "sh" else ():
            assert_command_exists(line)
    assert not CODE_WITHOUT_FENCE.search(FENCE.sub("", text_of(page)))


def assert_command_exists(line: str) -> None:
    for target in re.findall(r"\bmake ([a-z-]+)", line):
        assert re.search(rf"^{target}:", text_of(ROOT / "Makefile"), re.MULTILINE), line
    for module in re.findall(r"python -m ([\w.]+)", line):
        assert find_spec(module), line
    for extras in re.findall(r"\[([\w,]+)\]", line):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys(), line


# Pages


def test_generated_pages_are_up_to_date() -> None:
    for path, text in pages().items():
        assert text_of(path) == text, f"{path.name}: run python -m docs.generate"


def test_every_kernel_of_the_sdk_has_a_row() -> None:
    page = text_of(HERE / "kernels.md")
    for name in (KERNELS.keys() - {OURS}) | BACKWARD.keys() | vendor.PAGED.keys():
        assert re.search(rf"^\|.*`{name}`", page, re.MULTILINE), name


def test_each_name_of_the_reference_can_be_imported_from_there() -> None:
    """And each public name is in the reference."""
    listed = re.findall(r"^::: ([\w.]+)$", text_of(HERE / "api.md"), re.MULTILINE)
    for path in listed:
        module, _, name = path.rpartition(".")
        if not (find_spec(module) and hasattr(import_module(module), name)):
            import_module(path)
    wanted = {f"neuron_attn_rewrite.{name}" for name in public}
    wanted |= {f"{module.__name__}.{name}" for module in (masks, patterns) for name in module.__all__}
    assert not wanted - set(listed)


def headings(page: Path) -> set[str]:
    """The anchors of a page, as they are made from its headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Pages that are included in others have none that is relative."""
    for found in LINK.finditer(FENCE.sub("", text_of(page))):
        link = found[1] or found[2]
        target, _, anchor = link.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        assert page not in INCLUDED, f"{page.name} has the relative link {link}"
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {link}"
        if anchor and path.suffix == ".md":
            assert anchor in headings(path), f"{page.name} links to {link}"


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


def test_the_version_is_in_the_changelog() -> None:
    assert f"\n## [{PROJECT['version']}]" in text_of(ROOT / "CHANGELOG.md")
