"""Tables of the benchmarks in the pages of docs/: each has a place of its own for each stack."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

STACK = "a" if transformers.__version__.startswith("5") else "b"
"""The stack that runs: a with transformers 5, b with an older version."""


def write_table(page: Path, name: str, text: str) -> None:
    """Put a table of this stack in its place, between two comments with its name."""
    begin, end = (f"<!-- {name} {STACK} {word} -->" for word in ("begin", "end"))
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    old = page.read_text(encoding="utf-8")
    page.write_text(pattern.sub(lambda _: f"{begin}\n{text}{end}", old), encoding="utf-8")
