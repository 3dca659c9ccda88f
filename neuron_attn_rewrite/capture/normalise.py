"""Brings a captured graph to one form by a list of passes.

Afterwards the graph is one level of `torch.ops` calls: no bookkeeping of torch.export, no guards, no writes into
intermediate tensors, every tensor attribute a parameter or buffer, and no device literal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.capture.autocast import Autocast, current, devices_of, insert_casts
from neuron_attn_rewrite.capture.dialects import adopt_constants, expand_fused, permute_by_name, scale_by_tensors
from neuron_attn_rewrite.capture.functionalise import functionalise
from neuron_attn_rewrite.graph.memory import Memory, memory
from neuron_attn_rewrite.graph.nodes import WRITTEN, attribute, eliminate_dead_code, fake_mode, tensor
from neuron_attn_rewrite.graph.writes import written

aten = torch.ops.aten


def normalise(
    module: fx.GraphModule, passes: Sequence[Callable[[fx.GraphModule], None]] | None = None
) -> fx.GraphModule:
    """Apply the passes in order, by default all of `PASSES`. The module is changed: it must not be the caller's own."""
    for node in module.graph.nodes:
        node.meta.pop(WRITTEN, None)
    for apply in PASSES if passes is None else passes:
        apply(module)
    eliminate_dead_code(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def inline_regions(module: fx.GraphModule, autocast: Autocast | None = None) -> None:
    """Inline regions that export wraps for a change of grad mode or autocast.

    No-grad regions end in a detach. The casts of autocast become nodes.

    Args:
        module: the graph.
        autocast: what is on around the graph. By default, what is on now.
    """
    around: Autocast = current(devices_of(module.graph)) if autocast is None else autocast
    if around:
        insert_casts(module, lambda _: around)
    wrappers = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in wrappers:
            continue
        lead = wrappers[name]
        body = module.get_submodule(node.args[lead].target)
        assert isinstance(body, fx.GraphModule)
        inline_regions(body, _autocast_in(node, around) if name == "wrap_with_autocast" else around)
        if name == "wrap_with_set_grad_enabled" and not node.args[0]:
            _end_gradients(body.graph)
        for inner in body.graph.find_nodes(op="get_attr"):
            value = _attribute(body, inner.target)
            inner.target = f"{node.args[lead].target}_{inner.target}".replace(".", "_")
            setattr(module, inner.target, value)
        inputs = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[lead + 1 :], strict=True))
        with module.graph.inserting_before(node):
            result = module.graph.graph_copy(body.graph, inputs)
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def _autocast_in(region: fx.Node, around: Autocast) -> Autocast:
    device, to, is_on = region.args[:3]
    assert isinstance(device, str)
    others = {d: t for d, t in around.items() if d != device}
    if not is_on:
        return others
    assert to is None or isinstance(to, torch.dtype)
    return {**others, device: to or torch.get_autocast_dtype(device)}


def _end_gradients(graph: fx.Graph) -> None:
    """Detach the results of a region without gradients, and what it writes into tensors from outside.

    Such a write changes the tensor, and its gradient is that of the tensor before.
    """
    tensors = [n for n in graph.find_nodes(op="placeholder") if tensor(n) is not None]
    where = memory(graph) if tensors else Memory()
    inputs = {where.objects[n]: n for n in tensors}
    outside = {storage for node in tensors for storage in where.of(node)}
    for node in list(graph.nodes):
        if any(not where.of(n).isdisjoint(outside) for n in written(node)):
            for given in node.all_input_nodes:
                with graph.inserting_before(node):
                    node.replace_input_with(given, _detach(graph, given))
    (output,) = graph.find_nodes(op="output")
    for node in output.all_input_nodes:
        with graph.inserting_before(output):
            same = inputs.get(where.objects.get(node, -1))
            output.replace_input_with(node, _detach(graph, node) if same is None else same)


