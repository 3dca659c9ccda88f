"""The arguments of a call of a captured graph: by position or name, checked against the captured ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.graph.sizes import bind


@dataclass(frozen=True)
class Expected:
    """What a call of a captured graph must give. It is read from the graph once, because reading takes longer than a
    small call."""

    values: dict[str, list[Any]]
    """For each argument the captured value of each leaf."""
    specs: dict[str, pytree.TreeSpec]
    """The structure of each argument. None are known for a graph whose inputs are the arguments."""
    fixed: dict[str, list[tuple[torch.dtype, tuple[int, ...], torch.layout]]]
    """Dtype, shape and layout of the leaves of each argument that has only tensors, and no open size."""
    one_device: bool
    """Whether all tensors with dims were on one device."""

    @classmethod
    def of(cls, graph: fx.Graph) -> Expected:
        """Read from a graph."""
        values, specs = _expected(graph)
        sources = (*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr"))
        captured = {t.device for node in sources if isinstance(t := node.meta.get("val"), torch.Tensor) and t.dim()}
        fixed = {
            name: [(t.dtype, tuple(t.shape), t.layout) for t in leaves]
            for name, leaves in values.items()
            if all(isinstance(t, torch.Tensor) and all(type(size) is int for size in t.shape) for t in leaves)
        }
        return cls(values, specs, fixed, len(captured) <= 1)

    def fits(self, name: str, found: list[Any]) -> bool:
        """Whether these leaves are known to fit an argument. If not, it takes a closer look."""
        fixed = self.fixed.get(name)
        if fixed is None or len(fixed) != len(found) or not all(isinstance(t, torch.Tensor) for t in found):
            return False
        return all((t.dtype, t.shape, t.layout) == wanted for t, wanted in zip(found, fixed, strict=True))


def arguments_of(
    expectation: Expected,
    signature: inspect.Signature | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    held: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The arguments of a call by name.

    Args:
        expectation: of the captured graph.
        signature: of the model; None if there was none, then the graph's inputs are the arguments.
        args: the positional arguments.
        kwargs: the arguments by name.
        held: a tensor of the module, if it has one.

    Raises:
        InputError: they do not fit what was captured, or are on different devices.
    """
    expected, specs = expectation.values, expectation.specs
    defaults = {} if signature is None else _defaults(signature)
    names = list(expected) if signature is None else _positions(signature, len(args))
    if len(args) > len(names):
        raise InputError(f"{len(args)} positional arguments given, but there are only {', '.join(names)}.")
    given: dict[str, Any] = {}
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        if name in given:
            raise InputError(f"argument {name!r} is given twice, by position and by name.")
        if name in expected:
            given[name] = value
        elif not _is_same(value, defaults.get(name)):
            raise InputError(
                f"argument {name!r} was not captured: the captured ones are {', '.join(expected)}. "
                "Pass it as an example input and rewrite again."
            )
    leaves: dict[str, list[Any]] = {}
    symbols: dict[Any, int] = {}
    sums: list[tuple[str, Any, int]] = []
    for name, values in expected.items():
        is_left_out = name not in given
        if is_left_out:
            is_fixed = signature is None and not any(isinstance(v, torch.Tensor) for v in values)
            if name not in defaults and not is_fixed:
                raise InputError(f"argument {name!r} is missing: it was captured as {_describe(values)}.")
            given[name] = defaults[name] if name in defaults else values[0] if values else ()
        found, structure = pytree.tree_flatten(given[name])
        leaves[name] = found
        comparable = name in specs and (len(found) == len(values) or _is_opened(specs[name]))
        if comparable and structure != specs[name] and not _has_structure(given[name], specs[name]):
            raise InputError(f"argument {name!r} {_other_structure(given[name], specs[name], _describe(values))}.")
        if expectation.fits(name, found):
            continue
        later: list[tuple[Any, int]] = []
        wrong = _mismatch(found, values, symbols, later)
        sums += [(name, size, value) for size, value in later]
        if wrong is not None:
            now = f"missing: its default is {_describe(found)}" if is_left_out else _describe(found)
            raise InputError(f"argument {name!r} is {now}, but was captured as {_describe(values)}{wrong}.")
    _bind_sums(sums, symbols, expected)
    _check_devices(expectation, leaves, held)
    return {name: given[name] for name in expected}


def _check_devices(expectation: Expected, leaves: Mapping[str, list[Any]], held: torch.Tensor | None) -> None:
    """Check that the arguments are on one device, that of a tensor of the module, if all were when it was captured.

    A tensor without dims may be anywhere, as for the operators of torch.

    Raises:
        InputError: they are not.
    """
    if not expectation.one_device:
        return
    first = ("the weights are", held)
    for name, found in leaves.items():
        for t in found:
            if not isinstance(t, torch.Tensor) or not t.dim():
                continue
            if first[1] is None:
                first = (f"argument {name!r} is", t)
            elif t.device != first[1].device:
                raise InputError(
                    f"argument {name!r} is on {t.device}, and {first[0]} on {first[1].device}: move one of them."
                )


