"""Integers that a module computes from constants, such as the sizes of images, are computed while it is captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes


class ConstantIntegers(TorchFunctionMode):
    """Operators whose tensors are all constants without fractions give values, and not nodes of a graph.

    What an operator draws is no constant.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of an operator."""
        kwargs = kwargs or {}
        if all(type(t) is Tensor and not t.is_floating_point() for t in _tensors((args, kwargs))):
            try:
                with _disable_current_modes(), torch.random.fork_rng(devices=[]):
                    before = torch.get_rng_state()
                    result = func(*args, **kwargs)
                    is_drawn = not torch.equal(before, torch.get_rng_state())
            except Exception:  # it needs what only the graph has, such as a symbol
                return func(*args, **kwargs)
            if not is_drawn and not any(t.is_floating_point() for t in _tensors(result)):
                return result
        return func(*args, **kwargs)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