def _detach(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A detached tensor. Anything else as it is."""
    if tensor(node) is None:
        return node
    detached = graph.call_function(aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached


def flatten_vmap(module: fx.GraphModule) -> None:
    """Turn the batch dims of a recorded torch.vmap into plain dims, and its indexing into plain indexing.

    Export records vmap as bookkeeping calls that are not connected to the data. Each outermost region is traced again,
    so that torch applies its own batching rules. Indexing that vmap can batch is a call of its own (`flat_apply`).
    """
    for region in list(_vmap_regions(module.graph)):
        _flatten_region(module, region)


def _flatten_region(module: fx.GraphModule, region: list[fx.Node]) -> None:
    members = set(region)
    outside = [n for n in dict.fromkeys(i for r in region for i in r.all_input_nodes) if n not in members]
    inputs = [n for n in outside if n.op != "get_attr"]
    outputs = [n for n in region if any(u not in members for u in n.users)]
    body = fx.Graph()
    copies = {n: body.placeholder(n.name) for n in inputs}
    for n in [n for n in outside if n.op == "get_attr"] + region:
        copies[n] = body.node_copy(n, lambda x: copies[x])
    body.output(tuple(copies[n] for n in outputs))
    trace = make_fx(fx.Interpreter(fx.GraphModule(module, body)).run, _allow_non_fake_inputs=True)
    plain = trace(*(n.meta["val"] for n in inputs))
    known = {id(attribute(n)): str(n.target) for n in outside if n.op == "get_attr"}
    adopt_constants(module, plain, region[0].name, known)
    with module.graph.inserting_before(region[0]):
        actual = dict(zip(plain.graph.find_nodes(op="placeholder"), inputs, strict=True))
        results = module.graph.graph_copy(plain.graph, actual)
    assert isinstance(results, (list, tuple))
    for old, new in zip(outputs, results, strict=True):
        assert isinstance(new, fx.Node)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in members)
    for n in reversed(region):
        module.graph.erase_node(n)


def _vmap_regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    region: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "lazy_load_decompositions" and not depth:
            region = [node]
            continue
        if name == "flat_apply" and not depth and not region:
            yield [node]
        depth += name == "_vmap_increment_nesting"
        if depth or region:
            region.append(node)
        if name == "_vmap_decrement_nesting":
            depth -= 1
            if not depth:
                yield region
                region = []


def is_guard(node: fx.Node) -> bool:
    """Whether this is the check of the inputs that torch.export adds to a captured graph."""
    return node.op == "call_module" and str(node.target).endswith("_guards_fn")


def drop_guards(module: fx.GraphModule) -> None:
    """Remove assertions and guards. The rewritten module checks its inputs itself."""
    checks = {
        getattr(aten, name)
        for name in ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size")
        if hasattr(aten, name)
    }
    for node in reversed(module.graph.nodes):
        is_check = isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in checks
        if is_guard(node) or is_check:
            module.graph.erase_node(node)


def register_constants(module: fx.GraphModule) -> None:
    """Make tensor attributes non-persistent buffers, so that they move with the module."""
    mode = fake_mode(module.graph)
    for node in module.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        owner = module.get_submodule(path)
        value = getattr(owner, name)
        if isinstance(value, torch.Tensor) and name not in owner._parameters and name not in owner._buffers:
            delattr(owner, name)
            owner.register_buffer(name, value, persistent=False)
        if isinstance(value, torch.Tensor) and "val" not in node.meta:
            node.meta["val"] = mode.from_tensor(value)


def follow_input_device(module: fx.GraphModule) -> None:
    """Replace each device literal by the device of the first tensor input."""
    users = [n for n in module.graph.nodes if any(isinstance(a, torch.device) for a in _leaves(n))]
    tensors = [n for n in module.graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.Tensor)]
    if not users or not tensors:
        return
    last = list(module.graph.find_nodes(op="placeholder"))[-1]
    with module.graph.inserting_after(last):
        device = module.graph.call_function(getattr, (tensors[0], "device"))
    swap: Callable[[Any], Any] = lambda a: device if isinstance(a, torch.device) else a  # noqa: E731
    for n in users:
        n.args, n.kwargs = fx.node.map_aggregate(n.args, swap), fx.node.map_aggregate(n.kwargs, swap)


def _leaves(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, dict(node.kwargs)))


def _attribute(module: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)


PASSES: tuple[Callable[[fx.GraphModule], None], ...] = (
    inline_regions,
    drop_guards,
    flatten_vmap,
    expand_fused,
    permute_by_name,
    scale_by_tensors,
    register_constants,
    functionalise,
    follow_input_device,
)
