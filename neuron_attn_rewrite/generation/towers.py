"""The towers of a multimodal model: each call of one is a graph, made for the sizes of an example."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.errors import CaptureError, InputError, RewriteWarning
from neuron_attn_rewrite.generation.constants import ConstantIntegers
from neuron_attn_rewrite.generation.part import Forward, bound
from neuron_attn_rewrite.module import RewrittenModule
from neuron_attn_rewrite.rewriter import rewrite


@dataclass(frozen=True)
class Sized:
    """The arguments of a call without their floating-point numbers: what a graph is made for."""

    structure: Any
    leaves: tuple[Any, ...]
    """Shape and dtype of a floating-point tensor, the values of another one, or a value."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> tuple[Sized, list[Tensor]]:
        """The arguments of a call, and its floating-point tensors."""
        leaves, structure = pytree.tree_flatten(dict(sorted(given.items())))
        floats = [leaf for leaf in leaves if _is_float(leaf)]
        return cls(structure, tuple(map(_sized, leaves))), floats


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _sized(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    what = (tuple(leaf.shape), leaf.dtype)
    return what if leaf.is_floating_point() else (*what, tuple(leaf.flatten().tolist()))


class Tower(nn.Module):
    """A call of a tower as a function of its floating-point tensors. All other arguments are constants."""

    def __init__(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self.training = module, module.training
        self.given = dict(given)

    def forward(self, floats: list[Tensor]) -> Any:
        """What the tower gives."""
        rest = iter(floats)

        def argument(leaf: Any) -> Any:
            if _is_float(leaf):
                return next(rest)
            return leaf.clone() if isinstance(leaf, Tensor) else leaf  # the tower may write into it

        with ConstantIntegers():
            return self.module(**pytree.tree_map(argument, self.given))


class Towers:
    """The graphs of all towers of a model."""

    def __init__(self, graphs: Mapping[str, Mapping[Sized, RewrittenModule]]) -> None:
        self.graphs = graphs
        self._told: list[Sized] = []

    def forwards(self, model: Any) -> dict[str, Forward]:
        """What each tower calls instead of its `forward`."""
        return {path: self._forward(model.get_submodule(path), path) for path in self.graphs}

    def named(self) -> dict[str, RewrittenModule]:
        """All graphs by name."""
        found = {}
        for path, graphs in self.graphs.items():
            name = path.rpartition(".")[2]
            for index, graph in enumerate(graphs.values()):
                found[f"{name}[{index}]" if len(graphs) > 1 else name] = graph
        return found

    def _forward(self, module: Any, path: str) -> Forward:
        signature = inspect.signature(module.forward)

        @wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            size, floats = Sized.of(bound(signature, args, kwargs))
            graph = self.graphs[path].get(size)
            if graph is not None:
                return graph(floats)
            if size not in self._told:
                self._told.append(size)
                warnings.warn(
                    f"generate: no graph of {path} takes media of shape {[list(t.shape) for t in floats]}, so it runs "
                    "as it is in the model. Give rewrite_for_generation an example with this size and number.",
                    RewriteWarning,
                    stacklevel=2,
                )
            return module.forward(*args, **kwargs)

        return forward


def towers(model: Any, part: str, examples: Sequence[Mapping[str, Any]], config: RewriteConfig) -> Towers:
    """Graphs for each module with attention that a model calls on its media before its text part.

    Args:
        model: a multimodal model of transformers.
        part: the name of its text part.
        examples: inputs with media, as for `generate`.
        config: see `RewriteConfig`.

    Raises:
        CaptureError: a tower can't be captured as one graph.
    """
    graphs: dict[str, dict[Sized, RewrittenModule]] = {}
    for example in examples:
        for path, given in _calls(model, part, example):
            size, floats = Sized.of(given)
            if not floats or size in graphs.get(path, {}):
                continue
            try:
                with torch.no_grad():
                    graph = rewrite(Tower(model.get_submodule(path), given), (floats,), config=config)
            except (CaptureError, InputError) as error:
                raise CaptureError(
                    f"{path}: {error} Without an example, the model computes this tower as it is."
                ) from error
            if graph.report.sites:
                graphs.setdefault(path, {})[size] = graph
    return Towers(graphs)


def _calls(model: Any, part: str, example: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Which modules a model calls before its text part, and with what. Those that they call themselves do not count."""
    found: list[tuple[str, dict[str, Any]]] = []
    inside: list[str] = []

    def before(name: str, signature: inspect.Signature) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name == part:
                inside.append(part)  # nothing after it counts
            if not inside:
                found.append((name, bound(signature, args, kwargs)))
            inside.append(name)

        return hook

    def after(*_: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if (name and not f"{part}.".startswith(f"{name}.")) or name == part:
                hook = before(name, inspect.signature(module.forward))
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(after, always_call=True).remove)
        model.generate(**example, do_sample=False, num_beams=1, min_new_tokens=1, max_new_tokens=1, pad_token_id=0)
    return found
