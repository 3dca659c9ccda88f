"""Objects among the inputs of a model, such as caches, and what a call changes in them.

A model that is given a cache changes it: the cache holds more tensors, larger ones, or counts further. A graph only
takes and gives tensors. So the captured graph also gives the tensors that the objects hold after the call, and `call`
puts them into the objects of the caller.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.capture.objects import (
    ATOMS,
    Given,
    Opened,
    Parts,
    Pieces,
    Slot,
    has_attributes,
    holds_tensors,
    put_together,
    take_apart,
)
from neuron_attn_rewrite.errors import CaptureError, InputError


@dataclass(frozen=True)
class Effects:
    """What the graph of a model gives that changed objects of the caller."""

    outputs: Any
    """The outputs of the model, with a `Handed` in place of each output that is one of the objects."""
    tensors: list[Any]
    """The tensors that the objects hold now and did not hold before."""
    changes: Any
    """For each object its new `Parts`. The slots count the tensors that all objects held before, then `tensors`."""


@dataclass(frozen=True)
class Handed:
    """The object with this number among the inputs."""

    number: int


@dataclass(frozen=True)
class _Unchanged:
    """A part of an object that is as it was."""


UNCHANGED = _Unchanged()


def is_object(value: Any) -> bool:
    """Whether an input is an object that is to be opened. Classes that torch.export knows are opened too.

    A class may be registered with torch.export for its tensors alone, and have more attributes than these: the caches
    of transformers have.
    """
    return has_attributes(value) and not isinstance(value, (*ATOMS, Given, list, tuple, dict))


def opened(inputs: Any) -> Any:
    """The inputs with a `Given` for each object.

    Raises:
        InputError: an object comes twice. A graph would have two of them.
    """
    found = objects(inputs)
    if len({id(v) for v in found}) < len(found):
        raise InputError(f"the inputs hold the same {type(found[0]).__name__} twice: pass it as one argument.")
    return pytree.tree_map(lambda v: Given(v) if is_object(v) else v, inputs, is_leaf=is_object)


def shapes_of_tensors(value: Any, shape: Any) -> Any:
    """Open sizes as torch.export wants them: for an object, a list with an entry for each of its tensors.

    Args:
        value: opened inputs.
        shape: what the caller gave for them. The dims of an object hold for each of its tensors that has them.
    """
    if isinstance(value, Given):
        if not isinstance(shape, Mapping):
            return shape
        tensors = pytree.tree_leaves(value)
        return [shape if isinstance(t, Tensor) and all(dim < t.dim() for dim in shape) else None for t in tensors]
    if isinstance(value, Mapping) and isinstance(shape, Mapping):
        return {name: shapes_of_tensors(value.get(name), entry) for name, entry in shape.items()}
    if isinstance(value, (list, tuple)) and isinstance(shape, (list, tuple)) and len(value) == len(shape):
        return type(shape)(map(shapes_of_tensors, value, shape))
    return shape


def closed(inputs: Any) -> Any:
    """The inputs with an object for each `Given`."""
    return _replaced(inputs, Given, lambda given: given.whole)


def objects(inputs: Any) -> list[Any]:
    """Each object among the inputs."""
    return [v for v in pytree.tree_leaves(inputs, is_leaf=is_object) if is_object(v)]


def call(graph: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a captured graph with objects of the caller, and change the objects as the model does."""
    handed = objects((args, kwargs))
    if not handed:
        return graph(*args, **kwargs)
    given, given_by_name = opened((args, kwargs))
    tensors = [tensor for value in handed for tensor in pytree.tree_leaves(Given(value))]
    result = graph(*given, **given_by_name)
    if not isinstance(result, Effects):
        return result
    tensors += result.tensors
    for value, change in zip(handed, result.changes, strict=True):
        _change(value, change, tensors)
    return _replaced(result.outputs, Handed, lambda output: handed[output.number])


