"""A graph as JSON, and JSON as a graph.

Only operators of torch and of this package, and a few functions of Python, may be called. Names are checked, because
they become part of the source code that torch.fx generates.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

import neuron_attn_rewrite.ops  # noqa: F401  registers torch.ops.neuron_attn
from neuron_attn_rewrite.errors import InputError, RewriteError
from neuron_attn_rewrite.graph.sizes import limits_of
from neuron_attn_rewrite.storage import literals, outputs

NAMESPACES = ("aten", "prims", "neuron_attn")
"""The operators of these namespaces may be called."""
FORBIDDEN = ("aten::from_file",)
"""Operators that reach more than their operands."""
ATTRIBUTES = ("device", "dtype")
"""What `getattr` may read."""
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_int", "sym_float")},
    **{
        name: getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
    },
    "getitem": operator.getitem,
    "getattr": getattr,
}
"""The functions that may be called, by name."""
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}


def encode(graph: fx.Graph) -> tuple[dict[str, Any], list[str]]:
    """A normalised graph as JSON, and the names of classes among its outputs that a file can't hold.

    Raises:
        RewriteError: the graph has a call or a literal that can't be saved.
    """
    symbols: dict[str, list[int | None]] = {}
    nodes = []
    for node in graph.nodes:
        record: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op == "placeholder":
            value = node.meta.get("val", node.args[0] if node.args else None)
            record |= {"target": str(node.target), "value": _encode_input(value, symbols)}
        elif node.op == "get_attr":
            record |= {"target": str(node.target)}
        elif node.op == "call_function":
            record |= {"target": _encode_target(node)}
        elif node.op != "output":
            raise RewriteError(f"a node {node.op} ({node.target}) can't be saved.")
        record |= {"args": literals.encode(list(node.args)) if node.op != "placeholder" else []}
        record |= {"kwargs": literals.encode(dict(node.kwargs))} if node.kwargs else {}
        nodes.append(record)
    data: dict[str, Any] = {"nodes": nodes, "symbols": symbols}
    info, unknown = getattr(graph._codegen, "pytree_info", None), list[str]()
    if info is not None:
        data["arguments"] = list(info.orig_args)
        (data["inputs"], more), (data["outputs"], unknown) = map(outputs.encode, (info.in_spec, info.out_spec))
        unknown = [*more, *unknown]
    return data, unknown


def _encode_target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace in NAMESPACES and _is_plain(target):
            return str(target)
        raise RewriteError(f"the operator {target} can't be saved: only those of {', '.join(NAMESPACES)} can.")
    if target in _FUNCTION_NAMES and (target is not getattr or node.args[1] in ATTRIBUTES):
        return str(_FUNCTION_NAMES[target])
    words = getattr(target, "__name__", target)
    more = " Save the result of `rewrite`, not of `rewrite_for_trace`." if getattr(target, "__module__", "") else ""
    raise RewriteError(f"a call of {words} in the graph can't be saved.{more}")


def _is_plain(target: torch._ops.OpOverload) -> bool:
    """Whether an operator only computes with its operands: it has a kernel of the dispatcher."""
    name: str = cast(Any, target).name()
    return name.partition(".")[0] not in FORBIDDEN and torch._C._dispatch_has_kernel(name)


def _decode_target(text: Any) -> Callable[..., Any]:
    if text in FUNCTIONS:
        return FUNCTIONS[text]
    namespace, _, rest = str(text).partition(".")
    packet, _, overload = rest.partition(".")
    if namespace in NAMESPACES and packet.isidentifier() and overload.isidentifier():
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        if isinstance(found, torch._ops.OpOverload) and _is_plain(found):
            return found
        if found is None:
            raise InputError(f"there is no operator {text} in this torch and this package")
    raise InputError(f"{text!r:.80} may not be called")


def _encode_input(value: Any, symbols: dict[str, list[int | None]]) -> Any:
    if isinstance(value, Tensor):
        return {"dtype": literals.encode(value.dtype), "shape": [_encode_size(size, symbols) for size in value.shape]}
    if isinstance(value, torch.SymInt):
        return {"size": _encode_size(value, symbols)}
    return {"literal": literals.encode(value)}


def _encode_size(size: Any, symbols: dict[str, list[int | None]]) -> Any:
    """A size as JSON: a number, the name of a symbol, or a sum or product of sizes in a list."""
    if isinstance(size, int):
        return size
    environment, values = size.node.shape_env, {}
    if size.node.hint is not None and size.node.expr.is_Symbol:
        values[size.node.expr] = int(size.node.hint)

    def write(expression: Any) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            low, high = limits_of(environment.var_to_range.get(expression))
            symbols.setdefault(str(expression), [low, high, values.get(expression, max(low, 2))])
            return str(expression)
        if expression.is_Add or expression.is_Mul:
            return ["add" if expression.is_Add else "mul", *map(write, expression.args)]
        raise RewriteError(f"the open size {expression} of an input can't be saved: only sums and products can.")

    return write(size.node.expr)


def decode(data: Any) -> tuple[fx.Graph, list[str]]:
    """The graph that `encode` made `data` from, and the classes of outputs that this installation does not have.

    Raises:
        InputError: the data has something that `encode` never writes.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # imports sympy, which takes 0.2 s

    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    symbols = {name: _symbol(environment, name, *limits) for name, limits in data["symbols"].items()}
    for record in data["nodes"]:
        op, name = record["op"], literals.name(record["name"])
        args = tuple(literals.decode(record["args"], nodes))
        kwargs = {literals.name(k): v for k, v in literals.decode(record.get("kwargs", {"dict": []}), nodes).items()}
        if op == "placeholder":
            node = graph.create_node(op, literals.name(record["target"]), (), {}, name=name)
            node.meta["val"] = _decode_input(record["value"], symbols, mode)
        elif op == "get_attr":
            node = graph.create_node(op, literals.path(record["target"]), (), {}, name=name)
        elif op == "call_function":
            target = _decode_target(record["target"])
            if target is getattr and (len(args) != 2 or args[1] not in ATTRIBUTES):
                raise InputError(f"getattr may not read {args[1:]!r:.80}")
            node = graph.create_node(op, target, args, kwargs, name=name)
        elif op == "output":
            node = graph.create_node(op, "output", args, {}, name=name)
        else:
            raise InputError(f"unknown node {op!r:.80}")
        if node.name != name:
            raise InputError(f"the name {name!r} comes twice")
        nodes[name] = node
    missing = _set_codegen(graph, data) if "arguments" in data else []
    graph.lint()
    return graph, missing


