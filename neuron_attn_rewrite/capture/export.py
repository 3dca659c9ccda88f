"""From a model to one flat ATen graph, with `node.meta["val"]` on every tensor node."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental import _config as symbolic_config
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.capture.dialects import data_detached, open_masks, plain_transformers, refresh_shapes
from neuron_attn_rewrite.capture.failures import check_dynamic_shapes, quiet, refuse_inputs, value_needed
from neuron_attn_rewrite.capture.handed import closed, objects_opened, opened, shapes_of_tensors
from neuron_attn_rewrite.capture.normalise import is_guard, normalise
from neuron_attn_rewrite.capture.own_gradients import own_gradients
from neuron_attn_rewrite.capture.state import state_kept
from neuron_attn_rewrite.errors import CaptureError, InputError

TRACERS = (
    ("torch.export", False, False),
    ("torch.export, an open size is neither 0 nor 1", False, True),
    ("Dynamo full graph", True, False),
)
"""The ways to make a graph, in this order: a name, whether Dynamo is used, and whether an open size counts as different
from 0 and 1 without a guard. Such a guard may be more than torch can show to hold for all sizes."""


@dataclass(frozen=True)
class Captured:
    """A flat graph and the example call that it was made with.

    The call is None if only shapes were given, or if a tensor is on the meta device. Then nothing can be run.
    """

    module: fx.GraphModule
    call: tuple[tuple[Any, ...], Mapping[str, Any]] | None
    """Positional inputs, and those by keyword in the order of the signature."""
    example: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
    """The call with the caller's own objects."""
    signature: inspect.Signature | None = None
    """Of the model's `forward`. None if the model was a graph already."""
    own_gradients: tuple[str, ...] = ()
    """Where the model defines gradients that the graph does not have, in words."""

    @property
    def inputs(self) -> tuple[Any, ...] | None:
        """A value for each placeholder."""
        return None if self.call is None else tuple(pytree.tree_leaves(opened(self.call)))


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Captured:
    """Turn a module, an exported program or a GraphModule into one flat ATen graph. Weights are shared.

    `dynamic_shapes` is passed to `torch.export.export`. It is only allowed for a model that is not captured yet.

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
    example: tuple[tuple[Any, ...], Mapping[str, Any]] = args, kwargs
    program: torch.export.ExportedProgram | fx.GraphModule
    noted: list[str] = []
    if isinstance(model, torch.export.ExportedProgram):
        program, training = model, False
        _refuse_fake_constants(program)
        if not given and model.example_inputs:
            (args, kwargs), given = model.example_inputs, True
            example = args, kwargs
    elif isinstance(model, torch.jit.ScriptModule):
        raise InputError("model must be the module itself, not a torch.jit.ScriptModule.")
    elif not isinstance(model, nn.Module):
        raise InputError(
            f"model must be an nn.Module, an ExportedProgram or an FX GraphModule, not {type(model).__name__}."
        )
    elif isinstance(model, fx.GraphModule) and _is_aten(model):
        program, training = model, model.training
    else:
        args = args if given else _zeros_from_shapes(model)
        example = args, kwargs
        kwargs = _in_signature_order(model, args, kwargs)
        args, kwargs = _distinct(model, args, kwargs)
        (program, noted), training = _export(model, args, kwargs, dynamic_shapes), model.training
    if dynamic_shapes is not None and program is model:
        raise InputError(
            "dynamic_shapes is for a model that is not captured yet: this one is, and its sizes are fixed."
        )
    module = _copied(program) if isinstance(program, fx.GraphModule) else _unlift(program)
    if isinstance(program, fx.GraphModule):
        refresh_shapes(module)
    module = normalise(module)
    for part in module.modules():
        part.training = training
    tensors = [*pytree.tree_leaves(opened((args, kwargs))), *module.parameters(), *module.buffers()]
    has_values = given and not any(isinstance(t, torch.Tensor) and t.is_meta for t in tensors)
    given_forward = model.forward if isinstance(model, nn.Module) and program is not model else None
    signature = inspect.signature(given_forward) if given_forward else None
    return Captured(module, (args, kwargs) if has_values else None, example, signature, tuple(noted))


def _is_aten(module: fx.GraphModule) -> bool:
    calls = [n for n in module.graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    calls = [n for n in calls if not is_guard(n)]
    return any(isinstance(n.target, torch._ops.OpOverload) for n in calls) and all(
        n.op == "call_function" and "val" in n.meta for n in calls
    )


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


def _distinct(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs, with a copy of each tensor that comes twice or is a weight.

    A tracer makes one input of two that are the same tensor. Then the result would ignore the other one.
    """
    seen = {id(t) for t in itertools.chain(model.parameters(), model.buffers())}
    leaves, spec = pytree.tree_flatten(opened((args, kwargs)))
    if len(seen | {id(leaf) for leaf in leaves}) == len(seen) + len(leaves):
        return args, kwargs
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[i] = leaf.detach().clone().requires_grad_(leaf.requires_grad) if id(leaf) in seen else leaf
            seen.add(id(leaf))
    distinct: tuple[tuple[Any, ...], dict[str, Any]] = closed(pytree.tree_unflatten(leaves, spec))
    return distinct


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """torch.export without Dynamo, and if that fails with it. Objects among the inputs are opened.

    The list says where the model defines gradients itself.
    """
    check_dynamic_shapes(args, kwargs, dynamic_shapes)
    named = opened(dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments))
    args, kwargs = opened((args, kwargs))
    if dynamic_shapes is not None:  # torch.export marks the tensors whose sizes are open, and the marks stay
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (args, kwargs)
        )
    by_position = (*args, *kwargs.values())
    dynamic_shapes = shapes_of_tensors(named if isinstance(dynamic_shapes, Mapping) else by_position, dynamic_shapes)
    causes: list[str] = []
    first: Exception | None = None
    for how, strict, oblivious in TRACERS:
        if oblivious and dynamic_shapes is None:
            continue
        try:
            open_sizes = contextlib.nullcontext() if dynamic_shapes is None else _open_sizes(oblivious)
            data = contextlib.nullcontext() if strict else data_detached()
            with (
                own_gradients() as noted,
                quiet(),
                plain_transformers(),
                open_sizes,
                data,
                state_kept(model),
                objects_opened(model),
            ):
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
            _refuse_fake_constants(program)
            return program, noted
        except CaptureError as error:  # what one tracer refuses, the other one may leave out
            raise CaptureError(f"{type(model).__name__} could not be captured as one graph: {error}.") from None
        except Exception as error:  # any failure of a tracer is a failed capture
            first = first or error
            causes.append(f"{how}: {type(error).__name__}: {first_line(error)}")
    refuse_inputs(model, args, kwargs, first)
    fewer = (
        "open every size in dynamic_shapes that must fit an open one (an attention_mask may be as long as a cache and "
        "the new tokens: past + 1), or leave fewer open, as the model turns some into numbers (perhaps not with "
        'attn_implementation="sdpa"); '
    )
    tries = "" if dynamic_shapes is None else fewer
    raise CaptureError(
        f"{type(model).__name__} could not be captured as one graph.\n  "
        + value_needed(first)
        + "\n  ".join(causes)
        + f"\nTry: {tries}rewrite the part of the model (a submodule) that holds its attention; remove what branches "
        "on tensor values, or pass inputs that avoid it; or hand in a torch.export.ExportedProgram of your own. "
        "Without a single graph there are torch.compile's backend and transformers' attn_implementation: "
        "docs/backends.md."
    ) from first


@contextlib.contextmanager
def _open_sizes(oblivious: bool) -> Iterator[None]:
    """Settings for a capture with open sizes. Torch 2.9 can't trace sizes of tensors that its fake cache has made."""
    import torch._dynamo  # takes a second

    sizes = symbolic_config.patch(backed_size_oblivious=oblivious)  # type: ignore[attr-defined]
    with open_masks(), sizes, torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


def _refuse_fake_constants(program: torch.export.ExportedProgram) -> None:
    """torch.export makes a constant without values of what it can't trace, and the graph would ignore the real tensor.

    Raises:
        CaptureError: there is such a constant.
    """
    fake = [name for name, value in program.constants.items() if is_fake(value)]
    if fake:
        raise CaptureError(
            f"a tensor that the model computes became a constant without values ({fake[0]}), as torch.func.grad makes "
            "them in torch.export"
        )


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _unlift(program: torch.export.ExportedProgram) -> fx.GraphModule:
    quiet = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    module = program.module(**quiet)
    assert isinstance(module, fx.GraphModule)
    return module