@contextlib.contextmanager
def objects_opened(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` gives what a graph can give: `Opened` for objects, and `Effects` if objects go in."""
    forward, had_own = model.forward, "forward" in vars(model)

    @functools.wraps(forward)
    def opening(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = closed((args, kwargs))
        handed, pieces = objects((args, kwargs)), Pieces()
        before = [take_apart(value, pieces) for value in handed]
        count = len(pieces.atoms)
        entries = pytree.tree_leaves((args, kwargs), is_leaf=is_object)
        outputs = forward(*args, **kwargs)
        _refuse_other_entries(entries, pytree.tree_leaves((args, kwargs), is_leaf=is_object))
        if not handed:  # Dynamo gets here: it knows no id() of a tensor
            return pytree.tree_map(_opened_output, outputs)
        numbers = {id(value): number for number, value in enumerate(handed)}

        def one(value: Any) -> Any:
            return Handed(numbers[id(value)]) if id(value) in numbers else _opened_output(value)

        outputs = pytree.tree_map(one, outputs, is_leaf=lambda value: id(value) in numbers)
        changes = [_changed(was, take_apart(value, pieces)) for value, was in zip(handed, before, strict=True)]
        return Effects(outputs, pieces.atoms[count:], changes)

    model.forward = opening
    try:
        yield
    finally:
        if had_own:
            model.forward = forward
        else:
            del model.forward


def _refuse_other_entries(before: list[Any], after: list[Any]) -> None:
    """A graph gets copies of the lists and dicts of the caller, so what the model puts into them would be lost.

    Raises:
        CaptureError: the model has put something into one, or has taken something out.
    """
    if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
        raise CaptureError(
            "the model changes the entries of a list, dict or deque among its inputs, and a graph can't. If the caller "
            "needs the change, make the list or dict an attribute of an object; if not, let the model change a copy"
        )


def _opened_output(value: Any) -> Any:
    return Opened(value) if holds_tensors(value) else value


def _replaced(tree: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """The pytree with another value in place of each one of this kind."""
    return pytree.tree_map(lambda v: by(v) if isinstance(v, kind) else v, tree, is_leaf=lambda v: isinstance(v, kind))


def _changed(before: Any, after: Any) -> Any:
    """The parts after a call, with `UNCHANGED` for each that is as it was."""
    if _is_equal(before, after):
        return UNCHANGED
    if not isinstance(before, Parts) or not isinstance(after, Parts) or before.kind is not after.kind:
        return after
    if isinstance(after.parts, dict):
        return Parts(after.kind, {k: _changed(before.parts.get(k), part) for k, part in after.parts.items()})
    pairs = itertools.zip_longest(before.parts[: len(after.parts)], after.parts)
    return Parts(after.kind, [_changed(*pair) for pair in pairs])


def _is_equal(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # whatever the comparison of an attribute raises
        return False


def _change(value: Any, change: Any, atoms: list[Any], around: tuple[Any, ...] = ()) -> Any:
    """Change an object in place, as far as it can be. Gives the object, or what takes its place."""
    if isinstance(change, _Unchanged):
        return value
    kind = type(value)
    if not isinstance(change, Parts) or kind is not change.kind:
        return put_together(change, atoms, around)
    if isinstance(change.parts, list):
        old: list[Any] = [*value, *[None] * len(change.parts)]  # the list may have grown
        items = [_change(old[i], part, atoms, (*around, None)) for i, part in enumerate(change.parts)]
        if isinstance(value, list):
            value[:] = items
            return value
        return put_together(Parts(change.kind, [Slot(i) for i in range(len(items))]), items)
    entries = value if isinstance(value, dict) else vars(value)
    new = {k: _change(entries.get(k), part, atoms, (*around, value)) for k, part in change.parts.items()}
    for key in entries.keys() - new.keys():
        del entries[key]
    entries.update(new)
    return value


def _effects(parts: Any, changes: Any) -> Effects:
    outputs, tensors = parts
    return Effects(outputs, tensors, changes)


pytree.register_pytree_node(
    Effects,
    lambda effects: ([effects.outputs, effects.tensors], effects.changes),
    _effects,
    serialized_type_name=f"{__name__}.Effects",
)
pytree.register_pytree_node(
    Handed,
    lambda handed: ([], handed.number),
    lambda _, number: Handed(number),
    serialized_type_name=f"{__name__}.Handed",
)
