"""The parts of a model that a call does not run."""

from __future__ import annotations

import re
from itertools import groupby

from torch import fx, nn


def not_run(model: nn.Module, captured: fx.GraphModule) -> tuple[str, ...]:
    """The outermost modules with attention whose weights the captured graph does not read.

    Numbered modules share a name, such as `model.layers.[3, 8].cross_attn`.
    """
    weights = {n: id(p) for m in (model, captured) for n, p in m.named_parameters(remove_duplicate=False)}
    read = {weights.get(str(node.target)) for node in captured.graph.find_nodes(op="get_attr")}
    found: list[str] = []
    for path, part in model.named_modules():
        own = [id(p) for p in part.parameters()]
        has_attention = any("attn" in name or "attention" in name for name, _ in part.named_modules(prefix=path))
        if (
            path
            and own
            and has_attention
            and read.isdisjoint(own)
            and not path.startswith(tuple(f"{f}." for f in found))
        ):
            found.append(path)
    return tuple(_grouped(found))


def _grouped(paths: list[str]) -> list[str]:
    """Paths that differ only in one number, as one."""
    pattern = re.compile(r"(?<=\.)\d+(?=\.|$)")
    groups = [(key, list(some)) for key, some in groupby(sorted(paths), lambda path: pattern.sub("N", path, count=1))]
    names = []
    for key, some in groups:
        numbers = [match[0] for path in some if (match := pattern.search(path))]
        names.append(key.replace("N", f"[{', '.join(sorted(numbers, key=int))}]", 1) if len(some) > 1 else some[0])
    return names
