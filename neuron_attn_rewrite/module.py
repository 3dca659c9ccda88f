"""`RewrittenModule`: the rewritten graph as a module with the interface of the original."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn

from neuron_attn_rewrite.capture import handed
from neuron_attn_rewrite.errors import InputError, RewriteError, RewriteWarning
from neuron_attn_rewrite.graph.calls import Expected, arguments_of
from neuron_attn_rewrite.graph.lookups import share_lookups
from neuron_attn_rewrite.graph.writes import changed_in_place
from neuron_attn_rewrite.report.report import RewriteReport
from neuron_attn_rewrite.storage import file, interface
from neuron_attn_rewrite.storage import graph as graphs
from neuron_attn_rewrite.storage import literals as paths

PROVEN_VALUES = "neuron_attn_rewrite.proven_values"
"""The key of `module.meta` for the buffers and parameters whose values a proof depends on: their names, and in a
`RewrittenModule` a copy of each value."""

SIGNATURE = "neuron_attn_rewrite.signature"
"""The key of `module.meta` for the signature of the model's `forward`. A graph that was captured before has none."""

MODEL_CONFIG = "neuron_attn_rewrite.model_config"
"""The key of `module.meta` for the `config` of the model, if it has one."""

BEFORE = (
    "A rewritten model is one graph: it has no layers that can be exchanged. {} the original model, then rewrite it."
)
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
    _expected: Expected | None = None
    """What the arguments of a call must be."""
    _seen: list[tuple[dict[str, Any], str, torch.Tensor | None, int, torch.Tensor | None]] | None = None
    """Each tensor that a proof depends on, as it was when it was compared last: where it is kept, under which name, the
    tensor, its version counter, and on the CPU an alias that keeps its memory."""

    @classmethod
    def wrap(cls, module: fx.GraphModule, report: RewriteReport) -> RewrittenModule:
        """A module with the graph, parameters and buffers of `module`, and with this report."""
        share_lookups(module.graph)
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
            self._check_dtypes()
            self._check_proven_values()
            return handed.call(self._checked_call, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _checked_call(self, *args: Any, **kwargs: Any) -> Any:
        if self._expected is None:
            self._expected = Expected.of(self.graph)
        given = arguments_of(self._expected, self.meta.get(SIGNATURE), args, kwargs, self._held_tensor())
        return super().__call__(**given)

    def _held_tensor(self) -> torch.Tensor | None:
        """The first tensor with dims that the graph reads from the module. `_check_dtypes` has found them."""
        held = (tensors.get(key) for tensors, key, _ in self._held or ())
        return next((tensor for tensor in held if tensor is not None and tensor.dim()), None)

    def recompile(self) -> Any:
        """As of fx.GraphModule, after a change of the graph."""
        self._expected, self._held = None, None
        return super().recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        self._expected = None  # fake tensors can't be copied, and it is read from the graph again
        copied: Any = super().__deepcopy__(memo)
        for path, part in copied.named_modules():  # torch forgets which buffers are not part of a state_dict
            part._non_persistent_buffers_set = self.get_submodule(path)._non_persistent_buffers_set & set(part._buffers)
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
        apply: Any = super()._apply
        return cast(RewrittenModule, apply(fn, recurse))

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
                    f"the weight {key!r} is {tensor.dtype} now, and was captured as {dtype}. The model and the "
                    "rewritten one share their weights. Rewrite the model anew after such a change."
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

        A tensor that is the same object in the same memory with the same version counter counts as not changed. So a
        call costs a comparison of a few numbers for each tensor. A write through `.data` or NumPy is not seen.

        Raises:
            RewriteError: a value has changed.
        """
        if self._seen is not None:
            for tensors, key, last, version, alias in self._seen:
                if tensors[key] is not last or last._version != version:
                    break
                if alias is not None and last.data_ptr() != alias.data_ptr():  # after `tensor.data = other`
                    break
            else:
                return
        self._seen = None
        seen: list[tuple[dict[str, Any], str, torch.Tensor | None, int, torch.Tensor | None]] = []
        for name, value in self.meta.get(PROVEN_VALUES, {}).items():
            tensors, key = _place(self, name)
            tensor: Any = tensors[key]
            if not _is_equal(tensor, value):
                raise RewriteError(
                    f"the value of {name!r} has changed since the rewrite, and a proof depends on it. The model and "
                    "the rewritten one share this tensor. Rewrite the model again, or restore the value."
                )
            counted = not tensor.is_inference()  # a tensor of inference mode has no counter: compare it at each call
            alias = tensor.detach() if counted and tensor.is_cpu else None
            seen.append((tensors, key, tensor if counted else None, tensor._version if counted else 0, alias))
        self._seen = seen

    def save(self, path: str | Path, *, weights: bool = True) -> None:
        """Write the graph, the weights, the configuration and the report into one file, which needs safetensors.

        Args:
            path: the file. It is replaced if it exists.
            weights: whether parameters and persistent buffers are written. Tensors that are not in a state_dict, and
                those that a proof depends on, always are.

        Raises:
            RewriteError: the graph or a weight can't be saved, or a value that a proof depends on has changed.
        """
        self._check_dtypes()
        self._check_proven_values()
        graph, unknown = graphs.encode(self.graph)
        if unknown:
            words = f"{', '.join(dict.fromkeys(unknown))} among the outputs will be plain dicts or tuples after a load."
            warnings.warn(words, RewriteWarning, stacklevel=2)
        proven, persistent = list(self.meta.get(PROVEN_VALUES, {})), set(self.state_dict(keep_vars=True))
        parameters = dict(self.named_parameters(remove_duplicate=False))
        tensors = {**parameters, **dict(self.named_buffers(remove_duplicate=False))}
        for one, two in file.overlapping(tensors):
            if {one, two} & {str(n.target) for n in changed_in_place(self.graph) if n.op == "get_attr"}:
                raise RewriteError(f"{one!r} and {two!r} share memory that the model writes: a file would part them.")
        left_out = [] if weights else [name for name in tensors if name in persistent and name not in proven]
        document = {
            "graph": graph,
            "training": self.training,
            "signature": interface.encode_signature(self.meta.get(SIGNATURE)),
            "config": interface.encode_config(self.meta.get(MODEL_CONFIG)),
            "report": self.report.to_json(),
            "proven": proven,
            "left_out": {name: [list(tensors[name].shape), str(tensors[name].dtype)] for name in left_out},
            "parameters": {name: parameter.requires_grad for name, parameter in parameters.items()},
            "persistent": sorted(persistent),
        }
        kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        file.write(path, file.Saved(document, kept))

    @classmethod
    def load(
        cls, path: str | Path, *, weights: nn.Module | Mapping[str, torch.Tensor] | None = None
    ) -> RewrittenModule:
        """The module that `save` wrote. The original model is not needed, and no code of the file is run.

        Args:
            path: the file.
            weights: the model, or its state_dict, for a file without weights. They are shared.

        Raises:
            InputError: the file is damaged, of another format, or asks for something that it may not. Or `weights` are
                missing or do not fit.
            RewriteError: safetensors is not installed, or a value in `weights` is not the one that a proof depends on.
        """
        saved = file.read(path)
        with file.damaged(path, saved):
            document = saved.document
            left_out, proven = document["left_out"], list(document["proven"])
            if left_out and weights is None:
                raise InputError("the file has no weights: give the model or its state_dict as weights.")
            graph, missing = graphs.decode(document["graph"])
            given = {} if weights is None else file.given_weights(left_out, weights, proven)
            report = RewriteReport.from_json(document["report"])
            signature = interface.decode_signature(document["signature"])
            config = interface.decode_config(document["config"])
            root = _with_tensors({**saved.tensors, **given}, dict(document["parameters"]), set(document["persistent"]))
            module = fx.GraphModule(root, graph)
            _adopt(root, module)
            module.train(bool(document["training"]))
            module.meta = {PROVEN_VALUES: proven, MODEL_CONFIG: config}
            module.meta |= {} if signature is None else {SIGNATURE: signature}
            for node in graph.find_nodes(op="get_attr"):
                node.meta["val"] = _attribute(root, str(node.target)).detach().to("meta")
            loaded = cls.wrap(module, report)
            for name in proven:
                if name in given and not _is_equal(given[name], saved.tensors[name]):
                    raise RewriteError(
                        f"a proof depends on the value of {name!r}, and these weights have another value. Rewrite the "
                        "model that has them."
                    )
        if saved.made_with:
            words = f"this file was written by {saved.made_with}, and is read by {file.versions()}."
            warnings.warn(words, RewriteWarning, stacklevel=2)
        if missing:
            words = f"{', '.join(dict.fromkeys(missing))} is not installed: such outputs are plain dicts or tuples now."
            warnings.warn(words, RewriteWarning, stacklevel=2)
        return loaded

    def __reduce__(self) -> Any:
        """A pickle of a graph has no shapes, and a rewritten model checks its arguments with them."""
        raise RewriteError("a rewritten model can't be pickled: use its save(path), and RewrittenModule.load(path).")


@functools.cache
def _own_names() -> frozenset[str]:
    """The names that a rewritten model has itself, and that none of its tensors or modules can have."""
    # These two are found among the tensors and modules of the model if it has them.
    return frozenset(dir(RewrittenModule(nn.Module(), fx.Graph()))) - {"config", "qconfig"}


def refuse_names(model: nn.Module | torch.export.ExportedProgram) -> None:
    """Refuse a model of which a tensor, or a module with weights, has a name that a rewritten model needs itself.

    Raises:
        InputError: there is one.
    """
    if isinstance(model, torch.export.ExportedProgram):
        names: Mapping[str, Any] = {**model.state_dict, **model.constants}
    elif isinstance(model, nn.Module) and not isinstance(model, RewrittenModule):
        plain = [(name, value) for name, value in vars(model).items() if isinstance(value, torch.Tensor)]
        names = dict([*plain, *model.named_parameters(), *model.named_buffers()])
    else:
        return
    taken = sorted({name.split(".")[0] for name in names} & _own_names())
    if taken:
        raise InputError(
            f"{type(model).__name__} has a tensor or module named {', '.join(map(repr, taken))}, and a rewritten model "
            "has an attribute of that name itself. Rename it, or rewrite a module of your own that holds and calls "
            "the model."
        )


def _with_tensors(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, bool], persistent: set[str]
) -> nn.Module:
    """A module with these tensors under their names. A tensor that comes under several names stays one.

    Args:
        tensors: by name.
        parameters: which of them are parameters, and whether these require gradients.
        persistent: which of them are part of a state_dict.
    """
    root, made = nn.Module(), dict[int, nn.Parameter]()
    for name, tensor in tensors.items():
        owner = root
        *path, key = paths.path(name).split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if name not in parameters:
            owner.register_buffer(key, tensor, persistent=name in persistent)
            continue
        if isinstance(tensor, nn.Parameter):
            made[id(tensor)] = tensor
        elif id(tensor) not in made:
            made[id(tensor)] = nn.Parameter(tensor, requires_grad=bool(parameters[name]))
        owner.register_parameter(key, made[id(tensor)])
    return root


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
