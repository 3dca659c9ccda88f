"""A position that is known at run time, where transformers expects a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SIZED = (torch.full, torch.zeros, torch.ones, torch.empty, torch.arange)
"""Operators to which a position is a size."""


@dataclass(frozen=True, eq=False)
class Position:
    """A position that can be compared with numbers. To operators of torch it is a tensor.

    Models and mask functions of transformers ask whether a mask is too narrow for the keys, or whether a token is the
    first one. A tensor can't answer while a graph is captured, but the range of a position is known.
    """

    tensor: Tensor
    """Int64 []."""
    least: int
    """It is never smaller."""
    most: int
    """It is never larger. As the size of a mask this is wide enough."""

    def __add__(self, number: Any) -> Any:
        moved = self.tensor + number
        return Position(moved, self.least + number, self.most + number) if isinstance(number, int) else moved

    __radd__ = __add__

    def __sub__(self, number: Any) -> Any:
        return self + -number

    def __gt__(self, number: Any) -> Any:
        if not isinstance(number, int) or self.least <= number < self.most:
            return self.tensor > number
        return self.least > number

    def __index__(self) -> int:
        return self.most

    @classmethod
    def __torch_function__(
        cls, operator: Callable[..., Any], kinds: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def plain(value: Any) -> Any:
            if not isinstance(value, Position):
                return value
            return value.most if operator in SIZED else value.tensor

        args, kwargs = pytree.tree_map(plain, (args, dict(kwargs or {})))
        return operator(*args, **kwargs)
