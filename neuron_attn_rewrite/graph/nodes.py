"""Reading one node of an ATen graph: its operator, arguments, shape and effects."""

from __future__ import annotations

import re
from typing import Any, TypeGuard

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from neuron_attn_rewrite.graph.sizes import number_of

aten = torch.ops.aten
SWITCHES = (torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
"""Calls that change how all later nodes run."""
PERMUTES = {"permute", "transpose", "t", "mT", "numpy_T", "matrix_H", "adjoint", "movedim", "swapaxes", "swapdims"}


WRITTEN = "written"
"""The key in `node.meta` of a tensor that is written at some time (`writes.Writes.mark`)."""
SYNONYMS = {"max.other": "maximum", "min.other": "minimum", "div.floor": "floor_divide"}
"""Overloads that are another operator, by their full names."""
APART = {"view.dtype", "where.default", "repeat_interleave.Tensor", "narrow.Tensor", "einsum.sublist"}
"""Overloads that do something else than the operator of that name. They keep their full names."""


def op_name(node: fx.Node) -> str:
    """The operator without namespace and overload, such as `softmax`; "" for no operator.

    Every rule finds its operators by this name. So the name keeps a mark where a rule for the plain operator would be
    wrong:

    * An operator that writes: `mul_`, `mul.out`.
    * An overload that does something else: `view.dtype`, which reads the bits anew; `div.trunc`, which rounds.
    * A tensor that is written at some time, by a view of it for example: `clone.written`. Its value is not what the
      operator gives.
    """
    if node.op != "call_function":
        return ""
    name = plain_name(node)
    return f"{name}.{WRITTEN}" if WRITTEN in node.meta else name


def plain_name(node: fx.Node) -> str:
    """`op_name` without the mark of a tensor that is written."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(getattr(node.target, "__name__", ""))
    name, overload = str(node.target.overloadpacket.__name__), node.target._overloadname
    full = f"{name}.{overload}"
    if mutates(node):
        return name if name.endswith("_") else full
    if overload.endswith("_mode") and (rounding := arguments(node).get("rounding_mode")):
        full = f"{name}.{rounding}"
        return SYNONYMS.get(full, full)
    return full if full in APART else SYNONYMS.get(full, name)


SHAPE_ONLY = frozenset(
    """
    new_ones new_zeros new_full new_empty ones_like zeros_like full_like empty_like sym_size getattr
    """.split()
)
SHAPE_OF_SECOND = frozenset("expand_as type_as view_as reshape_as".split())


def values_read(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs of which an operator reads more than the shape, the dtype or the device."""
    inputs = tuple(node.all_input_nodes)
    name = op_name(node)
    if name in SHAPE_ONLY:  # a fill is a value
        return tuple(n for n in inputs if n is not node.args[0])
    return inputs[:1] if name in SHAPE_OF_SECOND else inputs


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by their names in the schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            values[argument.name] = node.args[i]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


def tensor(node: fx.Node) -> torch.Tensor | None:
    """The node's fake tensor; None if the node is not a single tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def shape(node: fx.Node) -> tuple[int, ...]:
    """The sizes of the node's tensor, with a number in place of each symbol (`sizes.py`)."""
    value = tensor(node)
    assert value is not None, node
    return tuple(map(number_of, value.shape))


def dtype(node: fx.Node) -> torch.dtype:
    value = tensor(node)
    assert value is not None, node
    return value.dtype


def is_tensor(value: Any) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and tensor(value) is not None


def mutates(node: fx.Node) -> bool:
    """Whether the call writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def attribute(node: fx.Node) -> Any:
    """What a get_attr node reads from its module."""
    path, _, name = str(node.target).rpartition(".")
    module = node.graph.owning_module
    assert module is not None
    return getattr(module.get_submodule(path), name)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that made this node, such as `model.layers.0.self_attn`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    path = re.sub(r"^L\['self'\]\.?|^L__self___?", "", paths[-1]) if paths else ""
    parts = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path).split(".")
    return ".".join(part for part in parts if part and part != "_modules") or node.name


def grad_modes(graph: fx.Graph) -> dict[fx.Node, bool]:
    """Whether each node is computed with gradients. Empty if the graph does not switch gradients on or off."""
    switches = graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    if not switches:
        return {}
    modes, mode = {}, not switches[0].args[0]
    for node in graph.nodes:
        mode = bool(node.args[0]) if node in switches else mode
        modes[node] = mode
    return modes


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode in which the graph's fake tensors live."""
    return next(v.fake_mode for n in graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor))


def draws(node: fx.Node) -> bool:
    """Whether the call draws random numbers. A dropout or attention does not if its dropout is off."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    values = arguments(node)
    return not (values.get("dropout_p", values.get("p")) == 0 or values.get("train") is False)


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Remove unused nodes that have no effect."""

    def has_effect(node: fx.Node) -> bool:
        if not isinstance(node.target, torch._ops.OpOverload):
            return node.op not in ("call_function", "get_attr") or node.target in SWITCHES
        return mutates(node) or draws(node)

    graph.eliminate_dead_code(has_effect)


def permutation(node: fx.Node) -> list[int]:
    """The order of an operator of `PERMUTES`, found by applying it to a tensor whose sizes are all different."""
    rank = len(shape(node))
    probe = torch.empty(*range(rank), device="meta")
    moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return list(moved.shape)
