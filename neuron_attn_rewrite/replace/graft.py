"""Adds kernel calls beside the attentions that they can replace. It changes nothing that is already in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from neuron_attn_rewrite.graph.writes import Writes
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.patterns.site import UnknownAttention
from neuron_attn_rewrite.reasons import internal_error
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


def graft(
    module: fx.GraphModule, verdicts: Sequence[Verdict], writes: Writes, strict: bool
) -> tuple[list[Graft], dict[int, UnknownAttention]]:
    """Add one kernel call for each verdict. Nodes of a call that fails are unused, and `commit` removes them.

    Args:
        module: the graph.
        verdicts: those for a kernel.
        writes: the writes of the graph.
        strict: whether an internal error is raised.

    Returns:
        The calls; and for each verdict whose call failed, by its id, what takes its place.
    """
    emitter = Emitter(module, writes)
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    grafts: list[Graft] = []
    failed: dict[int, UnknownAttention] = {}
    for verdict in sorted(verdicts, key=lambda verdict: position[verdict.site.output]):
        assert isinstance(verdict.proof, Proof) and verdict.form
        emitter.added = []
        try:
            result = emitter.kernel_call(verdict.form, verdict.decision)
        except Exception as error:
            site, reason = verdict.site, internal_error(error, strict)
            failed[id(verdict)] = UnknownAttention(site.name, site.pattern, site.anchor, reason)
            continue
        grafts.append(Graft(verdict, verdict.proof, result, tuple(emitter.added)))
    return grafts, failed