def _bind_sums(sums: list[tuple[str, Any, int]], symbols: dict[Any, int], expected: dict[str, list[Any]]) -> None:
    """Check sizes such as `past + new` of a mask that comes before the inputs with these sizes.

    Raises:
        InputError: one is not the sum.
    """
    while sums:
        waiting: list[tuple[str, Any, int]] = []
        for name, size, value in sums:
            later: list[tuple[Any, int]] = []
            wrong = bind([size], [value], symbols, later)
            if wrong is not None:
                was = _describe(expected[name])
                raise InputError(f"argument {name!r} was captured as {was}, and a size does not fit: {wrong}.")
            waiting += [(name, *pair) for pair in later]
        if len(waiting) == len(sums):
            name, size, value = sums[0]
            raise InputError(f"argument {name!r} has the size {value} for {size}: no input has its parts as a size.")
        sums = waiting


def _expected(graph: fx.Graph) -> tuple[dict[str, list[Any]], dict[str, pytree.TreeSpec]]:
    """For each argument the captured value of each leaf, and the structure."""
    inputs = graph.find_nodes(op="placeholder")
    values = [node.meta.get("val", node.args[0] if node.args else None) for node in inputs]
    info = getattr(graph._codegen, "pytree_info", None)
    if info is None:  # each input of the graph is one argument
        return {str(node.target): [value] for node, value in zip(inputs, values, strict=True)}, {}
    expected: dict[str, list[Any]] = {}
    specs = dict(zip(info.orig_args, _per_argument(info.in_spec), strict=True))
    for name, spec in specs.items():
        expected[name], values = values[: spec.num_leaves], values[spec.num_leaves :]
    return expected, specs


def _positions(signature: inspect.Signature, count: int) -> list[str]:
    """The names of the positional arguments; those of `*args` are `args_0`, `args_1` and so on, as in a graph."""
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind == parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
    return names


def _defaults(signature: inspect.Signature) -> dict[str, Any]:
    return {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}


def _is_same(value: Any, default: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(default, torch.Tensor):
        return value is default
    return value is default or (type(value) is type(default) and bool(value == default))


def _per_argument(in_spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    positional, by_name = (pytree_children(child) for child in pytree_children(in_spec))
    return [*positional, *by_name]


def pytree_children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    return list(children)


def _has_structure(value: Any, spec: pytree.TreeSpec) -> bool:
    """Whether a value consists of the same lists, tuples and dicts. A list and a tuple count as the same."""
    found = pytree.tree_structure(value)
    if found == spec or spec.type not in (list, tuple) or found.type not in (list, tuple):
        return bool(found == spec)
    children = pytree_children(spec)
    return len(value) == len(children) and all(map(_has_structure, value, children))


def _is_opened(spec: pytree.TreeSpec) -> bool:
    """Whether this is the structure of an object that was taken apart, and can say how it differs from another one."""
    return hasattr(spec.context, "differs_from")


def tensors_of_objects(graph: fx.Graph) -> set[fx.Node]:
    """The inputs of the graph that are tensors of an object, such as a cache."""
    info, inputs = getattr(graph._codegen, "pytree_info", None), graph.find_nodes(op="placeholder")
    found: set[fx.Node] = set()
    for spec in [] if info is None else _per_argument(info.in_spec):
        mine, inputs = inputs[: spec.num_leaves], inputs[spec.num_leaves :]
        found.update(mine if _is_opened(spec) else ())
    return found


def _other_structure(value: Any, spec: pytree.TreeSpec, was: str) -> str:
    """In which way a value has another structure than the captured one."""
    found = pytree.tree_structure(value)
    like_it = ". Give an object that is made like the example, or rewrite with an example like this one"
    if found.type is spec.type and _is_opened(spec):
        return f"is another object than the captured one: {found.context.differs_from(spec.context)}{like_it}"
    what = type(getattr(value, "whole", value)).__name__
    if _is_opened(spec):
        return f"is {'None' if value is None else f'a {what}'}, and was a {spec.context.kind.__name__}{like_it}"
    return f"is a {what}, and was captured as {was} in another structure of lists, tuples and dicts"


def _mismatch(
    found: list[Any], expected: list[Any], symbols: dict[Any, int], later: list[tuple[Any, int]]
) -> str | None:
    """None if the values fit the captured ones, otherwise the end of a message: a reason or advice, or "" without one.

    A symbolic size fits if it has the same value in all arguments and this value is in its range. `later` gets the
    sums of symbols that have no value yet.
    """
    if len(found) != len(expected):
        return ""
    for value, wanted in zip(found, expected, strict=True):
        if not isinstance(value, torch.Tensor) or not isinstance(wanted, torch.Tensor):
            if isinstance(value, torch.Tensor) or isinstance(wanted, torch.Tensor) or value != wanted:
                return ""
        elif (value.dtype, value.dim(), value.layout) != (wanted.dtype, wanted.dim(), wanted.layout):
            return ""
        elif (wrong := bind(wanted.shape, value.shape, symbols, later)) is not None:
            is_open = any(isinstance(size, torch.SymInt) for size in wanted.shape)
            advice = ". Give it this size (by padding, for instance), or open the size with dynamic_shapes"
            return f": {wrong}" if is_open else advice
    return None


def _describe(values: list[Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            kind = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.')} "
            return f"{kind}{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
        return repr(value)

    return ", ".join(map(one, values)) or "nothing"
