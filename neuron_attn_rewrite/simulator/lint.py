"""A lint for the source of NKI kernels: it finds what Python accepts, but NKI 0.6 or NKI 0.7 rejects.

NKI 0.6 parses a subset of Python. NKI 0.7 traces Python, and forbids what depends on run-time values. Each has a
profile, and source that passes both keeps to the documented rules of both. A run in the simulator finds the rest, such
as registers in Python arithmetic or too large tensors.

    python -m neuron_attn_rewrite.simulator.lint file.py ...
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PARSER, TRACER = "parser", "tracer"
BOTH = (PARSER, TRACER)


class Rule(NamedTuple):
    profiles: tuple[str, ...]
    text: str


RULES: dict[str, Rule] = {
    "old-package": Rule(BOTH, "neuronxcc is the package of NKI 0.1: import nki"),
    "old-name": Rule(BOTH, "NKI 0.2 has removed this name"),
    "mask-argument": Rule(BOTH, "mask= was removed: slice the operands"),
    "result": Rule(BOTH, "an instruction returns nothing: it writes its dst"),
    "keywords": Rule(BOTH, "positions differ between releases: name every argument of an instruction"),
    "operator": Rule(BOTH, "operators, engines and buffers are objects of nl or nisa, not strings or numpy functions"),
    "buffer": Rule(BOTH, "name the buffer of a tensor: buffer="),
    "language-math": Rule(BOTH, "nl functions that compute or move data are experimental: use nisa"),
    "accumulate": Rule(BOTH, "state whether a matmul overwrites or accumulates: accumulate="),
    "jit-options": Rule(BOTH, "nki.jit takes no options"),
    "jit-call": Rule(BOTH, "a @nki.jit kernel must not be called from kernel code"),
    "defaults": Rule(BOTH, "a default must not be a list, dict or set"),
    "keyword-only": Rule(BOTH, "no keyword-only parameters, no *args, no **kwargs"),
    "nested": Rule(BOTH, "no function or class within a function"),
    "while": Rule(BOTH, "no while: use a for loop, or nl.while_loop with a register"),
    "impure": Rule(
        BOTH, "compiled kernels are cached: they must not depend on time, random numbers, files or the environment"
    ),
    "global-state": Rule(BOTH, "a value at module level must not be mutable"),
    "name-twice": Rule(BOTH, "name= must be unique"),
    "sliced-ap": Rule(BOTH, ".ap() addresses the whole tensor: do not call it on a slice"),
    "negative-index": Rule(BOTH, "no negative index"),
    "expression": Rule((PARSER,), "not in the parser's subset of expressions"),
    "statement": Rule((PARSER,), "not in the parser's subset of statements"),
    "builtin": Rule((PARSER,), "a builtin that the parser does not have"),
    "comparison": Rule((PARSER,), "a chained comparison evaluates all its parts: use `and`"),
    "identity": Rule((PARSER,), "`is` only with None"),
    "loop-target": Rule((PARSER,), "a for loop must have one plain name as its target, and no else"),
}

OLD_NAMES = frozenset(
    "arange mgrid par_dim nc dynamic_range tensor_copy_dynamic_src tensor_copy_dynamic_dst load_transpose2d".split()
)
OLD_ARGUMENTS = frozenset("dst_rmw_op use_gpsimd_dma".split())
MATH = frozenset(
    "load store copy add subtract multiply divide mod fmod power maximum minimum max min sum mean exp log tanh sqrt "
    "rsqrt reciprocal matmul transpose where softmax zeros ones full zeros_like broadcast_to".split()
)
PLAIN_RESULTS = frozenset("get_nc_version register_alloc".split())
BUILTINS = frozenset(
    "enumerate zip sum any all sorted reversed map filter round set frozenset getattr hasattr setattr iter next vars "
    "open eval exec input globals locals super property classmethod".split()
)
IMPURE = frozenset("os time random sys pathlib subprocess datetime secrets numpy np torch".split())
OPERATOR_ARGUMENTS = frozenset("op op0 op1 reduce_op comp_op0 comp_op1 cmp_op buffer engine reduce_cmd".split())
EXPRESSIONS = (
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.NamedExpr,
    ast.Set,
    ast.Starred,
    ast.Await,
    ast.Yield,
    ast.YieldFrom,
)
STATEMENTS = (
    ast.Delete,
    ast.Try,
    ast.Raise,
    ast.Import,
    ast.ImportFrom,
    ast.Global,
    ast.Nonlocal,
    ast.Match,
    ast.AsyncFor,
    ast.AsyncWith,
)


@dataclass(frozen=True)
class Finding:
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.line}: {self.code}: {RULES[self.code].text}"


def check(source: str, profile: str) -> list[Finding]:
    """What NKI rejects in a kernel file under one profile, "parser" (0.6) or "tracer" (0.7), in the order of lines."""
    tree = ast.parse(source)
    found = {Finding(line, code) for line, code in _findings(tree) if profile in RULES[code].profiles}
    return sorted(found, key=lambda f: (f.line, f.code))


def is_kernel_file(source: str) -> bool:
    """Whether the source imports nki."""
    return any(
        isinstance(node, ast.Import) and any(a.name.split(".")[0] == "nki" for a in node.names)
        for node in ast.parse(source).body
    )


def _findings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    kernels = {f.name for f in tree.body if isinstance(f, ast.FunctionDef) if any(map(_is_jit, f.decorator_list))}
    names: set[str] = set()
    for top in tree.body:
        if isinstance(top, (ast.Import, ast.ImportFrom)):
            yield from _module_import(top)
        elif isinstance(top, (ast.Assign, ast.AnnAssign)) and isinstance(top.value, (ast.List, ast.Dict, ast.Set)):
            yield top.lineno, "global-state"
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _signature(function)
            for statement in function.body:
                for node in ast.walk(statement):
                    yield from _node(node, kernels)
            for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
                for keyword in call.keywords:
                    if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                        if str(keyword.value.value) in names:
                            yield call.lineno, "name-twice"
                        names.add(str(keyword.value.value))


def _module_import(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[int, str]]:
    modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    for module in modules:
        if module.split(".")[0] == "neuronxcc":
            yield node.lineno, "old-package"


def _is_jit(node: ast.expr) -> bool:
    return "nki.jit" in ast.unparse(node)


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, str]]:
    arguments = function.args
    if arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
        yield function.lineno, "keyword-only"
    if any(isinstance(d, (ast.List, ast.Dict, ast.Set)) for d in arguments.defaults):
        yield function.lineno, "defaults"
    if any(_is_jit(d) and isinstance(d, ast.Call) and (d.args or d.keywords) for d in function.decorator_list):
        yield function.lineno, "jit-options"
    if isinstance(function, ast.AsyncFunctionDef):
        yield function.lineno, "statement"


def _node(node: ast.AST, kernels: set[str]) -> Iterator[tuple[int, str]]:
    line = getattr(node, "lineno", 0)
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield line, "nested"
        case ast.While():
            yield line, "while"
        case ast.For(target=target, orelse=orelse) if orelse or not isinstance(target, ast.Name):
            yield line, "loop-target"
        case ast.With(items=items) if [ast.unparse(i) for i in items] != ["nl.no_reorder()"]:
            yield line, "statement"
        case ast.Compare(ops=ops, comparators=comparators):
            if len(ops) > 1:
                yield line, "comparison"
            for op, right in zip(ops, comparators, strict=True):
                if isinstance(op, (ast.Is, ast.IsNot)) and not (
                    isinstance(right, ast.Constant) and right.value is None
                ):
                    yield line, "identity"
        case ast.Dict(keys=keys) if not all(isinstance(k, ast.Constant) and isinstance(k.value, str) for k in keys):
            yield line, "expression"
        case ast.FormattedValue(format_spec=spec) if spec is not None:
            yield line, "expression"
        case ast.BinOp(op=ast.MatMult()):
            yield line, "expression"
        case ast.Subscript(slice=index):
            for part in index.elts if isinstance(index, ast.Tuple) else [index]:
                bounds = [part.lower, part.upper, part.step] if isinstance(part, ast.Slice) else [part]
                if any(isinstance(b, ast.UnaryOp) and isinstance(b.op, ast.USub) for b in bounds):
                    yield line, "negative-index"
        case ast.Attribute(value=ast.Name(id=module)) if module in IMPURE:
            yield line, "impure"
        case ast.Call():
            yield from _call(node, kernels)
        case _ if isinstance(node, EXPRESSIONS):
            yield line, "expression"
        case _ if isinstance(node, STATEMENTS):
            yield line, "statement"
    for child in ast.iter_child_nodes(node):
        if _instruction(child) and not isinstance(node, ast.Expr):
            yield line, "result"


def _instruction(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) in ("nisa", "nki.isa")
        and node.func.attr not in PLAIN_RESULTS
    )


def _call(call: ast.Call, kernels: set[str]) -> Iterator[tuple[int, str]]:
    line, function = call.lineno, call.func
    keywords = {k.arg: k.value for k in call.keywords}
    if None in keywords:
        yield line, "expression"
    if "mask" in keywords:
        yield line, "mask-argument"
    if OLD_ARGUMENTS & keywords.keys():
        yield line, "old-name"
    for name in OPERATOR_ARGUMENTS & keywords.keys():
        if ast.unparse(keywords[name]).startswith(("'", "np.", "numpy.")):
            yield line, "operator"
    if isinstance(function, ast.Name):
        if function.id in BUILTINS:
            yield line, "builtin"
        if function.id in kernels:
            yield line, "jit-call"
    if not isinstance(function, ast.Attribute):
        return
    module, name = ast.unparse(function.value), function.attr
    if module in ("nl", "nki.language", "nisa", "nki.isa") and name in OLD_NAMES:
        yield line, "old-name"
    if module in ("nl", "nki.language"):
        if name in MATH:
            yield line, "language-math"
        if name == "ndarray" and "buffer" not in keywords:
            yield line, "buffer"
    if _instruction(call):
        if call.args:
            yield line, "keywords"
        if name == "nc_matmul" and "accumulate" not in keywords:
            yield line, "accumulate"
    if name == "ap" and isinstance(function.value, ast.Subscript):
        yield line, "sliced-ap"
    if name in ("sort", "insert", "format", "join", "split"):
        yield line, "builtin"


def main(paths: list[str]) -> int:
    failures = 0
    for path in paths:
        source = Path(path).read_text()
        for profile in BOTH:
            for finding in check(source, profile):
                print(f"{path}:{finding} [{profile}]")
                failures += 1
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
