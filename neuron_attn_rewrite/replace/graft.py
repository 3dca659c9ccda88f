"""Adds kernel calls beside the attentions that they can replace. It changes nothing that is already in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from neuron_attn_rewrite.graph.writes import Writes
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.replace.emit import Emitter
from neuron_attn_rewrite.strategy.decide import Verdict


@dataclass(frozen=True, eq=False)
class Graft:
    """A kernel call beside the attention that it can replace."""

    verdict: Verdict
    proof: Proof
    result: fx.Node
    """The node that can replace `verdict.site.output`."""
    added: tuple[fx.Node, ...]
    """Every node that was added for the call."""


def graft(module: fx.GraphModule, verdicts: Sequence[Verdict], writes: Writes) -> list[Graft]:
    """Add one kernel call for each verdict.

    Args:
        module: the graph.
        verdicts: those for a kernel.
        writes: the writes of the graph.
    """
    emitter = Emitter(module, writes)
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    grafts = []
    for verdict in sorted(verdicts, key=lambda verdict: position[verdict.site.output]):
        assert isinstance(verdict.proof, Proof) and verdict.form
        emitter.added = []
        result = emitter.kernel_call(verdict.form, verdict.decision)
        grafts.append(Graft(verdict, verdict.proof, result, tuple(emitter.added)))
    return grafts
