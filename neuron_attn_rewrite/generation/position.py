"""A position that is known at run time, where transformers expects a number."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.errors import CaptureError

SIZED = (torch.full, torch.zeros, torch.ones, torch.empty, torch.arange)
"""Operators to which a position may be a size."""


@dataclass(frozen=True, eq=False)
class Position:
    """A position that can be compared with numbers. To operators of torch it is a tensor.

    Models and mask functions of transformers ask whether a mask is too narrow for the keys, or whether a token is the
    first one. A tensor can't answer while a graph is captured, but the range of a position is known.
    `torch.arange(position, position + 3)` is known to have three elements, and `Slicing` makes slices that are as long.
    """

    origin: Tensor
    """Int64 []."""
    least: int
    """It is never smaller."""
    most: int
    """It is never larger."""
    offset: int = 0
    """How far it is from `origin`."""

    @property
    def tensor(self) -> Tensor:
        """Int64 []."""
        return self.origin + self.offset if self.offset else self.origin

    def __add__(self, number: Any) -> Any:
        if not isinstance(number, int):
            return self.tensor + number
        return type(self)(self.origin, self.least + number, self.most + number, self.offset + number)

    __radd__ = __add__

    def __sub__(self, number: Any) -> Any:
        return self + -number

    def __gt__(self, number: Any) -> Any:
        return self._compare(operator.gt, number)

    def __ge__(self, number: Any) -> Any:
        return self._compare(operator.ge, number)

    def __lt__(self, number: Any) -> Any:
        return self._compare(operator.lt, number)

    def __le__(self, number: Any) -> Any:
        return self._compare(operator.le, number)

    def __eq__(self, number: Any) -> Any:
        if isinstance(number, int) and not self.least <= number <= self.most:
            return False
        return self.tensor == number

    def __ne__(self, number: Any) -> Any:
        equal = self == number
        return equal.logical_not() if isinstance(equal, Tensor) else not equal

    __hash__ = object.__hash__

    def __mul__(self, number: Any) -> Any:
        return self.tensor * number

    __rmul__ = __mul__

    def __rsub__(self, number: Any) -> Any:
        if not isinstance(number, int):
            return number - self.tensor
        return type(self)(-self.tensor, number - self.most, number - self.least, number)

    def __truediv__(self, number: Any) -> Any:
        return self.tensor / number

    def __neg__(self) -> Any:
        return 0 - self

    def __floordiv__(self, number: Any) -> Any:
        return self.tensor // number

    def __mod__(self, number: Any) -> Any:
        return self.tensor % number

    def __int__(self) -> int:
        return int(self.tensor)

    __index__ = __int__

    def __getattr__(self, name: str) -> Any:
        """What a tensor has."""
        return getattr(self.tensor, name)

    def __bool__(self) -> bool:
        return bool(self != 0)

    def _compare(self, compare: Callable[[Any, Any], Any], number: Any) -> Any:
        """Of an order: what holds at both ends of the range holds between them."""
        if isinstance(number, int) and (always := compare(self.least, number)) == compare(self.most, number):
            return always
        return compare(self.tensor, number)

    @classmethod
    def __torch_function__(
        cls, called: Callable[..., Any], kinds: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if called is torch.arange and _is_span(*args[:2]):
            start, end, *step = args
            return torch.arange(0, end.offset - start.offset, *step, **kwargs) + start.tensor

        def plain(value: Any) -> Any:
            if not isinstance(value, Position):
                return value
            return value.most if isinstance(value, Width) and called in SIZED else value.tensor

        args, kwargs = pytree.tree_map(plain, (args, kwargs))
        return called(*args, **kwargs)


class Width(Position):
    """A position that is also the size of a mask. As a size it is `most`, which is wide enough for all keys."""

    def __int__(self) -> int:
        return self.most

    __index__ = __int__


def _is_span(start: Any = None, end: Any = None) -> bool:
    """Whether the number of positions between these is known."""
    return isinstance(start, Position) and isinstance(end, Position) and start.origin is end.origin


class Slicing(TorchFunctionMode):
    """Within the block, tensors can be sliced by positions. `tensor[position : position + 3]` has three rows.

    Such a slice is a copy. It must not be written: the tensor would not change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[Tensor, int]] = []
        """Each slice, and how often it was written when it was made."""

    def __torch_function__(self, called: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if called not in (Tensor.__getitem__, Tensor.__setitem__):
            return called(*args, **(kwargs or {}))
        index = _plain_index(args[1])
        result = called(args[0], index, *args[2:])
        if called is Tensor.__getitem__ and index is not args[1] and not _share_memory(result, args[0]):
            self.copies.append((result, result._version))
        return result

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is None and any(copy._version != version for copy, version in self.copies):
            raise CaptureError("the model writes into a slice that begins at the number of cached tokens")


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _plain_index(index: Any) -> Any:
    """An index without positions. The same object if it has none."""
    if isinstance(index, tuple):
        plain = tuple(map(_plain_index, index))
        return index if all(a is b for a, b in zip(index, plain, strict=True)) else plain
    if not isinstance(index, slice):
        return index
    start, stop = index.start, index.stop
    if _is_span(start, stop):
        return torch.arange(start, stop, index.step or 1, device=start.device)
    ends = start, stop, index.step
    if not any(type(each) is Position for each in ends):
        return index
    return slice(*(each.tensor if type(each) is Position else each for each in ends))
