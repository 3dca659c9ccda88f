"""torch.compile(model, backend="neuron_attn_rewrite").

torch finds the backend by the entry point in pyproject.toml, without an import. It rewrites each graph of Dynamo and
passes it to an inner backend. A graph in which nothing is replaced is passed on unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.backends.dynamo import (
    NotAnalysed,
    attentions,
    checkpointed,
    declare_constants,
    may_hold_attention,
    to_aten,
    tracing_as,
    transplant,
)
from neuron_attn_rewrite.capture.export import first_line
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.errors import ConfigError, RewriteError, RewriteWarning
from neuron_attn_rewrite.graph.nodes import module_path
from neuron_attn_rewrite.reasons import LOG, Reason
from neuron_attn_rewrite.report.data import SiteReport
from neuron_attn_rewrite.report.report import RewriteReport
from neuron_attn_rewrite.report.requirements import check_required
from neuron_attn_rewrite.rewriter import rewrite_graph

PREFERRED = ("neuron", "neuron_libtorch")
"""The default inner backends: the first that is installed is used."""
EXTRAS: Mapping[str, str] = {
    "neuron": "TorchNeuron, which comes with the AWS Neuron SDK",
    "neuron_libtorch": "libtorch_neuronx_lite, which comes with the AWS Neuron SDK",
    "openxla": "torch-xla: pip install torch-xla",
}
"""The package that an inner backend needs."""


@dataclass
class GraphReport:
    """One graph of a compiled model."""

    report: RewriteReport
    inner: str
    """The inner backend that compiled it."""
    calls: int = 0
    """How often it has run."""


@dataclass
class CompileReport:
    """The result of `collect_reports`: every graph that was compiled, in order."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def report(self) -> RewriteReport:
        """One report of all graphs.

        Raises:
            RewriteError: no graph was compiled.
        """
        if not self.graphs:
            raise RewriteError("no graph was compiled: call the compiled model inside `with collect_reports()`.")
        return merged([graph.report for graph in self.graphs])

    def __str__(self) -> str:
        if not self.graphs:
            return "no graph was compiled"
        lines = [f"{len(self.graphs)} graphs, compiled by {', '.join(dict.fromkeys(g.inner for g in self.graphs))}"]
        lines += [
            f"graph {i} ran {graph.calls} times, with {len(graph.report.sites)} attentions"
            for i, graph in enumerate(self.graphs)
            if graph.calls > 1 and graph.report.sites
        ]
        return "\n".join([*lines, str(self.report)])


def merged(reports: Sequence[RewriteReport]) -> RewriteReport:
    """One report for several graphs of one model."""
    return replace(
        reports[0],
        sites=tuple(site for report in reports for site in report.sites),
        nodes_before=sum(report.nodes_before for report in reports),
        nodes_after=sum(report.nodes_after for report in reports),
        unused_inputs=(),
    )


_collectors: list[CompileReport] = []


@contextmanager
def collect_reports() -> Iterator[CompileReport]:
    """Collect the report of every graph that this package's backend compiles inside the block."""
    collected = CompileReport()
    _collectors.append(collected)
    try:
        yield collected
    finally:
        _collectors.remove(collected)


def publish(entry: GraphReport) -> None:
    """Log a report and add it to every open `collect_reports` block."""
    LOG.info("%s", entry.report)
    for collected in _collectors:
        collected.graphs.append(entry)