def _set_codegen(graph: fx.Graph, data: Any) -> list[str]:
    *_, output = graph.nodes
    results = list(output.args[0])
    in_spec, order, unknown = outputs.decode(data["inputs"], len(graph.find_nodes(op="placeholder")))
    by_position, by_name = pytree.tree_unflatten(order, in_spec)
    if order != sorted(order) or not isinstance(by_position, tuple) or not isinstance(by_name, dict):
        raise InputError("the inputs are not in order")
    arguments = [literals.name(name) for name in data["arguments"]]
    if [*map(literals.name, by_name)] != arguments[len(by_position) :]:
        raise InputError("the names of the inputs do not fit")
    out_spec, order, missing = outputs.decode(data["outputs"], len(results))
    output.args = ([results[number] for number in order],)
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(arguments, in_spec, out_spec)))
    return [*unknown, *missing]


def _symbol(environment: Any, name: str, low: int, high: int | None, hint: int) -> Any:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic
    from torch.utils._sympy.numbers import int_oo

    literals.name(name)
    symbol = environment.create_symbol(hint, ConstantSource(name), DimDynamic.DYNAMIC, None)
    environment.constrain_symbol_range(symbol, low, int_oo if high is None else high)
    return environment.create_symintnode(symbol, hint=hint)


def _decode_input(data: Any, symbols: Mapping[str, Any], mode: FakeTensorMode) -> Any:
    if "literal" in data:
        return literals.decode(data["literal"], {})
    if "size" in data:
        return _decode_size(data["size"], symbols)
    shape = [_decode_size(size, symbols) for size in data["shape"]]
    with mode:
        return torch.empty(shape, dtype=literals.decode(data["dtype"], {}))


def _decode_size(data: Any, symbols: Mapping[str, Any]) -> Any:
    if type(data) is int:
        return data
    if isinstance(data, str):
        return symbols[data]
    (kind, *rest) = data
    sizes = [_decode_size(part, symbols) for part in rest]
    result = sizes[0]
    for size in sizes[1:]:
        result = {"add": operator.add, "mul": operator.mul}[kind](result, size)
    return result
