"""Compares a captured graph with the model, over several calls if the model has state.

A copy of the model is called, so the model's own buffers, caches and counters stay as they are. Weights are shared.
Each call has the example inputs, but positions such as `cache_position` go on where the call before has ended.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.capture import handed
from neuron_attn_rewrite.capture.dialects import plain_transformers
from neuron_attn_rewrite.capture.export import Captured
from neuron_attn_rewrite.capture.objects import leaves
from neuron_attn_rewrite.capture.state import state
from neuron_attn_rewrite.errors import CaptureError
from neuron_attn_rewrite.graph.nodes import attribute, draws, tensor
from neuron_attn_rewrite.graph.writes import buffers_restored, changed_in_place

CALLS = 3
"""How often a model with state is called."""
LARGEST_ERROR, LARGEST_ERROR_OF_HALF = 1e-3, 5e-2
"""The largest difference that rounding can explain, through all layers of a model, relative to the largest magnitude of
each output. The second one is for models that compute in float16 or bfloat16."""
HALF = (torch.float16, torch.bfloat16)


def capture_error(model: Any, captured: Captured) -> float | None:
    """How far a captured graph is from the model on the example call, relative to the largest of each output.

    None if they can't be compared: there are no values, the model can't be copied or called, the outputs have other
    shapes, or random numbers are drawn in another order.

    Raises:
        CaptureError: the difference is larger than rounding can explain, or the graph does not write what the model
            writes.
    """
    if captured.call is None or captured.example is None or not isinstance(model, nn.Module):
        return None
    graph = captured.module.graph
    changed = changed_in_place(graph)
    parameters = {id(t): t for n in changed if n.op == "get_attr" and isinstance(t := attribute(n), nn.Parameter)}
    twin = _copy_of(model, parameters)
    if twin is None:
        return None
    limit = LARGEST_ERROR_OF_HALF if any(_is_half(node) for node in graph.nodes) else LARGEST_ERROR
    is_random = any(draws(node) for node in graph.nodes)
    worst: float | None = None
    with buffers_restored(captured.module, changed), torch.random.fork_rng(devices=[]):
        for call in range(CALLS):
            counters = _counters(twin)
            old = _outputs(twin, captured.example, call)
            writes = {} if call else _writes(model, twin, parameters)
            new = _outputs(partial(handed.call, captured.module), captured.call, call)
            if old is None or new is None or [t.shape for t in old] != [t.shape for t in new]:
                return worst
            _check_writes(writes, captured.module, torch.inf if is_random else limit)
            error = max((relative_difference(a, b) for a, b in zip(old, new, strict=True)), default=None)
            if error is not None and error > limit:
                if is_random:
                    return None
                raise _another(
                    error, call, [path for path, was in _counters(twin).items() if counters.get(path) != was]
                )
            worst = error if worst is None or error is None else max(worst, error)
            if _counters(twin) == counters:
                break
    return worst


def _another(error: float, call: int, changed: Sequence[str]) -> CaptureError:
    if call:
        kept = f" (it changes {', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''})" if changed else ""
        return CaptureError(
            f"the captured graph is not the model: it agrees with the model at the first call, but differs by "
            f"{error:.1%} of the largest output at call {call + 1}. Either the model keeps something between calls"
            f"{kept} that the graph does not keep, or a number that it reads from its state became a constant in the "
            "graph, such as the length of a cache. Register what is kept as a buffer and write it in place, or pass it "
            "(or the mask and the positions that are computed from it) as an input."
        )
    return CaptureError(
        f"the captured graph is not the model: on the example inputs, before anything was replaced, outputs differ by "
        f"{error:.1%} of their largest magnitude. Some models take another path while they are traced, most often if "
        "a mask is all ones: pass an example that has padding. RewriteConfig(verify=False) skips this comparison."
    )


def _copy_of(model: nn.Module, written: Collection[int]) -> nn.Module | None:
    """A copy with the model's parameters, and with buffers and other state of its own. None if it can't be made.

    Parameters whose ids are in `written` are copied too.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if id(p) not in written}
    try:
        for _, part in state(model):
            if isinstance(part, Tensor) and id(part) not in memo:
                memo[id(part)] = copy.deepcopy(part.detach(), memo)
        return copy.deepcopy(model, memo)
    except Exception:  # whatever an attribute of the model raises
        return None


def _counters(model: nn.Module) -> dict[str, Any]:
    """What tells whether a call changed the state: a version of each tensor, and each plain value."""
    return {
        path: (id(part), None if part.is_inference() else part._version) if isinstance(part, Tensor) else part
        for path, part in state(model)
    }


