"""Compares kernel calls with the attentions that they replace.

Both are in the graph while it runs. So each kernel call has the inputs of its attention, and the error of one site does
not affect another. There are three comparisons:

* of each attention, on the example inputs and on inputs that are drawn (`draws.py`);
* of each attention, with masks from the drawn inputs and with operands that are drawn too (`operands.py`);
* of the outputs of the graph: something behind an attention may read what is not compared there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, fx

from neuron_attn_rewrite.capture.export import first_line
from neuron_attn_rewrite.capture.objects import leaves
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.errors import CaptureError, InputError
from neuron_attn_rewrite.graph.nodes import tensor
from neuron_attn_rewrite.graph.sizes import at, number_of
from neuron_attn_rewrite.reasons import internal_error
from neuron_attn_rewrite.replace.differences import Measured, output_error
from neuron_attn_rewrite.replace.draws import Draw, draws
from neuron_attn_rewrite.replace.graft import Graft
from neuron_attn_rewrite.replace.lookups import out_of_range
from neuron_attn_rewrite.replace.operands import drawn_operands
from neuron_attn_rewrite.replace.running import ModelError, Runs, Values, Visit

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]

MOST_ELEMENTS = 2**26
"""The graph runs as a whole on as many draws as have this many elements together, counted in all of its tensors."""
LARGEST_GROWTH = 10.0
"""How much larger the error of an output may be than the tolerance, before it is compared with what noise does."""
LARGEST_NOISE = 4.0
"""How much larger the error of an output may be than that of noise of the accepted size."""


@dataclass(frozen=True)
class Compared:
    """How one kernel call compares with its attention."""

    error: float = 0.0
    """The largest error that was found, relative to the largest magnitude. Infinite if the kernel call raises one."""
    where: str = ""
    """The inputs on which it was found, and the error that was raised."""
    draws: int = 0
    """On how many draws of the inputs the attention was compared."""


Errors = dict[Graft, Compared]


def compare(
    module: fx.GraphModule, grafts: Sequence[Graft], inputs: Sequence[Any], config: RewriteConfig
) -> dict[Graft, Compared]:
    """The relative error of each kernel call against the original, the largest over the example and all draws.

    The module's buffers, the inputs and the random state are unchanged.

    Raises:
        InputError: an example input holds an index out of range.
        CaptureError: the graph does not run on the example inputs for another reason.
    """
    runs, measured = Runs(module, grafts), Measured(module.graph, config)
    try:
        found = _compare_graph(runs, grafts, measured, inputs, "on the example inputs")
    except ModelError as failure:
        error = failure.error
        named = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
        words = out_of_range(failure.node, failure.values, named)
        if words is not None:
            raise InputError(words) from error
        raise CaptureError(
            f"the captured graph does not run on the example inputs: {type(error).__name__}: {first_line(error)}\n"
            "Call the model itself with them. If that fails too, pass other example inputs; if it runs, what was "
            "captured is not what the model does, and nothing made from it would run: rewrite the part of the "
            "model (a submodule) that holds its attention, or use torch.compile's backend: docs/backends.md."
        ) from error
    try:
        for errors in _compare_draws(runs, grafts, measured, inputs) if grafts else ():
            found = {g: _worse(found[g], errors.get(g)) for g in grafts}
    except Exception as error:
        internal_error(error, config.strict)
    return found


def _compare_draws(
    runs: Runs, grafts: Sequence[Graft], measured: Measured, inputs: Sequence[Any]
) -> Iterator[Mapping[Graft, Compared]]:
    """The errors on each draw of the inputs. An attention is left out if it can't be compared there."""
    drawn = draws(runs.module.graph, grafts, inputs)
    graph_runs = drawn[::-1][: MOST_ELEMENTS // _elements(runs.module.graph, measured.sizes)]
    fit, makers = drawn_operands(grafts, runs.changed, measured.sizes)
    for draw in drawn:
        where = f"on inputs {draw.words}"
        g = Generator().manual_seed(draw.seed)
        given = {node: partial(make, g) for node, make in makers.items()}
        errors = _first(draw, lambda v: _run_beside(runs, fit, measured, v, where, given)[1])  # noqa: B023
        if draw in graph_runs:
            whole = _first(draw, lambda v: _compare_graph(runs, grafts, measured, v, where))  # noqa: B023
            errors = {g: _worse(errors.get(g, Compared()), whole.get(g)) for g in {**errors, **whole}}
        yield {g: replace(error, draws=1) for g, error in errors.items()}


def _first(draw: Draw, compare: Callable[[Sequence[Any]], Errors]) -> Errors:
    """The errors on the first values of a draw on which the model runs. Empty if there are none."""
    for values in draw.tries:
        with suppress(ModelError):
            return compare(values)
    return {}


def _compare_graph(
    runs: Runs, grafts: Sequence[Graft], measured: Measured, inputs: Sequence[Any], where: str
) -> Errors:
    """The errors of each attention and, of those that are right, the errors that they cause in the graph's outputs."""
    outputs, errors = _run_beside(runs, grafts, measured, inputs, where)
    right = [g for g in grafts if errors[g].error <= measured.tolerance(g)]
    caused = _output_errors(runs, right, measured, inputs, outputs)
    return errors | {g: Compared(error, f"in the outputs of the model, {where}") for g, error in caused.items()}


def _run_beside(
    runs: Runs,
    grafts: Sequence[Graft],
    measured: Measured,
    inputs: Sequence[Any],
    where: str,
    given: Mapping[fx.Node, Callable[[], Tensor]] | None = None,
) -> tuple[list[Tensor], Errors]:
    """The outputs of the graph with the original attentions, and the error of each kernel call beside them."""
    errors: Errors = {}

    def visit(graft: Graft, values: Values, result: Tensor | Exception) -> None:
        if isinstance(result, Exception):
            raised = f"the kernel call raises {type(result).__name__}: {first_line(result)}"
            errors[graft] = Compared(torch.inf, f"{where}, {raised}")
        else:
            errors[graft] = Compared(measured.error(graft, values, result), where)

    outputs = runs.run(inputs, {g: measured.reads(g) for g in grafts}, visit, given)
    return _floating(outputs), errors


def _output_errors(
    runs: Runs, grafts: Sequence[Graft], measured: Measured, inputs: Sequence[Any], old: Sequence[Tensor]
) -> dict[Graft, float]:
    """The error of the graph's outputs for those kernel calls that make it too large. Empty if none does.

    A model may make much of a little rounding. So the error is too large only if it is larger than what noise of the
    accepted size at the same places causes.
    """

    def error(replaced: Sequence[Graft], change: Visit) -> float:
        try:
            new = _floating(runs.run(inputs, {g: measured.reads(g) for g in replaced}, change))
        except ModelError:
            return torch.inf
        return max(output_error(a, b) for a, b in zip(old, new, strict=True))

    if not grafts or not old:
        return {}
    limit = LARGEST_GROWTH * max(map(measured.tolerance, grafts))
    together = error(grafts, measured.instead)
    if together > limit:
        limit = max(limit, LARGEST_NOISE * error(grafts, measured.noise))
    if together <= limit:
        return {}
    alone = {g: error([g], measured.instead) for g in grafts}
    return {g: error for g, error in alone.items() if error > limit} or dict.fromkeys(grafts, together)


def _worse(a: Compared, b: Compared | None) -> Compared:
    """The one with the larger error, with the draws of both."""
    if b is None:
        return a
    return replace(b if b.error > a.error else a, draws=a.draws + b.draws)


def _floating(outputs: Any) -> list[Tensor]:
    return [t for t in leaves(outputs) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def _elements(graph: fx.Graph, sizes: Mapping[sympy.Symbol, int]) -> int:
    """How many elements the tensors of a graph have, weights included."""
    values = [value for node in graph.nodes if (value := tensor(node)) is not None]
    return sum(math.prod(at(number_of(size), sizes) for size in value.shape) for value in values)
