"""Prepares a model for `torch_neuronx.trace`, and checks on any machine how it lowers."""

from __future__ import annotations

import inspect
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.backends.activations import restore_activations
from neuron_attn_rewrite.capture.compare import difference_with_nan
from neuron_attn_rewrite.capture.handed import objects
from neuron_attn_rewrite.capture.objects import leaves as parts
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.errors import InputError, TraceError
from neuron_attn_rewrite.module import SIGNATURE, RewrittenModule
from neuron_attn_rewrite.ops.launch import TARGET, placeholder_kernels
from neuron_attn_rewrite.report.data import SiteReport
from neuron_attn_rewrite.report.report import RewriteReport
from neuron_attn_rewrite.rewriter import rewrite

WHOLE_MODEL = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Tolerance of the output of a lowered model, relative to the largest magnitude. XLA rounds differently."""
CALLS = tuple(getattr(torch.ops.neuron_attn, name).default for name in ("flash_fwd", "flash_prior", "flash_blocks"))


def rewrite_for_trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    config: RewriteConfig | None = None,
) -> RewrittenModule:
    """A rewritten model for `torch_neuronx.trace(rewritten, example_inputs)`.

    Args:
        model: as for `rewrite`.
        example_inputs: as for torch_neuronx.trace, a tensor or a tuple; or a dict of keyword inputs. With a dict, trace
            the result with `tuple(example_inputs.values())`.
        config: see `RewriteConfig`. With `require="all"`, an attention that is not replaced is an error.

    Returns:
        A module that is called by position. A dict or ModelOutput among its outputs is a dict of tensors, and any
        other object, such as a cache, is a tuple of tensors. An output that is None is left out. silu, gelu and
        softmax are called by name, for torch_neuronx to replace.

    Raises:
        InputError: an example input is an object, such as a cache: a trace takes tensors.
        InputError, CaptureError, RewriteError: as `rewrite`.
    """
    for value in objects(example_inputs):
        raise InputError(
            f"an example input is a {type(value).__name__}, and a trace takes tensors: pass the tensors that it holds "
            "to a module of your own that makes it from them and calls the model."
        )
    if isinstance(example_inputs, Mapping):
        rewritten = rewrite(model, (), example_inputs, config=config)
    elif isinstance(example_inputs, (Tensor, tuple, list)):
        rewritten = rewrite(model, example_inputs, config=config)
    else:
        raise InputError(
            f"example_inputs must be a tensor, a tuple or a dict of tensors, not {type(example_inputs).__name__}."
        )
    rewritten.meta.pop(SIGNATURE, None)  # a trace calls by position, in the order of the example inputs
    _plain_outputs(rewritten)
    restore_activations(rewritten)
    return rewritten


def _plain_outputs(module: fx.GraphModule) -> None:
    """Make the outputs of the module dicts, lists and tuples of tensors."""
    codegen: Any = module.graph._codegen
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    leaves = list(pytree.tree_leaves(output.args[0]))
    numbered = pytree.tree_unflatten([_Leaf(i) for i in range(len(leaves))], codegen.pytree_info.out_spec)
    kept, spec = pytree.tree_flatten(_plain(numbered, {i for i, leaf in enumerate(leaves) if leaf is not None}))
    output.args = ([leaves[leaf.index] for leaf in kept],)
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    module.recompile()


@dataclass(frozen=True)
class _Leaf:
    """The place of an output."""

    index: int


def _plain(value: Any, kept: set[int]) -> Any:
    if isinstance(value, _Leaf):
        return value if value.index in kept else None
    if isinstance(value, Mapping):
        plain = {key: _plain(entry, kept) for key, entry in value.items()}
        return {key: entry for key, entry in plain.items() if entry is not None}
    entries = value if isinstance(value, (tuple, list)) else parts(value, (_Leaf,))
    made = [entry for entry in (_plain(entry, kept) for entry in entries) if entry is not None]
    return made if isinstance(value, list) else tuple(made)


@dataclass(frozen=True)
class TraceCheck:
    """The findings of `verify_trace` in the lowered graph."""

    unused_inputs: tuple[str, ...]
    """Inputs that the module reads but the lowered graph does not. They became constants, or were dropped."""
    baked_weights: tuple[str, ...]
    """Parameters and buffers that the module reads but the lowered graph does not."""
    fallbacks: tuple[str, ...]
    """Operators that torch_xla ran on the CPU while it traced. Their results are constants in the graph."""
    kernels: int
    """Number of NKI custom calls."""
    expected_kernels: int | None
    """Number of kernel calls in the graph of the module; None if it has no graph."""
    score_buffers: tuple[str, ...]
    """Shapes of products that give a score for each query and key of a replaced attention. Empty for an attention with
    a dense bias, and for sizes that an attention that was not replaced also has."""
    max_error: float | None
    """Largest difference from the module on the CPU, relative to the largest magnitude. None if it was not run."""
    tolerance: float
    """The largest accepted `max_error`."""
    wrong_aliases: tuple[str, ...] = ()
    """What is wrong with the input-output aliases."""

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each thing that is wrong."""
        found = []
        for name in self.unused_inputs:
            found.append(
                f"input {name} vanished: it is a constant in the lowered graph, or nothing reads it. Trace with an "
                "example that uses it, such as an attention_mask with padding, and do not fix a device in the model."
            )
        found += [f"weight {name} vanished: it is a constant in the lowered graph" for name in self.baked_weights]
        found += self.wrong_aliases
        found += [f"{name} ran on the CPU while tracing: its result is a constant" for name in self.fallbacks]
        if self.expected_kernels is not None and self.kernels != self.expected_kernels:
            found.append(f"{self.kernels} NKI custom calls, but {self.expected_kernels} attentions were replaced")
        found += [f"a buffer {shape} of scores is left" for shape in self.score_buffers]
        if self.max_error is not None and not self.max_error <= self.tolerance:
            found.append(f"the lowered graph's output differs by {self.max_error:.1e}, more than {self.tolerance:g}")
        return tuple(found)

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(self.problems)
        error = "not run" if self.max_error is None else f"differs by {self.max_error:.1e}"
        return f"lowered: {self.kernels} NKI custom calls, every input read, no fallback; output {error}"


