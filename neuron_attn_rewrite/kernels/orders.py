"""The order of the dims of operands: BHSD, or another order that saves a transpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cache
from types import MappingProxyType

from torch import Tensor

ORDERS: Mapping[str, tuple[int, int, int, int]] = MappingProxyType(
    {"BHSD": (0, 1, 2, 3), "BSHD": (0, 2, 1, 3), "BHDS": (0, 1, 3, 2)}
)
"""The permutation between BHSD (batch, heads, length, dim) and each order. Every permutation is its own inverse."""
PLAIN = "BHSD"


def turned(tensor: Tensor, given: str, wanted: str) -> Tensor:
    """A tensor in another order, by at most one permutation."""
    if given == wanted:
        return tensor
    to_plain, from_plain = ORDERS[given], ORDERS[wanted]
    return tensor.permute([to_plain[i] for i in from_plain])


def plain_shape(tensor: Tensor, given: str) -> tuple[int, int, int, int]:
    """(batch, heads, length, dim) of a tensor in this order."""
    batch, heads, length, dim = (tensor.shape[i] for i in ORDERS[given])
    return batch, heads, length, dim


@dataclass(frozen=True)
class Orders:
    """The orders of the operands and the result of one attention."""

    query: str = PLAIN
    key: str = PLAIN
    value: str = PLAIN
    result: str = PLAIN

    @classmethod
    @cache
    def read(cls, text: str) -> Orders:
        """Read the op's argument: four orders of `ORDERS`, separated by commas.

        Raises:
            ValueError: it is something else.
        """
        names = text.split(",")
        if len(names) != 4 or not set(names) <= set(ORDERS):
            raise ValueError(text)
        return cls(*names)

    def to(self, others: Orders, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Operands in these orders, transposed to others."""
        return (
            turned(query, self.query, others.query),
            turned(key, self.key, others.key),
            turned(value, self.value, others.value),
        )

    def __str__(self) -> str:
        return ",".join(astuple(self))


AS_GIVEN = Orders()
"""All operands and the result in BHSD."""


@dataclass(frozen=True)
class Accepted:
    """The orders that a kernel takes without a transpose, the preferred one first."""

    query: tuple[str, ...] = (PLAIN,)
    key: tuple[str, ...] = (PLAIN,)
    value: tuple[str, ...] = (PLAIN,)
    result: tuple[str, ...] = (PLAIN,)

    def nearest(self, orders: Orders) -> Orders:
        """Each order if it is accepted, else the preferred one."""
        pairs = zip(astuple(orders), astuple(self), strict=True)
        return Orders(*(order if order in accepted else accepted[0] for order, accepted in pairs))


ACCEPTS_PLAIN = Accepted()
"""All operands and the result in BHSD."""
