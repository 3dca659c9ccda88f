"""Writes what is made from the code: `python -m docs.generate`.

The tests call `pages` and compare, so a page that is out of date fails there.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import neuron_attn_rewrite
from docs.drawings import before_and_after, gallery, way
from neuron_attn_rewrite.reasons import REASONS, TOPICS
from neuron_attn_rewrite.report.codec import schema

HERE = Path(__file__).parent
PACKAGE = Path(neuron_attn_rewrite.__file__).parent
DESCRIBED = ("report/data.py", "masks/spec.py")
"""Modules whose dataclasses are in the schema of the report."""


def pages() -> dict[Path, str]:
    """What each generated file should hold."""
    described = {name: words for module in DESCRIBED for name, words in docstrings(PACKAGE / module).items()}
    return {
        HERE / "pictures" / "before_and_after.svg": before_and_after(),
        HERE / "pictures" / "masks.svg": gallery(),
        HERE / "pictures" / "way.svg": way(),
        HERE / "troubleshooting.md": troubleshooting(),
        PACKAGE / "report" / "schema.json": json.dumps(schema(described), indent=1) + "\n",
    }


def troubleshooting() -> str:
    """Each code with its meaning and what to do, by topic."""

    def lines() -> Iterator[str]:
        yield "# Troubleshooting"
        yield ""
        yield "Every decision in a report has a reason, and every reason has a code: `site.reasons[0].code`. The"
        yield "codes are stable, so a script may rely on them. Some codes say what was chosen. Others say why not."
        yield ""
        yield "<!-- made from neuron_attn_rewrite/reasons.py by python -m docs.generate -->"
        for topic, title in TOPICS.items():
            yield f"\n## {title}"
            for code, entry in REASONS.items():
                if entry.topic == topic:
                    yield f"\n### `{code}`\n\n{entry.meaning}\n\n{entry.remedy}"

    return "\n".join(lines()) + "\n"


def docstrings(path: Path) -> dict[str, Mapping[str, str]]:
    """For each class of a module its docstring (under "") and those of its fields, in one line each."""
    classes = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            words = {"": ast.get_docstring(node) or "", **dict(fields(node))}
            classes[node.name] = {name: " ".join(text.split()) for name, text in words.items() if text}
    return classes


def fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Name and docstring of each annotated field of a class that has a docstring."""
    for field, below in pairwise(node.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                yield name, words


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