def verify_trace(
    module: nn.Module, example_inputs: Any, *, aliases: Mapping[Tensor, int] | None = None, strict: bool = True
) -> TraceCheck:
    """Lower a module through torch_xla on the CPU, as torch_neuronx.trace does, and check the lowered graph.

    To inspect the graph, kernels are lowered as placeholder custom calls. To run it, they are lowered as plain torch
    operators. The module and the inputs are not moved or changed. Weights are copied to the XLA device for the call.

    Args:
        module: the result of `rewrite_for_trace`, or any other module.
        example_inputs: as for torch_neuronx.trace: a tensor, a tuple, or a dict that is passed in its order.
        aliases: as `input_output_aliases` of torch_neuronx.trace: for parameters and buffers the number of the output
            that takes their place.
        strict: raise if anything is wrong.

    Raises:
        TraceError: torch-xla is missing, or `strict` is set and `TraceCheck.problems` is not empty.
    """
    if find_spec("torch_xla") is None:
        raise TraceError("verify_trace needs torch-xla: pip install torch-xla.")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    inputs = tuple(example_inputs.values()) if isinstance(example_inputs, Mapping) else example_inputs
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    lowered = _lower(module, inputs, aliases or {})
    error, tolerance = _difference(module, inputs)
    report = getattr(module, "report", None)
    sites = _without_scores(report.sites) if isinstance(report, RewriteReport) else ()
    calls = [n for n in module.graph.nodes if n.target in CALLS] if isinstance(module, fx.GraphModule) else None
    check = TraceCheck(
        unused_inputs=lowered.unused_inputs,
        baked_weights=lowered.baked_weights,
        fallbacks=lowered.fallbacks,
        kernels=lowered.hlo.count(f'custom_call_target="{TARGET}"'),
        expected_kernels=None if calls is None else len(calls),
        score_buffers=tuple(dict.fromkeys(shape for site in sites for shape in score_buffers(lowered.hlo, site))),
        max_error=error,
        tolerance=tolerance,
        wrong_aliases=lowered.wrong_aliases,
    )
    if strict and check.problems:
        raise TraceError(f"{type(module).__name__} does not lower as it should:\n  " + "\n  ".join(check.problems))
    return check


