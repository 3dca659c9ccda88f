"""Writes what is made from the code: `python -m docs.generate`.

The tests call `pages` and compare, so a page that is out of date fails there.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch

import neuron_attn_rewrite
from neuron_attn_rewrite.kernels import ops, paged, prior
from neuron_attn_rewrite.masks import spec
from neuron_attn_rewrite.masks.spec import Band, Chunked, Intervals, KeyPadding, MaskSpec, Unproven
from neuron_attn_rewrite.reasons import REASONS, TOPICS, Reason
from neuron_attn_rewrite.report.codec import schema
from neuron_attn_rewrite.report.model import SiteReport
from neuron_attn_rewrite.report.pictures import mask_svg

HERE = Path(__file__).parent
PACKAGE = Path(neuron_attn_rewrite.__file__).parent
DESCRIBED = ("report/model.py", "masks/spec.py")
"""Modules whose dataclasses are in the schema of the report."""


def pages() -> dict[Path, str]:
    """What each generated file should hold."""
    described = {name: words for module in DESCRIBED for name, words in docstrings(PACKAGE / module).items()}
    return {
        HERE / "api.md": api(),
        HERE / "pictures" / "masks.svg": gallery(),
        HERE / "troubleshooting.md": troubleshooting(),
        PACKAGE / "report" / "schema.json": json.dumps(schema(described), indent=1) + "\n",
    }


def troubleshooting() -> str:
    """Each code with its meaning and what to do, by topic."""

    def lines() -> Iterator[str]:
        yield "# Troubleshooting"
        yield ""
        yield "Every decision in a report carries a reason, and every reason a code: `site.reasons[0].code`. The"
        yield "codes are stable, so a script may rely on them. Some say what was chosen, others what stood in the way."
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
            words = {"": ast.get_docstring(node) or "", **{name: text for name, _, text in fields(node)}}
            classes[node.name] = {name: " ".join(text.split()) for name, text in words.items() if text}
    return classes


def fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """Name, declaration and docstring of each annotated field of a class."""
    for field, below in pairwise([*node.body, ast.Pass()]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            has_words = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            yield field.target.id, ast.unparse(field), inspect.cleandoc(str(below.value.value)) if has_words else ""


# The reference


def api() -> str:
    """Every public name of the package, from its source."""

    def lines() -> Iterator[str]:
        yield "# Reference"
        yield ""
        yield "<!-- made from the docstrings by python -m docs.generate -->"
        yield ""
        yield "Every public name of `neuron_attn_rewrite`, and the operator that a rewritten graph calls."
        public = [(name, getattr(neuron_attn_rewrite, name)) for name in neuron_attn_rewrite.__all__]
        for title, wanted in SECTIONS.items():
            yield f"\n## {title}"
            for name, thing in [*public, *MORE.items()]:
                if wanted(name, thing):
                    yield from entry(name, thing)
        yield "\n## Operators"
        for module in (ops, prior, paged):
            words = inspect.getdoc(module) or ""
            yield f"\n### `{module.__name__}`\n\n{words}"

    return "\n".join(lines()) + "\n"


def _is_error(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, (Exception, Warning))


MORE: dict[str, Any] = {
    name: getattr(spec, name) for name in ("MaskSpec", *(c.__name__ for c in get_args(spec.Claim)), "Unproven")
} | {"Reason": Reason}

SECTIONS: dict[str, Callable[[str, Any], bool]] = {
    "Functions": lambda name, thing: not isinstance(thing, type) and name not in MORE,
    "Classes": lambda name, thing: isinstance(thing, type) and not _is_error(thing) and name not in MORE,
    "Reasons and masks": lambda name, thing: name in MORE and isinstance(thing, type),
    "Errors and warnings": lambda name, thing: _is_error(thing),
}


def entry(name: str, thing: Any) -> Iterator[str]:
    """One name: how it is written, what it does, and for a class its fields and methods."""
    yield f"\n### `{name}`\n"
    node = definition(thing)
    if node is None:
        yield told(inspect.getdoc(thing) or "")
        return
    if not isinstance(node, ast.ClassDef):
        yield f"```python\n{signature(node)}\n```\n"
        yield told(ast.get_docstring(node) or "")
        return
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    if bases:
        yield f"A subclass of `{bases}`.\n"
    yield told(ast.get_docstring(node) or "")
    for field, declared, words in fields(node):
        if not field.startswith("_"):
            yield f"\n- `{declared}`" + (f"<br>\n  {' '.join(words.split())}" if words else "")
    members = [m for m in node.body if isinstance(m, (ast.FunctionDef, ast.Assign))]
    for member, below in pairwise([*node.body, ast.Pass()]):
        if isinstance(member, ast.Assign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield f"\n- `{ast.unparse(member)}`<br>\n  {' '.join(str(below.value.value).split())}"
    for member in members:
        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_") and ast.get_docstring(member):
            is_property = any(ast.unparse(d) == "property" for d in member.decorator_list)
            shown = (
                f"{member.name}: {ast.unparse(member.returns)}" if is_property and member.returns else signature(member)
            )
            yield f"\n#### `{shown}`\n\n{told(ast.get_docstring(member) or '')}"


def definition(thing: Any) -> ast.ClassDef | ast.FunctionDef | None:
    """The syntax tree of a class or function; None where its source is not a plain definition."""
    try:
        source = Path(inspect.getsourcefile(thing) or "").read_text(encoding="utf-8")
    except (TypeError, OSError):
        return None
    wanted = getattr(thing, "__name__", "")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == wanted:
            return node
    return None


def signature(node: ast.FunctionDef) -> str:
    """`name(arguments) -> result`, without self."""
    arguments = [a for a in ast.unparse(node.args).split(", ") if a not in ("self", "cls")]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({', '.join(arguments)}){result}"


def told(text: str) -> str:
    """A docstring as Markdown: its sections become lists."""
    out: list[str] = []
    in_section = False
    for line in text.splitlines():
        if line in ("Args:", "Raises:", "Returns:", "Yields:"):
            in_section = True
            out += [f"**{line[:-1]}**", ""]
        elif in_section and line.startswith("    ") and not line.startswith("     ") and ":" in line:
            name, _, words = line.strip().partition(":")
            out.append(f"- `{name}`:{words}")
        elif in_section and line.startswith("     "):
            out.append(f"  {line.strip()}")
        else:
            in_section = in_section and not line.strip()
            out.append(line)
    return "\n".join(out)


# Pictures

STYLE = """
svg {
  font: 12px system-ui, "DejaVu Sans", sans-serif;
  --ink: #1b2430; --soft: #5d6878; --field: #e9edf3; --accent: #3557c8; --warn: #a15c00
}
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6eaf0; --soft: #98a4b5; --field: #262f3d; --accent: #8ba6ff; --warn: #f0b45c }
}
text { fill: var(--ink); text-anchor: middle } .soft { fill: var(--soft) }
.field { fill: var(--field) } .seen { fill: var(--accent) } .dense { fill: url(#dots) } .padding { fill: url(#hatch) }
.unknown { fill: var(--soft); font-size: 34px }
"""

GALLERY = (
    ("none", MaskSpec(), None),
    ("causal(offset=0)", MaskSpec((Band(upper=0),)), None),
    ("sliding_window(24)", MaskSpec((Band(-23, 0),)), None),
    ("window(left=8, right=8)", MaskSpec((Band(-8, 8),)), None),
    ("chunked(16)", MaskSpec((Chunked(16),)), None),
    ("causal & chunked(16)", MaskSpec((Band(upper=0), Chunked(16))), None),
    ("prefix of 20 keys", MaskSpec((Intervals(tuple((0, max(20, i + 1)) for i in range(64))),)), None),
    ("causal & key padding", MaskSpec((Band(upper=0), KeyPadding("attention_mask"))), None),
    ("causal, and a dense bias", MaskSpec((Band(upper=0),)), (1, 1, 64, 64)),
    ("unproven", Unproven(Reason("mask-computed", "it depends on a weight")), None),
)


def gallery() -> str:
    """Every kind of mask as a report draws it."""
    pieces = []
    for i, (words, mask, bias) in enumerate(GALLERY):
        x, y = 28 + 150 * (i % 5), 12 + 122 * (i // 5)
        site = SiteReport("", "", batch=1, num_heads=1, q_len=64, kv_len=64, dtype=torch.float32, mask=mask, bias=bias)
        drawn = mask_svg(site).replace("<svg ", f'<svg x="{x}" y="{y}" width="82" height="89" ', 1)
        pieces.append(f'{drawn}<text x="{x + 40}" y="{y + 104}">{words.replace("&", "&amp;")}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 770 250" width="770" height="250"><style>{STYLE}</style>'
        '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="2.4" height="5" style="fill:var(--accent)"/></pattern>'
        '<pattern id="dots" width="6" height="6" patternUnits="userSpaceOnUse">'
        '<circle cx="3" cy="3" r="1.25" style="fill:var(--warn)"/></pattern></defs>' + "".join(pieces) + "</svg>\n"
    )


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
