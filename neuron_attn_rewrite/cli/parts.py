"""The parts of a model that a call does not run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook


def reads(model: nn.Module, captured: fx.GraphModule) -> set[int]:
    """The ids of the weights that a captured graph reads."""
    weights = {n: id(p) for m in (model, captured) for n, p in m.named_parameters(remove_duplicate=False)}
    return {weights[str(n.target)] for n in captured.graph.find_nodes(op="get_attr") if str(n.target) in weights}


def runs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[int]:
    """The ids of the weights of the modules that a call of the model runs."""
    read: set[int] = set()

    def note(part: nn.Module, _: Any) -> None:
        read.update(id(p) for p in part.parameters(recurse=False))

    hook = register_module_forward_pre_hook(note)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        hook.remove()
    return read


def not_run(model: nn.Module, read: Set[int]) -> tuple[str, ...]:
    """One note for each of the outermost modules with attention none of whose weights is read.

    Numbered modules share a note, such as that on `model.layers.[3, 8].cross_attn`.
    """
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
    return tuple(
        f"these inputs do not run {name}: the report does not cover it."
        + (f" --part {name} explains it." if _has_inputs(model, name) else "")
        for name in _grouped(found)
    )


def _has_inputs(model: nn.Module, name: str) -> bool:
    return "[" not in name and hasattr(model.get_submodule(name), "main_input_name")


def _grouped(paths: list[str]) -> list[str]:
    """Paths that differ only in one number, as one."""
    pattern = re.compile(r"(?<=\.)\d+(?=\.|$)")
    groups = [(key, list(some)) for key, some in groupby(sorted(paths), lambda path: pattern.sub("N", path, count=1))]
    names = []
    for key, some in groups:
        numbers = [match[0] for path in some if (match := pattern.search(path))]
        names.append(key.replace("N", f"[{', '.join(sorted(numbers, key=int))}]", 1) if len(some) > 1 else some[0])
    return names