@dataclass(frozen=True)
class _Lowered:
    hlo: str
    unused_inputs: tuple[str, ...]
    baked_weights: tuple[str, ...]
    fallbacks: tuple[str, ...]
    wrong_aliases: tuple[str, ...]


def lowered_hlo(module: nn.Module, example_inputs: tuple[Any, ...]) -> str:
    """The lowered graph as HLO text, with placeholder calls for kernels. Nothing is executed."""
    return _lower(module, example_inputs, {}).hlo


def _lower(module: nn.Module, inputs: tuple[Any, ...], aliases: Mapping[Tensor, int]) -> _Lowered:
    torch_xla: Any = import_module("torch_xla")
    metrics: Any = import_module("torch_xla.debug.metrics")
    torch_xla.sync()
    given = pytree.tree_map_only(Tensor, lambda t: t.detach().to(torch_xla.device()), inputs)
    weights = _moved_weights(module, torch_xla.device())
    before = _fallback_counts(metrics)
    with placeholder_kernels(), torch.no_grad():
        outputs = torch.func.functional_call(module, weights, given)
        written = [t for t in weights.values() if t._version > 0]
        tensors = [t for t in [*pytree.tree_leaves(outputs), *written] if isinstance(t, Tensor)]
        context = torch_xla._XLAC.lowering.LoweringContext("verify_trace")
        context.build(tensors)
        hlo = torch_xla._XLAC._get_xla_tensors_hlo(tensors)
    fallbacks = tuple(sorted(name for name in _fallback_counts(metrics) - before))
    read_inputs, read_weights = _names_that_are_read(module)
    named = zip(_input_names(module, inputs), pytree.tree_leaves(given), strict=True)
    unused = [
        name
        for name, tensor in named
        if isinstance(tensor, Tensor)
        and context.tensor_parameter_id(tensor) == -1
        and (read_inputs is None or name in read_inputs)
    ]
    baked = [
        name
        for name, tensor in weights.items()
        # torch_xla turns single numbers into constants, like literals. Nobody reads a tensor without elements.
        if tensor.dim()
        and tensor.numel()
        and name in (read_weights or ())
        and context.tensor_parameter_id(tensor) == -1
    ]
    read = {name for name, tensor in weights.items() if context.tensor_parameter_id(tensor) != -1}
    wrong = tuple(_wrong_aliases(module, aliases, pytree.tree_leaves(outputs), read - set(baked)))
    return _Lowered(hlo, tuple(unused), tuple(baked), fallbacks, wrong)


