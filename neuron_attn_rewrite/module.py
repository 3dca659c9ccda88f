"""`RewrittenModule`: the rewritten graph as a module with the interface of the original."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.errors import InputError, RewriteError
from neuron_attn_rewrite.graph.sizes import bind

if TYPE_CHECKING:
    from neuron_attn_rewrite.report.report import RewriteReport


PROVEN_VALUES = "neuron_attn_rewrite.proven_values"
"""The key of `module.meta` for the buffers and parameters whose values a proof depends on: their names, and in a
`RewrittenModule` a copy of each value."""

SIGNATURE = "neuron_attn_rewrite.signature"
"""The key of `module.meta` for the signature of the model's `forward`. A graph that was captured before has none."""

MODEL_CONFIG = "neuron_attn_rewrite.model_config"
"""The key of `module.meta` for the `config` of the model, if it has one."""

BEFORE = "A rewritten model is one graph: it has no layers that can be exchanged. {} the original model, then rewrite it."
"""Where to quantise or adapt, with the verb."""


class Weights(nn.Module):
    """The weights of one module of the model. What the module computes is in the graph."""

    def extra_repr(self) -> str:
        """Names the weights, and says what can't be done with them: libraries quote this text in their errors."""
        return f"{', '.join(self._parameters)}: no layer. {BEFORE.format('Quantise or adapt')}"


