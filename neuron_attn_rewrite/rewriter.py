"""All steps of a rewrite: capture, find, prove, choose, replace, verify, report."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

import neuron_attn_rewrite.ops  # noqa: F401  registers torch.ops.neuron_attn
from neuron_attn_rewrite.capture.compare import capture_error
from neuron_attn_rewrite.capture.export import Captured, capture
from neuron_attn_rewrite.capture.own_gradients import REMEDY
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.errors import CaptureError, RewriteWarning
from neuron_attn_rewrite.masks.prove import Prover
from neuron_attn_rewrite.module import MODEL_CONFIG, PROVEN_VALUES, SIGNATURE, RewrittenModule, refuse_names
from neuron_attn_rewrite.patterns.find import find
from neuron_attn_rewrite.reasons import LOG
from neuron_attn_rewrite.replace.commit import commit
from neuron_attn_rewrite.replace.graft import graft
from neuron_attn_rewrite.replace.verify import compare
from neuron_attn_rewrite.report.build import make_report, snapshot
from neuron_attn_rewrite.report.report import RewriteReport
from neuron_attn_rewrite.report.requirements import check_required, unmatched_sites
from neuron_attn_rewrite.strategy.decide import Verdict, decide
from neuron_attn_rewrite.values.evaluator import note_examples


def rewrite(
    model: nn.Module | torch.export.ExportedProgram,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: RewriteConfig | None = None,
    dynamic_shapes: Any = None,
) -> RewrittenModule:
    """A module that computes what `model` computes, with one kernel call for each attention that can be replaced.

    Args:
        model: an nn.Module, an ExportedProgram, or an FX GraphModule. It is not changed. The result shares its
            parameters and buffers: a write into one of these tensors reaches both. If a proof depends on the value,
            the next call is an error. Everything else (code, attributes, modules, adapters, modes) is fixed now: a
            later change of the model does not reach the result.
        args: example positional inputs. The result is made for their shapes and dtypes.
        kwargs: example keyword inputs.
        config: see `RewriteConfig`.
        dynamic_shapes: sizes that stay open, as for `torch.export.export`. The result takes every value of them, and
            the masks are proven for every value.

    Raises:
        InputError: the example inputs are missing or don't fit.
        CaptureError: the model can't be captured as one graph, or that graph does not run on the example inputs, or it
            does not compute or write what the model does. Or it may be trained and lacks gradients that the model
            defines itself.
        RewriteError: `config.require` is not met.
    """
    config = RewriteConfig.of(config)
    if isinstance(model, RewrittenModule):
        words = "this model is rewritten already, and its kernel calls stay. Rewrite the original to choose again."
        warnings.warn(words, RewriteWarning, stacklevel=2)
    refuse_names(model)
    captured = capture(model, args, kwargs, dynamic_shapes)
    _check_gradients(captured, config)
    drift = capture_error(model, captured) if config.verify else None
    report = replace(rewrite_graph(captured.module, captured.inputs, config), capture_error=drift)
    LOG.info("%s", report)
    for text in (*report.warnings, *unmatched_sites(report, config)):
        warnings.warn(text, RewriteWarning, stacklevel=2)
    if captured.signature is not None:  # a graph that is rewritten again keeps what it has
        model_config = getattr(model, "config", None)
        is_weight = isinstance(model_config, (torch.Tensor, nn.Module))
        captured.module.meta |= {SIGNATURE: captured.signature, MODEL_CONFIG: None if is_weight else model_config}
    return RewrittenModule.wrap(captured.module, report)


def rewrite_graph(module: fx.GraphModule, inputs: Sequence[Any] | None, config: RewriteConfig) -> RewriteReport:
    """Everything after capture. `module` is changed.

    Args:
        module: a normalised graph, as `capture` makes it.
        inputs: a value for each placeholder, to compare kernel and original with. None if there are no values.
        config: see `RewriteConfig`.

    Raises:
        RewriteError: `config.require` is not met.
    """
    config = replace(config, gradients=_takes_gradients(module, config))
    if inputs is not None:
        note_examples(module.graph, inputs)
    prover = Prover(module, config)
    before = snapshot(module.graph)
    verdicts = [decide(site, prover, config) for site in find(module, prover.evaluator, config.strict)]
    replaced = [verdict for verdict in verdicts if isinstance(verdict, Verdict) and verdict.is_replaced]
    grafts, failed = graft(module, replaced, prover.writes, config.strict)
    verdicts = [failed.get(id(verdict), verdict) for verdict in verdicts]
    errors = compare(module, grafts, inputs, config) if config.verify and inputs is not None else {}
    accepted = [g for g in grafts if g not in errors or errors[g].error <= config.tolerance(g.verdict.site.coarsest)]
    module.meta[PROVEN_VALUES] = commit(module, accepted)
    report = make_report(module.graph, before, verdicts, grafts, errors, config)
    check_required(report, config)
    return report


def _takes_gradients(module: nn.Module, config: RewriteConfig) -> bool:
    trains = module.training and any(parameter.requires_grad for parameter in module.parameters())
    return trains if config.gradients is None else config.gradients


def _check_gradients(captured: Captured, config: RewriteConfig) -> None:
    """Check that a graph that may be trained has the gradients of the model.

    Raises:
        CaptureError: the model defines some itself.
    """
    if captured.own_gradients and _takes_gradients(captured.module, config):
        raise CaptureError(
            f"the model defines gradients itself ({', '.join(captured.own_gradients)}), and the captured graph has "
            "those of the operators in its forward. If no gradients will be taken, call model.eval() or set "
            f"RewriteConfig(gradients=False). {REMEDY}"
        )