def _wrong_aliases(
    module: nn.Module, aliases: Mapping[Tensor, int], outputs: Sequence[Any], read: set[str]
) -> Iterator[str]:
    """One line for each alias that can't hold, or that a lowered graph would lose.

    Args:
        module: whose parameters and buffers are aliased.
        aliases: as of `verify_trace`.
        outputs: of the module, as a flat list.
        read: the names of the parameters and buffers that the lowered graph reads.
    """
    names = {id(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
    for place, count in Counter(aliases.values()).items():
        if count > 1:
            yield f"{count} tensors are aliased to output {place}"
    for tensor, place in aliases.items():
        name = names.get(id(tensor))
        kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        output = outputs[place] if 0 <= place < len(outputs) else None
        if name is None:
            yield f"a tensor {kind} is aliased, and is no parameter or buffer of the module"
        elif not isinstance(output, Tensor):
            yield f"{name} is aliased to output {place}, and there are {len(outputs)} outputs"
        elif (output.shape, output.dtype) != (tensor.shape, tensor.dtype):
            found = f"{str(output.dtype).removeprefix('torch.')}{list(output.shape)}"
            yield f"{name} is {kind}, and is aliased to output {place}, which is {found}"
        elif name not in read:
            yield f"{name} is aliased, and the lowered graph does not read it: it would lose the alias"


def _moved_weights(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Copies of the weights on the device. Tied weights stay tied."""
    copies: dict[int, Tensor] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: copies.setdefault(id(t), t.detach().to(device)) for name, t in named}


def _fallback_counts(metrics: Any) -> Counter[str]:
    names = [name for name in metrics.counter_names() if name.startswith(("aten::", "neuron_attn::"))]
    return Counter({name: metrics.counter_value(name) for name in names})


def _input_names(module: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    leaves = pytree.tree_leaves(inputs)
    if isinstance(module, fx.GraphModule):
        names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    else:
        names = list(inspect.signature(module.forward).parameters)[: len(inputs)]
    return names if len(names) == len(leaves) else [f"number {i}" for i in range(len(leaves))]


def _names_that_are_read(module: nn.Module) -> tuple[set[str] | None, set[str] | None]:
    """The names of the inputs and of the weights that a graph computes with. None if the module has no graph."""
    if not isinstance(module, fx.GraphModule):
        return None, None
    read = [node for node in module.graph.nodes if any(user.target is not getattr for user in node.users)]
    inputs = {node.name for node in read if node.op == "placeholder"}
    return inputs, {str(node.target) for node in read if node.op == "get_attr"}


def _difference(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[float | None, float]:
    """The error of the lowered module and its tolerance. The error is None if XLA does not run on the CPU."""
    torch_xla: Any = import_module("torch_xla")
    tolerance = max((WHOLE_MODEL.get(t.dtype, 0.0) for t in module.parameters()), default=WHOLE_MODEL[torch.float32])
    if import_module("torch_xla.runtime").device_type() != "CPU":
        return None, tolerance
    given = pytree.tree_map_only(Tensor, lambda t: t.detach().to(torch_xla.device()), inputs)
    with torch.no_grad():
        lowered = torch.func.functional_call(module, _moved_weights(module, torch_xla.device()), given)
        # On copies, because the module may write in place.
        kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
        expected = torch.func.functional_call(module, kept, pytree.tree_map_only(Tensor, torch.clone, inputs))
    errors = [0.0]
    for new, old in zip(pytree.tree_leaves(lowered), pytree.tree_leaves(expected), strict=True):
        if isinstance(old, Tensor) and old.is_floating_point() and old.numel():
            tolerance = max(tolerance, WHOLE_MODEL.get(old.dtype, tolerance))
            errors.append(difference_with_nan(old, new.cpu()))
    return max(errors), tolerance


def _without_scores(sites: Sequence[SiteReport]) -> list[SiteReport]:
    """The replaced attentions of a size that no kept attention has."""
    kept = {(s.q_len, s.kv_len) for s in sites if not s.is_replaced}
    return [site for site in sites if site.is_replaced and (site.q_len, site.kv_len) not in kept]


PRODUCT = re.compile(
    r"\b((?:f32|bf16|f16|f64)\[([\d,]+)\])\S* dot\(\w+\[([\d,]+)\].*lhs_batch_dims=.*lhs_contracting_dims=\{(\d+)\}"
)
"""A batched product in HLO text: its shape, its dims, those of its first operand, and the dim that is summed."""


def score_buffers(hlo: str, site: SiteReport) -> list[str]:
    """Shapes of products in HLO text that give a score for each head, query and key of a replaced attention.

    Only a product is told from a bias or a mask of the same shape. An attention with a bias is left out, because a
    product with the query may make it.
    """
    if site.bias is not None or not site.batch or not site.num_heads or site.q_len is None:
        return []
    if site.kv_len == site.head_dim == site.v_head_dim:  # as the product with the value
        return []
    found = set()
    for shape, dims, first, summed in PRODUCT.findall(hlo):
        *lead, rows, keys = map(int, dims.split(","))
        is_whole = torch.Size(lead).numel() == site.batch * site.num_heads
        if (
            is_whole
            and (rows, keys) == (site.q_len, site.kv_len)
            and int(first.split(",")[int(summed)]) == site.head_dim
        ):
            found.add(shape)
    return sorted(found)
