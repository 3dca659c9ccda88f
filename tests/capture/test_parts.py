"""Objects that are taken apart and put together: every kind of part, and the words for two objects that differ."""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.capture.objects import (
    Given,
    Opened,
    Pieces,
    has_attributes,
    holds_tensors,
    leaves,
    put_together,
    take_apart,
)

A, B, C = (torch.full((2,), float(number)) for number in range(3))
OPAQUE, MODULE = object(), nn.Identity()


class Color(Enum):
    RED = 1


class Pair(NamedTuple):
    first: Any
    second: Any


class Box:
    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


class Other(Box):
    pass


def whole() -> Any:
    box = Box(one=A, again=A, items=[B, 3, (C,)], pair=Pair(A, "x"), known={1, 2}, color=Color.RED, kind=int)
    box.inner = OrderedDict({"a b": B, "place": torch.device("cpu"), "opaque": OPAQUE, "module": MODULE})
    box.itself, box.inner["outer"], box.inner["list"] = box, box, [box.inner]
    return box


def test_every_kind_of_part_comes_back() -> None:
    given, pieces = whole(), Pieces()
    parts = take_apart(given, pieces)
    assert len(pieces.atoms) == 3 and all(x is y for x, y in zip(pieces.atoms, (A, B, C), strict=True))
    assert pieces.names == ["_one", "_items_0", "_items_2_0"]
    given.known.add(3)
    x, y, z = torch.ones(1), torch.ones(2), torch.ones(3)
    new, next_one = put_together(parts, [x, y, z]), put_together(parts, [x, y, z])
    assert type(new) is Box and new is not given and new.one is x and new.again is x
    assert new.items[:2] == [y, 3] and type(new.items[2]) is tuple and new.items[2][0] is z
    assert type(new.pair) is Pair and new.pair.first is x and new.pair.second == "x"
    assert new.known == {1, 2} and new.known is not next_one.known
    assert new.color is Color.RED and new.kind is int and new.itself is new
    assert type(new.inner) is OrderedDict and new.inner["a b"] is y and new.inner["place"] == torch.device("cpu")
    assert new.inner["opaque"] is OPAQUE and new.inner["module"] is MODULE
    assert new.inner["outer"] is new and new.inner["list"][0] is new.inner


def test_objects_are_pytrees() -> None:
    flat, spec = pytree.tree_flatten((Opened(whole()), Given(whole())))
    assert len(flat) == 6 and all(x is y for x, y in zip(flat, (A, B, C) * 2, strict=True))
    opened, given = pytree.tree_unflatten(flat, spec)
    assert type(opened) is Box and opened.one is A and type(given) is Given and given.whole.items[0] is B
    paths, _ = pytree.tree_flatten_with_path(Opened(Box(one=A, inner={"a b": B})))
    assert [pytree.keystr(path) for path, _ in paths] == [".one", ".inner_a_b"]


def test_what_holds_tensors() -> None:
    empty = Box(number=3)
    assert holds_tensors(whole()) and not holds_tensors(A) and not holds_tensors(empty)
    found = leaves([whole(), 3, empty, {"b": B}])
    assert len(found) == 6 and found[3:5] == [3, empty] and found[5] is B
    assert leaves(Box(a=A, b="text"), (str,)) == ["text"]
    assert [has_attributes(of) for of in (empty, Color.RED, Box, MODULE, whole, 3)] == [True, *[False] * 5]


def parts_of(value: Any) -> Any:
    return take_apart(value, Pieces())


DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "nothing": (whole(), whole(), ""),
    "only tensors": (Box(a=A, b=[B]), Box(a=C, b=[A]), ""),
    "only devices": ([torch.device("cpu"), A], [torch.device("meta"), A], ""),
    "the kind": ([A], (A,), "it is a list, and was a tuple"),
    "the kind of an object": (Box(a=A), Other(a=A), "it is a Box, and was a Other"),
    "an object and a number": ([A], 3, "it is a list, and was 3"),
    "the kind of a part": (Box(a=[A, [B]]), Box(a=[A, (B,)]), ".a[1] is a list, and was a tuple"),
    "a new part": ({"a": A, "b": 1}, {"a": A}, "['b'] is new"),
    "a missing part": (Box(a=A), Box(a=A, b=1), ".b is missing"),
    "which tensors are the same": (
        [A, A],
        [A, B],
        "[1] is the same tensor as another part in one of them, and not in the other",
    ),
    "a number": (Box(a=A, b=1), Box(a=A, b=2), ".b is 1, and was 2"),
    "a tensor for a number": ([A], [1], "[0] is a tensor, and was 1"),
    "a number for a tensor": ([1], [A], "[0] is 1, and was a tensor"),
    "a number for a list": ([1], [[A]], "[0] is 1, and was a list"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_difference(name: str) -> None:
    mine, its, words = DIFFERENT[name]
    assert parts_of(mine).differs_from(parts_of(its)) == words
    named = f"cache{words.removeprefix('it')}" if words else ""
    assert parts_of(mine).differs_from(parts_of(its), "cache") == named
