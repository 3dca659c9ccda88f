"""The documentation: generated pages are up to date, links lead somewhere, and the quickstart does what it says."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.generate import HERE, pages
from neuron_attn_rewrite.cli.commands import run
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.strategy.legality import BACKWARD, KERNELS, OURS

ROOT = HERE.parent
PAGES = [ROOT / "README.md", *sorted(HERE.glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_generated_pages_are_up_to_date() -> None:
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m docs.generate"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for found in LINK.finditer(text):
        target, _, anchor = (found[1] or found[2]).partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in headings(path), f"{page.name} links to {target}#{anchor}"


def test_every_kernel_of_the_sdk_has_a_row() -> None:
    page = (HERE / "kernels.md").read_text(encoding="utf-8")
    for name in (KERNELS.keys() - {OURS}) | BACKWARD.keys() | vendor.PAGED.keys():
        assert re.search(rf"^\|.*`{name}`", page, re.MULTILINE), name


def headings(path: Path) -> set[str]:
    """The anchors of a page, as they are made from its headings."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Each block that runs, its language, and what stands in a text block right behind it."""
    found = list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    for block, after in zip(found, [*found[1:], None], strict=True):
        said = after[2] if after is not None and after[1] == "text" else ""
        if block[1] != "text":
            yield block[1], block[2], said


def test_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks run one after the other, and print what stands below them (`...` stands for anything)."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "quickstart"}
    ran = 0
    for language, code, said in blocks(HERE / "quickstart.md"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if language == "python":
                exec(compile(code, "quickstart.md", "exec"), space)
            else:
                assert language == "console"
                command, _, said = code.partition("\n")
                name, *arguments = shlex.split(command.removeprefix("$ "))
                assert name == "neuron-attn-rewrite" and run(arguments) == 0
        ran += 1
        alike = doctest.OutputChecker().check_output(said, printed.getvalue(), doctest.ELLIPSIS)
        assert alike, f"{code}\nprints\n{printed.getvalue()}\nand not\n{said}"
    assert ran >= 10
