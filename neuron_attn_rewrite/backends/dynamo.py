"""Converts between the graphs of Dynamo and the normalised ATen graphs that the rest of the package reads.

A graph of Dynamo holds torch functions and methods, its parameters are inputs, and its metadata is called
`example_value`. It is traced again before autograd and autocast, so scaled_dot_product_attention stays one node. The
result is normalised like any other capture.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.capture.autocast import Autocast, current, insert_casts
from neuron_attn_rewrite.capture.dialects import EXPANSIONS
from neuron_attn_rewrite.capture.export import first_line
from neuron_attn_rewrite.capture.normalise import PASSES, follow_input_device, normalise
from neuron_attn_rewrite.capture.own_gradients import own_gradients
from neuron_attn_rewrite.graph.held import IS_PARAMETER
from neuron_attn_rewrite.graph.nodes import op_name
from neuron_attn_rewrite.reasons import Reason

_ENTER_AUTOCAST: Any = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST: Any = torch.amp.autocast_mode._exit_autocast
AUTOCAST = "neuron_attn_rewrite.autocast"
"""The key in the metadata of a node for what autocast was on when it was called."""


class NotAnalysed(Exception):
    """A graph can't be analysed, for this `reason`. It is passed on unchanged."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def to_aten(module: fx.GraphModule, gradients: bool = False) -> fx.GraphModule:
    """A new, normalised ATen graph that computes the same, with the same inputs in the same order.

    Args:
        module: the graph of Dynamo.
        gradients: whether the new graph must also have the gradients.

    Raises:
        NotAnalysed: an input is not a plain tensor, or a call can't be traced. Or the model defines gradients itself.
    """
    _must_be_plain(module.graph)
    placeholders = module.graph.find_nodes(op="placeholder")
    values = [value(node) for node in placeholders]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is None:
        raise NotAnalysed(Reason("not-traced", "the graph has no tensor inputs"))
    devices = {v.device.type for v in values if isinstance(v, FakeTensor)}
    runner = _Run(module, devices)
    try:
        with own_gradients() as noted, _reading_data(mode), mode, preserve_node_meta(), runner.restoring_state():
            inputs = [_fresh(v) for v in values]
            traced = make_fx(lambda *a: runner.run(*a), pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:  # a tracer can raise anything; the graph is then passed on unchanged
        words = f"the graph can't be traced to ATen: {type(error).__name__}: {first_line(error)}"
        raise NotAnalysed(Reason("not-traced", words)) from error
    if noted and gradients:
        words = f"the model defines gradients itself ({', '.join(noted)}), and they are kept only in a graph as it was"
        raise NotAnalysed(Reason("own-gradient", words))
    for old, new in zip(placeholders, traced.graph.find_nodes(op="placeholder"), strict=True):
        new._rename(_readable(old))
        new.meta.setdefault("val", value(old))
        new.meta[IS_PARAMETER] = isinstance(value(old), torch.nn.Parameter)
    insert_casts(traced, lambda node: node.meta.get(AUTOCAST) or {})
    # This graph is compiled for the devices of one call, so its devices are fixed.
    return normalise(traced, tuple(p for p in PASSES if p is not follow_input_device))


@contextmanager
def _reading_data(mode: FakeTensorMode) -> Iterator[None]:
    """Allow sizes that depend on data, such as those of `tensor.tolist()`, as Dynamo did while it traced."""
    before, mode.allow_scalar_outputs = mode.allow_scalar_outputs, True
    try:
        yield
    finally:
        mode.allow_scalar_outputs = before


def value(node: fx.Node) -> Any:
    """The value in the metadata of a node, of Dynamo or of ATen."""
    return node.meta.get("example_value", node.meta.get("val"))


def _must_be_plain(graph: fx.Graph) -> None:
    """Check that every input has a shape and that no input is a tensor subclass.

    Raises:
        NotAnalysed: this does not hold.
    """
    for node in graph.find_nodes(op="placeholder"):
        given = value(node)
        if given is None:
            raise NotAnalysed(Reason("not-traced", f"the input {_readable(node)} has no shape"))
        if isinstance(given, Tensor) and (type(given) is not FakeTensor or given.layout is not torch.strided):
            words = f"the input {_readable(node)} is a {type(given).__name__}, not a plain tensor"
            raise NotAnalysed(Reason("not-traced", words))


def _fresh(given: Any) -> Any:
    """A copy of an input for the tracer, so that writes in the graph do not reach the tensors that Dynamo keeps."""
    if not isinstance(given, FakeTensor):
        return given
    return torch.empty_strided(
        given.shape, given.stride(), dtype=given.dtype, device=given.device, requires_grad=given.requires_grad
    )


def _readable(node: fx.Node) -> str:
    """The name of an input in the model, such as `attention_mask` for `l_attention_mask_`.

    In the name of a parameter or buffer, "mask" is changed: only an input of the model is taken as a mask of 0 and 1
    because of its name.
    """
    name = re.sub(r"^l_(kwargs_)?|_$", "", node.name)
    return name.replace("mask", "m_ask") if name.startswith("self_") else name


class _Run(fx.Interpreter):
    """Runs a Dynamo graph and records the autocast regions that are open. It marks each traced node with them."""

    def __init__(self, module: fx.GraphModule, devices: Collection[str]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.devices = devices
        self._before: dict[str, tuple[Any, ...]] = {}
        """What autocast was for each device type before the graph switched it."""
        self._last: fx.Node | None = None
        """The last traced node that is marked."""

    def run_node(self, node: fx.Node) -> Any:
        if node.target is _ENTER_AUTOCAST:
            before = _switch_autocast(*node.args)
            self._before.setdefault(before[0], before)
            return before
        if node.target is _EXIT_AUTOCAST:
            return _switch_autocast(*self.env[node.args[0]])  # type: ignore[index]
        result = super().run_node(node)
        self._mark(current(self.devices))
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function. An operator of higher order that holds an attention becomes what it computes."""
        expand = EXPANSIONS.get(target.__name__) if isinstance(target, torch._ops.HigherOrderOperator) else None
        if expand is not None:
            return _expanded(expand, args, kwargs)
        return super().call_function(target, args, kwargs)

    def _mark(self, autocast: Autocast) -> None:
        mode = get_proxy_mode()
        traced = None if mode is None else next(iter(reversed(mode.tracer.graph.nodes)), None)
        node = traced
        while node is not None and node is not self._last and node.op != "root":
            node.meta[AUTOCAST] = autocast
            node = node.prev
        self._last = traced

    @contextmanager
    def restoring_state(self) -> Iterator[None]:
        """Restore grad mode and autocast at the end, also after an error."""
        grad, cache = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch._C._set_grad_enabled(grad)
            torch.set_autocast_cache_enabled(cache)
            for switch in self._before.values():
                _switch_autocast(*switch)


def _expanded(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Trace a function apart, and call its operators. A tracer before dispatch does not see those inside torch.vmap."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def run(*values: Tensor) -> Any:
        given = iter(values)
        some, named = pytree.tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)
        return function(*some, **named)

    with disable_proxy_modes_tracing(), torch.no_grad():
        plain = make_fx(run, _allow_non_fake_inputs=True)(*tensors)
    return fx.Interpreter(plain).run(*tensors)


def _switch_autocast(device: Any, to: Any, is_on: Any, *_: Any) -> tuple[Any, Any, Any]:
    """Turn autocast on or off, and give what it was before. A tracer would only record the switches of Dynamo."""
    before = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, is_on)
    torch.set_autocast_dtype(device, torch.get_autocast_dtype(device) if to is None else to)
    return before


def transplant(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Replace the content of the graph object of `target` by that of `source`. The placeholders stay.

    The names of kernel calls contain the hash of the sources of this package. Compile caches tell graphs apart by their
    names, so they do not reuse a graph whose gradients another version of this package traced.
    """
    graph = target.graph
    placeholders = graph.find_nodes(op="placeholder")
    device = next(v.device for n in placeholders if isinstance(v := value(n), Tensor))
    for node in reversed(graph.nodes):
        if node.op != "placeholder":
            graph.erase_node(node)
    mapping: dict[fx.Node, Any] = dict(zip(source.graph.find_nodes(op="placeholder"), placeholders, strict=True))
    for node in source.graph.nodes:
        if node.op == "get_attr":
            held = _attribute(source, str(node.target))
            name = str(node.target).replace(".", "_")
            while hasattr(target, name):
                name += "_"
            assert isinstance(held, Tensor)
            target.register_buffer(name, held.to(device), persistent=False)
            mapping[node] = graph.create_node("get_attr", name)
            mapping[node].meta = dict(node.meta)
    results = graph.graph_copy(source.graph, mapping)
    for node in graph.nodes:
        if getattr(node.target, "namespace", None) == "neuron_attn":
            node._rename(f"{op_name(node)}_{sources()[:12]}")
        if "val" in node.meta:
            node.meta.setdefault("example_value", node.meta["val"])
    graph.output(tuple(results) if isinstance(results, (list, tuple)) else results)
    graph.lint()
    target.recompile()


@functools.cache
def sources() -> str:
    """A hash of all source files of this package."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def make_in_graph(module: fx.GraphModule, names: Collection[str]) -> None:
    """Replace these buffers of the module by nodes that create the same tensors."""
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target not in names:
            continue
        held = getattr(module, node.target)
        with module.graph.inserting_before(node):
            like = {"dtype": held.dtype, "device": held.device}
            flat = module.graph.call_function(torch.tensor, (held.flatten().tolist(),), like)
            made = module.graph.call_function(torch.reshape, (flat, tuple(held.shape)))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
    for name in names:
        delattr(module, name)
    module.recompile()


def declare_constants(module: fx.GraphModule) -> None:
    """Give each buffer that Dynamo does not know a source, which AOTAutograd needs."""
    from torch._dynamo.source import ConstantSource

    sources = getattr(module, "_param_name_to_source", None)
    if isinstance(sources, dict):
        for name, _ in module.named_buffers(remove_duplicate=False):
            sources.setdefault(name, ConstantSource(source_name=name))


def _attribute(module: torch.nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)


@contextmanager
def tracing_as(module: fx.GraphModule) -> Iterator[None]:
    """A tracing context with the fake mode of the graph's values. The current one of Dynamo may be another."""
    fakes = (value(node) for node in module.graph.nodes)
    mode = next((v.fake_mode for v in fakes if isinstance(v, FakeTensor)), None)
    with tracing(TracingContext(mode)):
        yield


def checkpointed(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graphs of the regions under torch.utils.checkpoint."""
    calls = [n for n in module.graph.nodes if str(getattr(n.target, "__name__", "")).endswith("activation_checkpoint")]
    names = dict.fromkeys(str(a.target) for call in calls for a in call.all_input_nodes if a.op == "get_attr")
    return [body for name in names if isinstance(body := _attribute(module, name), fx.GraphModule)]


NAMES = re.compile("softmax|scaled_dot_product|multi_?head_attention|flex_attention|transformer_encoder_layer")
EXP = re.compile(r"\bexp\b")


def attentions(graph: fx.Graph) -> Sequence[fx.Node]:
    """The calls whose names look like attention, for the report on a graph that is not analysed."""
    return [n for n in graph.nodes if n.op != "placeholder" and NAMES.search(str(n.target))]


def may_hold_attention(graph: fx.Graph) -> bool:
    """Whether a graph may have an attention: a call with such a name, or an exp, which may be part of a softmax."""
    names = [str(n.target) for n in graph.nodes if n.op != "placeholder"]
    return any(NAMES.search(name) or EXP.search(name) for name in names)