class RewrittenModule(fx.GraphModule):
    """A rewritten model: same weights, same arguments by position or name, same output structure, and a `report`.

    It is valid for the shapes, dtypes and mode (train or eval) of the example inputs, and raises an error for others.
    A dynamic size takes every value in its range.
    """

    _held: list[tuple[dict[str, Any], str, torch.dtype]] | None = None
    """Each tensor that the graph reads: where it is kept, under which name, and the dtype of the capture."""
    _seen: list[tuple[dict[str, Any], str, torch.Tensor | None, int]] | None = None
    """Each tensor that a proof depends on, as it was when it was compared last: where it is kept, under which name, the
    tensor and its version counter."""

    @classmethod
    def wrap(cls, module: fx.GraphModule, report: RewriteReport) -> RewrittenModule:
        """A module with the graph, parameters and buffers of `module`, and with this report."""
        wrapped = cls(module, module.graph, class_name="RewrittenModule")
        _adopt(module, wrapped)
        for part in wrapped.modules():
            part.training = module.training
        wrapped._hide_layers()
        proven = {name: _attribute(wrapped, name).detach().clone() for name in module.meta.get(PROVEN_VALUES, ())}
        wrapped.meta = {**module.meta, "neuron_attn_rewrite": report, PROVEN_VALUES: proven}
        wrapped._sign()
        return wrapped

    @property
    def report(self) -> RewriteReport:
        """What was replaced, what was kept, and why."""
        report: RewriteReport = self.meta["neuron_attn_rewrite"]
        return report

    @property
    def config(self) -> Any:
        """The `config` of the model, such as that of a model of transformers.

        Raises:
            AttributeError: the model has none.
        """
        if self.meta.get(MODEL_CONFIG) is None:
            raise AttributeError("config")
        return self.meta[MODEL_CONFIG]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point weight; torch's default dtype if there is none."""
        found = (t.dtype for t in self._tensors() if t.is_floating_point())
        return next(found, torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """The device of the first weight; the CPU if there is none."""
        return next((t.device for t in self._tensors()), torch.device("cpu"))

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self.parameters()
        yield from self.buffers()

    def can_generate(self) -> bool:
        """False: a pipeline of transformers asks for this. One graph does not generate token by token."""
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (torch._C._get_tracing_state() or torch.compiler.is_compiling()):
            args, kwargs = (), self._bind(args, kwargs)
            self._check_dtypes()
            self._check_proven_values()
        return super().__call__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        copied: Any = super().__deepcopy__(memo)
        copied._hide_layers()
        copied._sign()
        return cast(RewrittenModule, copied)

    def _hide_layers(self) -> None:
        """Make each module that only holds weights a `Weights`."""
        for part in self.modules():
            if type(part) is nn.Module:
                part.__class__ = Weights

    def _sign(self) -> None:
        """Give `forward` the signature of the model's, for `inspect.signature`."""
        signature = self.meta.get(SIGNATURE)
        if signature is not None:
            first = inspect.Parameter("_self", inspect.Parameter.POSITIONAL_ONLY)
            forward: Any = type(self).forward
            forward.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RewrittenModule:
        """As of nn.Module, for example for `.to(device)`, but dtypes stay.

        Raises:
            RewriteError: `fn` changes the dtype of the weights, as `.half()` does.
        """
        for dtype in {t.dtype for t in self._tensors()}:
            new = fn(torch.empty(0, dtype=dtype)).dtype
            if new != dtype:
                words = str(new).removeprefix("torch.")
                raise RewriteError(
                    f"the graph was captured with weights in {str(dtype).removeprefix('torch.')}, and its proofs hold "
                    f"for that dtype. Convert the original to {words} and rewrite it anew, with inputs in {words}."
                )
        return cast(RewrittenModule, super()._apply(fn, recurse))

    def _refuse_quantisation(self, config: Any) -> None:
        raise RewriteError(BEFORE.format("Quantise"))

    qconfig = property(None, _refuse_quantisation)
    """torch.ao.quantization sets it on each module that it is to quantise."""

    def _check_dtypes(self) -> None:
        """Check that the weights have the dtypes that they were captured with.

        Raises:
            RewriteError: a dtype has changed, for example by `model.half()` of the original, which shares the weights.
        """
        if self._held is None:
            nodes = [n for n in self.graph.find_nodes(op="get_attr") if isinstance(n.meta.get("val"), torch.Tensor)]
            self._held = [(*_place(self, str(n.target)), n.meta["val"].dtype) for n in nodes]
        for tensors, key, dtype in self._held:
            tensor = tensors.get(key)
            if tensor is not None and tensor.dtype != dtype:
                raise RewriteError(
                    f"the weight {key!r} is {tensor.dtype} now, and was captured as {dtype}. The model and the rewritten "
                    "one share their weights. Rewrite the model anew after such a change."
                )

    def train(self, mode: bool = True) -> RewrittenModule:
        """As of nn.Module, but only the mode of the capture is possible.

        Raises:
            RewriteError: `mode` is not the mode of the capture.
        """
        if mode != self.training:
            has, wants = ("train", "eval") if self.training else ("eval", "train")
            raise RewriteError(
                f"this graph was captured in {has} mode: call model.{wants}() on the original and rewrite it again."
            )
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of nn.Module, except for tensors that a proof depends on: they must keep their values.

        If a module that contains this one loads another value, the next call raises the error.

        Raises:
            RewriteError: `state_dict` has another value of such a tensor. Nothing is loaded then.
        """
        for name, value in self.meta.get(PROVEN_VALUES, {}).items():
            new = state_dict.get(name)
            if new is not None and new.shape == value.shape and not _is_equal(new, value):
                raise RewriteError(
                    f"a proof depends on the value of {name!r}, and this state_dict has another value. "
                    "Load it into the original model and rewrite that again."
                )
        return super().load_state_dict(state_dict, strict, assign)

    def _check_proven_values(self) -> None:
        """Compare the tensors that a proof depends on with their values in the proof, if they may have changed.

        A tensor that is the same object with the same version counter has not changed. So a call costs a comparison
        of two numbers for each tensor.

        Raises:
            RewriteError: a value has changed.
        """
        if self._seen is not None:
            for tensors, key, last, version in self._seen:
                if tensors[key] is not last or last._version != version:
                    break
            else:
                return
        self._seen = None
        seen: list[tuple[dict[str, Any], str, torch.Tensor | None, int]] = []
        for name, value in self.meta.get(PROVEN_VALUES, {}).items():
            tensors, key = _place(self, name)
            tensor: Any = tensors[key]
            if not _is_equal(tensor, value):
                raise RewriteError(
                    f"the value of {name!r} has changed since the rewrite, and a proof depends on it. The model and "
                    "the rewritten one share this tensor. Rewrite the model again, or restore the value."
                )
            counted = not tensor.is_inference()  # a tensor of inference mode has no counter: compare it at each call
            seen.append((tensors, key, tensor if counted else None, tensor._version if counted else 0))
        self._seen = seen

    def __reduce__(self) -> Any:
        """A pickle of a graph has no shapes, and a rewritten model checks its arguments with them."""
        raise RewriteError(
            "a rewritten model can't be pickled: save its state_dict() and rewrite the model again, or save "
            "torch.export.export(rewritten, ...) with torch.export.save. To load that, import neuron_attn_rewrite.ops "
            "first: it registers the operators."
        )

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, after a check against the captured ones."""
        expected, signature = self._expected(), self.meta.get(SIGNATURE)
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
        symbols: dict[Any, int] = {}
        for name, values in expected.items():
            was, is_left_out = _describe(values), name not in given
            if is_left_out:
                is_fixed = signature is None and not any(isinstance(v, torch.Tensor) for v in values)
                if name not in defaults and not is_fixed:
                    raise InputError(f"argument {name!r} is missing: it was captured as {was}.")
                given[name] = defaults[name] if name in defaults else values[0] if values else ()
            found = pytree.tree_leaves(given[name])
            wrong = _mismatch(found, values, symbols)
            if wrong is not None:
                now = f"missing: its default is {_describe(found)}" if is_left_out else _describe(found)
                raise InputError(f"argument {name!r} is {now}, but was captured as {was}{wrong}.")
        return {name: given[name] for name in expected}

    def _expected(self) -> dict[str, list[Any]]:
        """The captured value of each leaf of each argument."""
        inputs = self.graph.find_nodes(op="placeholder")
        values = [node.meta.get("val", node.args[0] if node.args else None) for node in inputs]
        info = getattr(self.graph._codegen, "pytree_info", None)
        if info is None:  # each input of the graph is one argument
            return {str(node.target): [value] for node, value in zip(inputs, values, strict=True)}
        expected: dict[str, list[Any]] = {}
        for name, spec in zip(info.orig_args, _per_argument(info.in_spec), strict=True):
            expected[name], values = values[: spec.num_leaves], values[spec.num_leaves :]
        return expected


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


def _mismatch(found: list[Any], expected: list[Any], symbols: dict[Any, int]) -> str | None:
    """None if the values fit the captured ones, otherwise the end of a message: ": " and a reason, or "" without one.

    A symbolic size fits if it has the same value in all arguments and this value is in its range.
    """
    if len(found) != len(expected):
        return ""
    for value, wanted in zip(found, expected, strict=True):
        if not isinstance(value, torch.Tensor) or not isinstance(wanted, torch.Tensor):
            if isinstance(value, torch.Tensor) or isinstance(wanted, torch.Tensor) or value != wanted:
                return ""
        elif value.dtype != wanted.dtype or value.dim() != wanted.dim():
            return ""
        elif (wrong := bind(wanted.shape, value.shape, symbols)) is not None:
            return f": {wrong}" if any(isinstance(size, torch.SymInt) for size in wanted.shape) else ""
    return None


def _describe(values: list[Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
        return repr(value)

    return ", ".join(map(one, values)) or "nothing"


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key


def _place(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a parameter or buffer is kept, and its name there."""
    owner, key = _owner(module, name)
    return (owner._buffers if key in owner._buffers else owner._parameters), key


def _attribute(module: nn.Module, name: str) -> Any:
    owner, key = _owner(module, name)
    return getattr(owner, key)


def _is_equal(found: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a tensor has this value. Any value is possible on the meta device."""
    if found.is_meta or value.is_meta:
        return True
    found = found.detach().to(value.device)
    return found.shape == value.shape and bool(((found == value) | ((found != found) & (value != value))).all())


def _adopt(source: nn.Module, target: nn.Module) -> None:
    """Register every parameter and buffer of `source` in `target`, with the same name and persistence."""
    for path, owner in source.named_modules():
        tensors = {**owner._parameters, **owner._buffers}
        if not tensors:
            continue
        place = target
        for part in path.split(".") if path else ():
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        if place is owner:  # a branch of torch.cond, which both modules hold
            continue
        for name in tensors:
            if name in owner._parameters:
                place.register_parameter(name, owner._parameters[name])
            else:
                place._buffers.pop(name, None)
                persistent = name not in owner._non_persistent_buffers_set
                place.register_buffer(name, owner._buffers[name], persistent=persistent)
