"""Counting the attentions that a model computes while it runs, without the finder.

An attention is one fused call; or a softmax of something that came from a batched product, whose result goes into
another batched product. What came from a product is marked, and marks follow the data until an operator that mixes
features or chooses (a linear layer, a convolution, a norm, top-k).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = ("_scaled_dot_product", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
PRODUCTS = {"bmm", "baddbmm"}
SOFTMAXES = {"_softmax", "_safe_softmax"}
FORGETS = {"mm", "addmm", "convolution", "topk", "argmax", "embedding", "native_layer_norm", "max", "argsort", "sort"}

SCORES = object()
"""The mark of what came from a product. Every softmax of it makes a mark of its own."""


class CountAttentions(TorchDispatchMode):
    """Counts while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._marks: dict[int, tuple[Any, frozenset[object]]] = {}
        self._used: set[object] = {SCORES}

    def _of(self, tensor: Tensor) -> frozenset[object]:
        alive, marks = self._marks.get(id(tensor), (None, frozenset()))
        return marks if alive is not None and alive() is tensor else frozenset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        marks: frozenset[object] = frozenset().union(*(self._of(t) for t in given))
        if name.startswith(FUSED) and "backward" not in name:
            self.total += 1
            marks = frozenset()
        elif name in PRODUCTS:
            self.total += len(marks - self._used)
            self._used |= marks
            marks = frozenset({SCORES})
        elif name in SOFTMAXES:
            marks = frozenset({object()} if SCORES in marks else ())
        elif name in FORGETS:
            marks = frozenset()
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self._marks[id(t)] = (ref(t), marks)
        return result


def count(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Attentions in one forward pass."""
    with torch.no_grad(), CountAttentions() as counter:
        model(**inputs)
    return counter.total


def count_in_graphs(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Attentions in the graphs that torch.compile makes of one forward pass. Python runs what is in none."""
    total = 0

    def backend(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal total
            with CountAttentions() as counter:
                result = module(*args)
            total += counter.total
            return result

        return run

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(**inputs)
    return total
