"""Counting the attentions that a model computes while it runs, without the finder.

An attention is an SDPA call; or a softmax of something that came from a batched product, whose result goes into another
batched product.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"bmm", "baddbmm"}
FORGETS = {"mm", "addmm", "convolution", "topk", "argmax", "embedding", "native_layer_norm", "max", "argsort", "sort"}


class CountAttentions(TorchDispatchMode):
    """Counts while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0
        self._seen: dict[int, tuple[Any, frozenset[str]]] = {}
        self._used: set[str] = set()

    @property
    def total(self) -> int:
        return self.fused + len(self._used)

    def _marks(self, tensor: Tensor) -> frozenset[str]:
        alive, marks = self._seen.get(id(tensor), (None, frozenset()))
        return marks if alive is not None and alive() is tensor else frozenset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        marks = frozenset(
            m for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) for m in self._marks(t)
        )
        if "scaled_dot_product" in name and "backward" not in name:
            self.fused += 1
            marks = frozenset()
        elif name in PRODUCTS:
            self._used |= {m for m in marks if m != "scores"}
            marks = frozenset({"scores"})
        elif name in ("_softmax", "_safe_softmax"):
            marks = frozenset({f"softmax {len(self._seen)} {id(result)}"}) if "scores" in marks else frozenset()
        elif name in FORGETS:
            marks = frozenset()
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self._seen[id(t)] = (ref(t), marks)
        return result


def count(model: torch.nn.Module, inputs: dict[str, Tensor]) -> int:
    """Attentions in one forward pass."""
    with torch.no_grad(), CountAttentions() as counter:
        model(**inputs)
    return counter.total
