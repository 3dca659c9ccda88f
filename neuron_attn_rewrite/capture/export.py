"""From a model to one flat ATen graph with shapes on every node.

Everything after this step may rely on: one level of `torch.ops` calls, no bookkeeping nodes of torch.export, every
tensor attribute a parameter or buffer, no device baked in, and `node.meta["val"]` on every tensor node.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.capture.dialects import expand_fused, open_masks, plain_transformers, refresh_shapes
from neuron_attn_rewrite.capture.functionalise import functionalise
from neuron_attn_rewrite.capture.objects import holds_tensors, objects_opened
from neuron_attn_rewrite.errors import CaptureError, InputError
from neuron_attn_rewrite.graph.nodes import eliminate_dead_code, fake_mode

aten = torch.ops.aten
COUNTERS, MOST_COUNTERS = (torch.int64, torch.int32), 2**16
"""Buffers that may hold the length of a cache."""


@dataclass(frozen=True)
class Captured:
    """A flat graph and the example call that it was made with.

    The call is None where only shapes were known, or where a tensor is on the meta device: nothing can be run.
    """

    module: fx.GraphModule
    call: tuple[tuple[Any, ...], Mapping[str, Any]] | None
    """Positional inputs, and those by keyword in the order of the signature."""

    @property
    def inputs(self) -> tuple[Any, ...] | None:
        """A value for each placeholder."""
        return None if self.call is None else tuple(pytree.tree_leaves(self.call))


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Captured:
    """Turn a module, an exported program or a GraphModule into one flat ATen graph. Weights are shared.

    `dynamic_shapes` is that of `torch.export.export`, for a model that is not captured yet.

    Raises:
        InputError: the example inputs are missing or don't fit the model's signature.
        CaptureError: no tracer gets the model into one graph.
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(f"kwargs must be a dict of example inputs by name, not {type(kwargs).__name__}.")
    args, kwargs = (args,) if isinstance(args, torch.Tensor) else args, dict(kwargs or {})
    if not isinstance(args, (tuple, list)):
        raise InputError(f"args must be a tuple of example inputs, not {type(args).__name__}.")
    args, given = tuple(args), bool(args or kwargs)
    program: torch.export.ExportedProgram | fx.GraphModule
    if isinstance(model, torch.export.ExportedProgram):
        program, training = model, False
        if not given and model.example_inputs:
            (args, kwargs), given = model.example_inputs, True
    elif isinstance(model, torch.jit.ScriptModule):
        raise InputError("model must be the module itself, and not what torch.jit has made of it.")
    elif not isinstance(model, nn.Module):
        raise InputError(
            f"model must be an nn.Module, an ExportedProgram or an FX GraphModule, not {type(model).__name__}."
        )
    elif isinstance(model, fx.GraphModule) and _is_aten(model):
        program, training = model, model.training
    else:
        args = args if given else _zeros_from_shapes(model)
        kwargs = _in_signature_order(model, args, kwargs)
        _refuse_objects(model, args, kwargs)
        args, kwargs = _distinct(model, args, kwargs)
        program, training = _export(model, args, kwargs, dynamic_shapes), model.training
    if dynamic_shapes is not None and program is model:
        raise InputError(
            "dynamic_shapes is for a model that is not captured yet: this one has the sizes of its capture."
        )
    module = _copied(program) if isinstance(program, fx.GraphModule) else _unlift(program)
    if isinstance(program, fx.GraphModule):
        refresh_shapes(module)
    module = normalise(module)
    for part in module.modules():
        part.training = training
    tensors = [*pytree.tree_leaves((args, kwargs)), *module.parameters(), *module.buffers()]
    has_values = given and not any(isinstance(t, torch.Tensor) and t.is_meta for t in tensors)
    return Captured(module, (args, kwargs) if has_values else None)


