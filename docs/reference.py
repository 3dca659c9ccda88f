"""The reference of every public name, and the docstrings of fields, from the package's sources."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import neuron_attn_rewrite
from neuron_attn_rewrite.masks import spec
from neuron_attn_rewrite.ops import definitions, paged, prior
from neuron_attn_rewrite.reasons import Reason


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
        for module in (definitions, prior, paged):
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