def backend(module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """Rewrite one graph of Dynamo and compile it with the inner backend.

    Args:
        module: the graph. It is changed in place, which torch.compile allows.
        example_inputs: a value for each placeholder.
        kwargs: `options` of torch.compile: "inner", the name of a backend or a callable; "inner_options", its options;
            and any field of `RewriteConfig`. `mode` goes to the inner backend.

    Raises:
        ConfigError: an option is unknown or impossible, or the inner backend is unknown or not installed.
        RewriteError: `require` is not met.
    """
    options = dict(kwargs.pop("options", None) or {})
    inner, inner_options = options.pop("inner", None), options.pop("inner_options", None)
    config = _config(options)
    name, compiler = _inner(inner, example_inputs)
    if inner_options:
        kwargs["options"] = dict(inner_options)
    report = rewrite_dynamo_graph(module, example_inputs, config)
    entry = GraphReport(report, name)
    publish(entry)
    compiled: Callable[..., Any] = compiler(module, example_inputs, **kwargs)
    return _counting(compiled, entry) if _collectors else compiled


def _counting(compiled: Callable[..., Any], entry: GraphReport) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        entry.calls += 1
        return compiled(*args)

    return run


def _config(options: Mapping[str, Any]) -> RewriteConfig:
    allowed = ["inner", "inner_options", *(f.name for f in fields(RewriteConfig))]
    unknown = next((name for name in options if name not in allowed), None)
    if unknown is not None:
        raise ConfigError(
            f"options has no {unknown!r}: choose one of {', '.join(allowed)}. Options of the inner backend go into "
            '"inner_options".'
        )
    return RewriteConfig(**options)


def _inner(inner: Any, example_inputs: Sequence[Any]) -> tuple[str, Callable[..., Any]]:
    """The inner backend, with its name."""
    from torch._dynamo import list_backends, lookup_backend

    if callable(inner):
        return getattr(inner, "__name__", type(inner).__name__), inner
    known = list_backends(exclude_tags=())
    if inner is None:
        on_xla = any(isinstance(value, Tensor) and value.device.type == "xla" for value in example_inputs)
        inner = next((name for name in PREFERRED if name in known), "openxla" if on_xla else "eager")
    if inner == "neuron_attn_rewrite":
        raise ConfigError('inner="neuron_attn_rewrite" would call itself forever. Name another backend.')
    lacks_xla = inner == "openxla" and not _is_installed("torch_xla")
    if inner in EXTRAS and (inner not in known or lacks_xla):
        raise ConfigError(f"inner={inner!r} needs {EXTRAS[inner]}.")
    if inner not in known:
        raise ConfigError(
            f"inner={inner!r} is no backend of torch.compile: choose one of {', '.join(known)}, or pass a callable."
        )
    return inner, lookup_backend(inner)


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def explain_graphs(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], config: RewriteConfig
) -> RewriteReport:
    """The report on all graphs of a model that is run once through torch.compile."""
    reports = []

    def analyse(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        reports.append(rewrite_dynamo_graph(module, example_inputs, config))
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=analyse, dynamic=False)(*args, **kwargs)
    if not reports:
        raise RewriteError("torch.compile finds no graph in this model.")
    return merged(reports)


def rewrite_dynamo_graph(
    module: fx.GraphModule, example_inputs: Sequence[Any] | None, config: RewriteConfig
) -> RewriteReport:
    """Rewrite a graph of Dynamo in place. It is not changed if nothing is replaced.

    Args:
        module: the graph, with shapes on its placeholders.
        example_inputs: a value for each placeholder, to verify with; None if there are none.
        config: see `RewriteConfig`.

    Raises:
        RewriteError: `config.require` is not met.
    """
    if config.gradients is None:
        config = replace(config, gradients=_takes_gradients(example_inputs or ()))
    report = _rewritten(module, example_inputs, replace(config, require=None))
    declare_constants(module)
    if report.sites or config.require == 0:
        check_required(report, config)
    for text in report.warnings:
        warnings.warn(text, RewriteWarning, stacklevel=2)
    return report


def _takes_gradients(inputs: Sequence[Any]) -> bool:
    """Whether torch.compile also compiles the backward of a graph with these inputs, which include the weights."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs)


def _rewritten(module: fx.GraphModule, example_inputs: Sequence[Any] | None, config: RewriteConfig) -> RewriteReport:
    bodies = [body for body in checkpointed(module) if _holds_attention(body)]
    if bodies:
        reason = Reason("beside-checkpoint", "the graph has checkpointed regions, and only those are rewritten")
        return merged([_untouched(module, config, reason), *(_rewritten(body, None, config) for body in bodies)])
    if not _holds_attention(module):
        return _untouched(module, config)
    values = _values(example_inputs or ())
    try:
        with tracing_as(module):
            source = to_aten(module, bool(config.gradients))
            report = replace(rewrite_graph(source, values, config), unused_inputs=())
    except NotAnalysed as error:
        return _untouched(module, config, error.reason)
    except Exception as error:  # a defect of this package must not break a model that runs without it
        if config.strict:
            raise
        LOG.debug("the analysis of a graph failed", exc_info=True)
        words = (
            f"the analysis failed, and the graph is passed on unchanged: {type(error).__name__}: {first_line(error)}"
        )
        warnings.warn(words, RewriteWarning, stacklevel=2)
        return _untouched(module, config, Reason("not-traced", words))
    if report.replaced:
        transplant(source, module)
    return report


def _holds_attention(module: fx.GraphModule) -> bool:
    return any(may_hold_attention(part.graph) for part in module.modules() if isinstance(part, fx.GraphModule))


def _values(inputs: Sequence[Any]) -> list[Any] | None:
    """Values to run the graph with. None without values, or if they are not all plain CPU tensors."""
    values = [v.node.hint if isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)) else v for v in inputs]
    tensors = [v for v in values if isinstance(v, Tensor)]
    on_cpu = all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
    return values if tensors and on_cpu and not any(v is None for v in values) else None


def _untouched(module: fx.GraphModule, config: RewriteConfig, *reasons: Reason) -> RewriteReport:
    """The report on a graph that was not analysed. Attentions are found by the names of their functions."""
    nodes = len(module.graph.nodes)
    sites = tuple(
        SiteReport(module_path(node), str(getattr(node.target, "__name__", node.target)), reasons=reasons)
        for node in attentions(module.graph)
    )
    return RewriteReport(sites, config.target, config.logical_cores, config.policy, nodes, nodes)
