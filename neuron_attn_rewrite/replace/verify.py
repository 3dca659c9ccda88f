"""Compares kernel calls with the attentions that they replace.

Both are in the graph while it runs once on the example inputs. So each kernel call has the inputs of its attention, and
the error of one site does not affect another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.capture.export import first_line
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.errors import CaptureError, RewriteError
from neuron_attn_rewrite.graph.writes import buffers_restored, changed_in_place
from neuron_attn_rewrite.masks.proof import Padding
from neuron_attn_rewrite.masks.spec import EmptyRows
from neuron_attn_rewrite.patterns.axes import run_layout
from neuron_attn_rewrite.patterns.extent import inside
from neuron_attn_rewrite.replace.exact import in_float64
from neuron_attn_rewrite.replace.graft import Graft


def compare(
    module: fx.GraphModule, grafts: Sequence[Graft], inputs: Sequence[Any], config: RewriteConfig
) -> dict[Graft, float]:
    """The relative error of each kernel call against the original.

    If that is above the tolerance, against the original in float64 too, and the smaller error counts: the model may
    round more than the kernel does.
    """
    errors = measure(module, grafts, inputs)
    far = [g for g in grafts if errors[g] > config.tolerance(g.verdict.site.coarsest)]
    exact = measure_exactly(module, far, inputs) if far else {}
    return errors | {g: min(errors[g], error) for g, error in exact.items()}


def measure(module: fx.GraphModule, grafts: Sequence[Graft], inputs: Sequence[Any]) -> dict[Graft, float]:
    """The largest difference of each site's output, relative to its largest magnitude.

    Rows whose output is undefined are ignored. The module's buffers, the inputs and the random state are unchanged.

    Raises:
        CaptureError: the graph does not run on the inputs.
    """
    errors: dict[Graft, float] = {}
    by_result = {g.result: g for g in grafts}

    class Compare(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if node in by_result:
                graft = by_result[node]
                errors[graft] = _difference(self.env[graft.verdict.site.output], value, _defined(graft, self.env))
            return value

    keep_alive = [n for g in grafts for n in _vectors(g)]
    runner = Compare(module)
    for nodes in runner.user_to_last_uses.values():
        nodes[:] = [n for n in nodes if n not in keep_alive]
    _run(runner, module, inputs)
    return errors


def measure_exactly(module: fx.GraphModule, grafts: Sequence[Graft], inputs: Sequence[Any]) -> dict[Graft, float]:
    """As `measure`, against the original in float64. A site that can't run in float64 is left out."""
    errors: dict[Graft, float] = {}
    by_result = {g.result: (g, *inside(g.verdict.site)) for g in grafts}
    keep_alive = {n for g, _, read in by_result.values() for n in (*read, *_vectors(g))}

    class Compare(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if node in by_result:
                graft, nodes, _ = by_result[node]
                exact = in_float64(nodes, self.env, lambda n: self.fetch_attr(str(n.target)))
                if exact is not None:
                    errors[graft] = _difference(exact, value, _defined(graft, self.env))
            return value

    runner = Compare(module)
    for nodes in runner.user_to_last_uses.values():
        nodes[:] = [n for n in nodes if n not in keep_alive]
    _run(runner, module, inputs)
    return errors


def _run(runner: fx.Interpreter, module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Run on the inputs. Those that the graph writes into are copied: they may be weights of a compiled graph."""
    written = changed_in_place(module.graph)
    given = [
        value.clone() if isinstance(value, Tensor) and node in written else value
        for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True)
    ]
    with buffers_restored(module, written), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            runner.run(*given)
        except RewriteError:
            raise
        except Exception as error:  # whatever the model's own operators raise
            raise CaptureError(
                f"the captured graph does not run on the example inputs: {type(error).__name__}: {first_line(error)}\n"
                "Call the model itself with them. If that fails too, pass other example inputs; if it runs, what was "
                "captured is not what the model does, and nothing made from it would run: rewrite the part of the "
                "model (a submodule) that holds its attention, or use torch.compile's backend: docs/backends.md."
            ) from error


def _vectors(graft: Graft) -> list[fx.Node]:
    return [p.node for p in (*graft.proof.paddings, *graft.proof.promised)]


def _difference(old: Tensor, new: Tensor, defined: Tensor | None) -> float:
    old, new = old.detach().double(), new.detach().double()
    if defined is not None:
        keep = defined.expand(old.shape) & ~old.isnan()
        old, new = old.where(keep, 0), new.where(keep, 0)
    scale = old.abs().max().clamp_min(torch.finfo(torch.float32).tiny) if old.numel() else 1.0
    difference = float((old - new).abs().max() / scale) if old.numel() else 0.0
    return difference if difference == difference else torch.inf


def _defined(graft: Graft, env: Mapping[fx.Node, Any]) -> Tensor | None:
    """Bool in the shape of the output, True where a query row has a defined result; None if all have."""
    site, proof = graft.verdict.example, graft.proof
    if proof.empty_rows is not EmptyRows.ANY and not proof.promised:
        return None
    first, end = proof.mask.rows(site.q_len, site.kv_len).unbind(1)
    paddings = [_vector(p, env[p.node], site.kv_len) for p in (*proof.paddings, *proof.promised)]
    keys = reduce(torch.logical_and, paddings, torch.ones(1, site.kv_len, dtype=torch.bool))
    so_far = torch.cat([torch.zeros(len(keys), 1), keys.cumsum(1)], 1)
    rows = so_far[:, end] > so_far[:, first]
    for padding in proof.promised:
        rows = rows & _vector(padding, env[padding.node], site.kv_len)
    full = rows[:, None, :, None].expand(site.batch, site.num_heads, site.q_len, site.v_head_dim)
    moved = run_layout(site.output_layout, full, lambda op, value, arg: getattr(value, op)(arg))
    assert isinstance(moved, Tensor)
    return moved


def _vector(padding: Padding, value: Tensor, kv_len: int) -> Tensor:
    rows = value.reshape(-1, value.shape[-1])[:, padding.start : padding.start + kv_len].bool()
    return ~rows if padding.inverted else rows
