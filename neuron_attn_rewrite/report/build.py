"""From a finished rewrite to its report. Counts come from the final graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from neuron_attn_rewrite.config import RewriteConfig
from neuron_attn_rewrite.graph import tensor
from neuron_attn_rewrite.masks.prove import Proof
from neuron_attn_rewrite.patterns.site import UnknownAttention
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.replace import Graft, Plan
from neuron_attn_rewrite.report.model import RewriteReport, SiteReport


def snapshot(graph: fx.Graph) -> dict[str, list[str]]:
    """What each node reads, by name: outlives the nodes."""
    return {node.name: [n.name for n in node.all_input_nodes] for node in graph.nodes}


def make_report(
    graph: fx.Graph,
    before: Mapping[str, Sequence[str]],
    plans: Sequence[Plan | UnknownAttention],
    grafts: Sequence[Graft],
    errors: Mapping[Graft, float],
    config: RewriteConfig,
) -> RewriteReport:
    """One line for each site, in the order of the graph."""
    present = {node.name for node in graph.nodes}
    gone = set(before) - present
    read = {name for inputs in before.values() for name in inputs}
    sites = []
    for plan in plans:
        if isinstance(plan, UnknownAttention):
            sites.append(SiteReport(plan.name, plan.pattern, reasons=(plan.reason,)))
            continue
        made = next((g for g in grafts if g.plan is plan), None)
        added = tuple(n.name for n in made.added if n.name in present) if made else ()
        removed = _reached(plan.site.output.name, before, gone) if made and made.result.name in present else ()
        gone -= set(removed)
        sites.append(_site(plan, made, added if removed else (), removed, errors, config))
    return RewriteReport(
        sites=tuple(sites),
        target=config.target,
        lnc=config.logical_cores,
        policy=config.policy,
        nodes_before=len(before),
        nodes_after=len(present),
        unused_inputs=tuple(
            n.name for n in graph.find_nodes(op="placeholder") if tensor(n) is not None and n.name not in read
        ),
    )


def _reached(start: str, before: Mapping[str, Sequence[str]], gone: set[str]) -> tuple[str, ...]:
    """The removed nodes on which `start` depended through removed nodes alone, in the order of the graph."""
    reached, stack = set(), [start]
    while stack:
        name = stack.pop()
        if name in gone and name not in reached:
            reached.add(name)
            stack += before[name]
    return tuple(name for name in before if name in reached)


def _site(
    plan: Plan,
    made: Graft | None,
    added: tuple[str, ...],
    removed: tuple[str, ...],
    errors: Mapping[Graft, float],
    config: RewriteConfig,
) -> SiteReport:
    site, proof, decision = plan.site, plan.proof, plan.decision
    error = errors.get(made) if made else None
    reasons = decision.reasons
    if made and not removed:
        limit = config.tolerance(site.dtype)
        words = f"put back: it differs by {error:.1e} of the largest output, more than {limit:g}"
        reasons += (Reason("put-back", words),)
    kept = {} if removed else {"strategy": type(decision.strategy).NONE, "kernel": "native"}
    return SiteReport(
        name=site.name,
        pattern=site.pattern,
        batch=site.batch,
        num_heads=site.num_heads,
        num_kv_heads=site.num_kv_heads,
        q_len=site.q_len,
        kv_len=site.kv_len,
        head_dim=site.head_dim,
        v_head_dim=site.v_head_dim,
        dtype=site.dtype,
        scale=site.scale,
        softcap=site.softcap,
        sink=site.sink is not None,
        bias=plan.problem.bias_shape if plan.problem else None,
        mask=proof.mask if isinstance(proof, Proof) else proof,
        reasons=reasons,
        removed_nodes=removed,
        added_nodes=added,
        max_error=error,
        **{"strategy": decision.strategy, "kernel": decision.kernel, **kept},  # type: ignore[arg-type]
    )
