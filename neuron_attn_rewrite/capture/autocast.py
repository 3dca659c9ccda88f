"""Turns autocast into casts: each tensor that torch.autocast casts for an operator gets a node that casts it.

Which tensors these are depends on the operator and the device. We call each operator on fake tensors under autocast and
record the casts, so the rules are those of PyTorch itself. Afterwards the graph computes the same with autocast off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from neuron_attn_rewrite.graph.nodes import aten, attribute, dtype, fake_mode, is_tensor

Autocast = Mapping[str, torch.dtype]
"""The dtype of each device type for which autocast is on."""


def current(devices: Iterable[str]) -> dict[str, torch.dtype]:
    """For which of these device types autocast is on now, with its dtype."""
    known = (d for d in sorted(set(devices)) if torch.amp.is_autocast_available(d))  # the meta device has none
    return {d: torch.get_autocast_dtype(d) for d in known if torch.is_autocast_enabled(d)}


def devices_of(graph: fx.Graph) -> set[str]:
    """The device types of the tensors of a graph."""
    values = (node.meta.get("val") for node in graph.nodes)
    return {v.device.type for v in values if isinstance(v, Tensor)}


def insert_casts(module: fx.GraphModule, autocast_of: Callable[[fx.Node], Autocast]) -> None:
    """Add a cast in front of each operator that casts a tensor under autocast.

    Args:
        module: a graph of ATen operators, with the dtypes under autocast on its nodes.
        autocast_of: what was on when the operator of a node was called.
    """
    for node in list(module.graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or not autocast_of(node):
            continue
        for given, wanted in _casts(module, node, autocast_of(node)).items():
            with module.graph.inserting_before(node):
                cast = module.graph.call_function(aten.to.dtype, (given, wanted))
            cast.meta = {**given.meta, "val": _value(given, fake_mode(module.graph)).to(wanted)}
            node.replace_input_with(given, cast)


class _Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which tensors are cast before anything else is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, torch.dtype] = {}
        self.is_over = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is aten._to_copy.default and not self.is_over and "dtype" in kwargs:
            self.found.setdefault(id(args[0]), kwargs["dtype"])
        elif function.namespace == "aten":
            self.is_over = True
        return function(*args, **kwargs)


def _casts(module: fx.GraphModule, node: fx.Node, autocast: Autocast) -> dict[fx.Node, torch.dtype]:
    """The inputs of a node that autocast casts, and to which dtype."""
    mode = fake_mode(module.graph)
    values = {n: _value(n, mode) for n in node.all_input_nodes}
    reals = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if not reals:
        return {}

    def call(casts: Mapping[fx.Node, torch.dtype]) -> Any:
        cast = {n: v.to(casts[n]) if n in casts else v for n, v in values.items()}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: cast[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    try:
        with mode, torch.no_grad(), ExitStack() as stack:
            for device, to in autocast.items():
                stack.enter_context(torch.autocast(device, to, cache_enabled=False))
            recorder = stack.enter_context(_Casts())
            wanted = _dtypes(call({}))
        casts = {n: recorder.found[id(v)] for n, v in reals.items() if id(v) in recorder.found}
        with mode, torch.no_grad(), _off(autocast):
            if _dtypes(call(casts)) == wanted:
                return casts
    except Exception:  # an operator whose result depends on data has no fake result
        return {}
    # Some operators get a dtype argument instead of casts. To cast their inputs gives the same.
    return {n: dtype(node) for n in reals if is_tensor(node) and values[n].dtype != dtype(node)}


def _off(autocast: Autocast) -> ExitStack:
    stack = ExitStack()
    for device in autocast:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _dtypes(result: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _value(node: fx.Node, mode: FakeTensorMode) -> Any:
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = attribute(node)
        value = mode.from_tensor(value) if isinstance(value, Tensor) else value
    return value
