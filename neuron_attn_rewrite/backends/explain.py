"""`explain(model, *args)`: the report alone, also for a model that only torch.compile can capture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from neuron_attn_rewrite.backends.compile import explain_graphs
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.capture.failures import refuse_inputs
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.errors import CaptureError, InputError, RewriteError
from neuron_attn_rewrite.module import refuse_names
from neuron_attn_rewrite.reasons import LOG
from neuron_attn_rewrite.report.report import RewriteReport
from neuron_attn_rewrite.rewriter import rewrite_graph


def explain(model: nn.Module, *args: Any, config: RewriteConfig | None = None, **kwargs: Any) -> RewriteReport:
    """The report on what `rewrite` would do with a model.

    If the model can't be captured as one graph, it is run once through torch.compile. The report then covers all its
    graphs.

    Args:
        model: as for `rewrite`, or the result of torch.compile.
        args: example positional inputs.
        config: see `RewriteConfig`; `require` has no effect.
        kwargs: example keyword inputs.

    Raises:
        InputError: the example inputs are missing or don't fit the model.
        CaptureError: torch.compile can't take the model either.
    """
    config = replace(RewriteConfig.of(config), require=None)
    if not isinstance(model, nn.Module):
        raise InputError(f"explain needs a model, an nn.Module, not {type(model).__name__}.")
    model = getattr(model, "_orig_mod", model)
    refuse_names(model)
    try:
        captured = capture(model, args, kwargs)
        report = rewrite_graph(captured.module, captured.inputs, config)
    except CaptureError as failed:
        try:
            report = explain_graphs(model, args, kwargs, config)
        except RewriteError:
            raise
        except Exception as error:  # whatever the model or the compiler raises
            refuse_inputs(model, args, kwargs, None)
            raise failed from error
    LOG.info("%s", report)
    return report