def _is_aten(module: fx.GraphModule) -> bool:
    calls = [n for n in module.graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    calls = [n for n in calls if not _is_guard(n)]
    return any(isinstance(n.target, torch._ops.OpOverload) for n in calls) and all(
        n.op == "call_function" and "val" in n.meta for n in calls
    )


def _is_guard(node: fx.Node) -> bool:
    """The check of inputs that torch.export puts in front of what it captured."""
    return node.op == "call_module" and str(node.target).endswith("_guards_fn")


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """The caller's GraphModule with a graph of its own and the caller's tensors."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(t): t for t in tensors})


def _zeros_from_shapes(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """Stand-in inputs for a GraphModule whose placeholders carry shapes."""
    if not isinstance(model, fx.GraphModule):
        raise InputError("rewrite needs example inputs: pass args=(...) and kwargs={...} as for a call of the model.")
    zeros = []
    for node in model.graph.find_nodes(op="placeholder"):
        like = node.meta.get("val", node.meta.get("example_value", node.meta.get("tensor_meta")))
        if like is None:
            raise InputError(
                f"the GraphModule's placeholder {node.name!r} carries no shape: pass example inputs, "
                "or run torch.fx.passes.shape_prop.ShapeProp over it first."
            )
        zeros.append(torch.zeros(tuple(like.shape), dtype=like.dtype))
    return tuple(zeros)


def _in_signature_order(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the order of `forward`, so that the result can also be called by position."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    return {name: kwargs[name] for name in [*(p for p in signature.parameters if p in kwargs), *kwargs]}


def _refuse_objects(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Name an input that no graph can take.

    Raises:
        InputError: an input is, or holds, an object with tensors among its attributes.
    """
    for name, value in inspect.signature(model.forward).bind(*args, **kwargs).arguments.items():
        kinds = [type(leaf).__name__ for leaf in pytree.tree_leaves(value) if holds_tensors(leaf)]
        if kinds:
            raise InputError(
                f"the example input {name!r} is a {kinds[0]}, and a graph takes tensors: pass the tensors that it "
                "holds to a module of your own that makes it from them and calls the model."
            )


def _distinct(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a copy of each tensor that comes twice, or is a weight: a tracer takes two inputs that are one
    tensor for one input, and so would the result, whatever it is called with."""
    seen = {id(t) for t in itertools.chain(model.parameters(), model.buffers())}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if len(seen | {id(leaf) for leaf in leaves}) == len(seen) + len(leaves):
        return args, kwargs
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[i] = leaf.detach().clone().requires_grad_(leaf.requires_grad) if id(leaf) in seen else leaf
            seen.add(id(leaf))
    distinct: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
    return distinct


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """torch.export without, then with Dynamo."""
    causes: list[str] = []
    first: Exception | None = None
    for how, strict in (("torch.export", False), ("Dynamo full graph", True)):
        try:
            masks = contextlib.nullcontext() if dynamic_shapes is None else open_masks()
            with plain_transformers(), masks, _counters_kept(model), objects_opened(model):
                return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
        except Exception as error:  # any failure of a tracer is a failed capture
            first = first or error
            causes.append(f"{how}: {type(error).__name__}: {first_line(error)}")
    sizes = (
        "leave fewer sizes open in dynamic_shapes, as the model makes numbers of some (it may not with "
        'attn_implementation="sdpa"); '
    )
    tries = "" if dynamic_shapes is None else sizes
    raise CaptureError(
        f"{type(model).__name__} could not be captured as one graph.\n  "
        + "\n  ".join(causes)
        + f"\nTry: {tries}rewrite the part of the model (a submodule) that holds its attention; remove what branches "
        "on tensor values, or pass inputs that avoid it; or hand in a torch.export.ExportedProgram of your own. "
        "Without a single graph there are torch.compile's backend and transformers' attn_implementation: "
        "docs/backends.md."
    ) from first


@contextlib.contextmanager
def _counters_kept(model: nn.Module) -> Iterator[None]:
    """Put back small buffers of integers: export really runs what writes into one that an object outside holds too."""
    small = [b for b in model.buffers() if b.dtype in COUNTERS and b.numel() <= MOST_COUNTERS and not b.is_meta]
    saved = [(buffer, buffer.clone(), buffer._version) for buffer in small]
    try:
        yield
    finally:
        for buffer, value, version in saved:
            if buffer._version != version:
                buffer.copy_(value)


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _unlift(program: torch.export.ExportedProgram) -> fx.GraphModule:
    quiet = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    module = program.module(**quiet)
    assert isinstance(module, fx.GraphModule)
    return module


# Normalisation


def normalise(
    module: fx.GraphModule, passes: Sequence[Callable[[fx.GraphModule], None]] | None = None
) -> fx.GraphModule:
    """Apply the passes in order, by default all of `PASSES`. The module is changed: it must not be the caller's own."""
    for apply in PASSES if passes is None else passes:
        apply(module)
    eliminate_dead_code(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def inline_regions(module: fx.GraphModule) -> None:
    """Inline what export wraps for a change of grad mode or autocast; no-grad regions end in a detach."""
    wrappers = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in wrappers:
            continue
        if name == "wrap_with_autocast" and node.args[2]:
            raise CaptureError("the model runs a region under torch.autocast: cast the model itself and turn it off.")
        lead = wrappers[name]
        body = module.get_submodule(node.args[lead].target)
        assert isinstance(body, fx.GraphModule)
        inline_regions(body)
        for inner in body.graph.find_nodes(op="get_attr"):
            value = _attribute(body, inner.target)
            inner.target = f"{node.args[lead].target}_{inner.target}".replace(".", "_")
            setattr(module, inner.target, value)
        inputs = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[lead + 1 :], strict=True))
        with module.graph.inserting_before(node):
            result = module.graph.graph_copy(body.graph, inputs)
            if name == "wrap_with_set_grad_enabled" and not node.args[0]:
                result = pytree.tree_map_only(fx.Node, lambda n: _detach(module.graph, n), result)
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def _detach(graph: fx.Graph, node: fx.Node) -> fx.Node:
    detached = graph.call_function(aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached


def flatten_vmap(module: fx.GraphModule) -> None:
    """Turn the batch dims of a recorded torch.vmap into plain dims.

    Export records vmap as bookkeeping calls without data edges. Each outermost region is traced again, so that
    torch's own batching rules say what it computes.
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
        depth += name == "_vmap_increment_nesting"
        if depth or region:
            region.append(node)
        if name == "_vmap_decrement_nesting":
            depth -= 1
            if not depth:
                yield region
                region = []


def drop_guards(module: fx.GraphModule) -> None:
    """Remove assertions and guards: the rewritten module checks its inputs itself."""
    checks = {
        getattr(aten, name)
        for name in ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size")
        if hasattr(aten, name)
    }
    for node in reversed(module.graph.nodes):
        is_check = isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in checks
        if _is_guard(node) or is_check:
            module.graph.erase_node(node)


def register_constants(module: fx.GraphModule) -> None:
    """Make every tensor attribute that is neither parameter nor buffer a non-persistent buffer, so that it moves."""
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
    """Replace each baked device by the device of the first tensor input."""
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
    functionalise,
    register_constants,
    follow_input_device,
)