def _writes(model: nn.Module, called: nn.Module, written: Collection[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each tensor of the model that a call of a copy has changed: a copy of its value before, and its value after."""
    after = {**dict(called.named_parameters()), **dict(state(called))}
    parameters = [(name, p.detach()) for name, p in model.named_parameters() if id(p) in written]
    buffers = {id(b) for b in model.buffers()}
    memory = {b.untyped_storage()._cdata for b in model.buffers() if type(b) is Tensor}
    changed = {}
    for path, was in (*parameters, *state(model)):
        now = after.get(path)
        now = now.detach() if isinstance(now, nn.Parameter) else now
        if type(was) is not Tensor or type(now) is not Tensor:
            continue
        is_view = id(was) not in buffers and was.untyped_storage()._cdata in memory
        if not is_view and not _is_equal(was, now):
            changed[path] = was.detach().clone(), now
    return changed


def _check_writes(writes: Mapping[str, tuple[Tensor, Tensor]], module: fx.GraphModule, limit: float) -> None:
    """Check that the graph has written each tensor that the model has written.

    Raises:
        CaptureError: it has not.
    """
    buffers = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for path, (was, now) in writes.items():
        written = buffers.get(path)
        if written is None or _is_equal(was, written) or relative_difference(now, written) > limit:
            is_other = written is not None and not _is_equal(was, written)
            raise CaptureError(
                f"the model writes into {path}, {'a tensor that is no buffer' if written is None else 'a buffer'}, and "
                f"the captured graph {'writes other values' if is_other else 'does not write the same'}: a second call "
                f"of the result would be wrong. {OTHER_VALUES if is_other else NO_WRITE}"
            )


NO_WRITE = (
    "Register the tensor as a buffer of the module that writes it, under one name, and write it in place (copy_, "
    "index_copy_), or pass it as an input and return it."
)
OTHER_VALUES = (
    "Most often a number that the model reads from its state, such as the length of a cache, became a constant in the "
    "graph: pass it, or the mask and the positions that are computed from it, as an input."
)


def _outputs(
    run: Callable[..., Any], call: tuple[tuple[Any, ...], Mapping[str, Any]], number: int
) -> list[Tensor] | None:
    """The floating-point and complex outputs of the call with this number, on copies of its inputs. None if it fails.

    Tensors of objects among the inputs count as outputs: the call may change the objects.
    """
    try:
        given = pytree.tree_map_only(Tensor, lambda t: _advanced(t.detach(), number).clone(), handed.opened(call))
        args, kwargs = handed.closed(given)
        torch.manual_seed(number)
        with torch.no_grad(), plain_transformers():  # the fast path of torch.nn gives other numbers where padding is
            found = leaves([run(*args, **kwargs), *handed.objects((args, kwargs))])
    except Exception:  # whatever the model's own operators raise
        return None
    return [t.clone() for t in found if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def _advanced(value: Tensor, calls: int) -> Tensor:
    """Positions, which are consecutive integers, of a later call. Other tensors stay the same."""
    is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not calls or not is_integer or value.dim() > 1 or not bool((value.reshape(-1).diff() == 1).all()):
        return value
    return value + calls * value.numel()


def _is_half(node: fx.Node) -> bool:
    value = tensor(node)
    return value is not None and value.dtype in HALF


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and relative_difference(a, b) == 0


def relative_difference(old: Tensor, new: Tensor) -> float:
    """The largest difference relative to the largest magnitude. Elements that are NaN in `old` don't count."""
    if not old.numel():
        return 0.0
    old, new = (t if t.layout is torch.strided else t.to_dense() for t in (old, new))
    old, new = (torch.view_as_real(t) if t.is_complex() else t for t in (old.detach(), new.detach()))
    old, new = old.double(), new.double()
    difference = (old - new).abs().where(~old.isnan() & (old != new), 0).nan_to_num(torch.inf, torch.inf)
    largest = old.abs().where(old.isfinite(), 0).max().clamp_min(torch.finfo(torch.float32).tiny)
    return float(difference.max() / largest)


def difference_with_nan(old: Tensor, new: Tensor) -> float:
    """The same, but infinite if one has NaN where the other has not."""
    old, new = (t if t.layout is torch.strided else t.to_dense() for t in (old, new))
    return relative_difference(old, new) if torch.equal(old.isnan(), new.isnan()) else torch.inf
