"""Makes the report of a finished rewrite. Counts come from the final graph."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.graph.calls import tensors_of_objects
from neuron_attn_rewrite.graph.nodes import tensor
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.patterns.products import PRODUCTS
from neuron_attn_rewrite.patterns.site import AttentionSite, UnknownAttention
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.replace.graft import Graft
from neuron_attn_rewrite.replace.verify import Compared
from neuron_attn_rewrite.report.data import NodeReport, SiteReport
from neuron_attn_rewrite.report.report import RewriteReport
from neuron_attn_rewrite.strategy.choose import NATIVE
from neuron_attn_rewrite.strategy.decide import Verdict
from neuron_attn_rewrite.version import __version__

MOST_NODES = 48
"""The largest number of nodes that is listed for an attention that was not replaced."""


def snapshot(graph: fx.Graph) -> dict[str, NodeReport]:
    """Each node as data, by name and in the order of the graph. It stays valid when nodes are removed."""
    return {node.name: describe_node(node) for node in graph.nodes}


def make_report(
    graph: fx.Graph,
    before: Mapping[str, NodeReport],
    plans: Sequence[Verdict | UnknownAttention],
    grafts: Sequence[Graft],
    errors: Mapping[Graft, Compared],
    config: RewriteConfig,
) -> RewriteReport:
    """The report, with one entry for each site in the order of the graph. Linear in the number of nodes."""
    present = {node.name: node for node in graph.nodes}
    position = {name: i for i, name in enumerate(before)}
    gone = set(before) - set(present)
    users: dict[str, list[str]] = {name: [] for name in before}
    for node in before.values():
        for name in node.inputs:
            users[name].append(node.name)
    graft_of = {id(g.verdict): g for g in grafts}
    sites = []
    for plan in plans:
        if isinstance(plan, UnknownAttention):
            anchors = (plan.anchor, *plan.others)
            nodes = {name for node in anchors for name in _around_softmax(node.name, before, users)}
            sites.append(
                SiteReport(
                    plan.name,
                    plan.pattern,
                    *source_of(plan.anchor),
                    reasons=(plan.reason,),
                    before=_with_inputs(nodes, before, position, dict.fromkeys(nodes, "kept")),
                    traceback=plan.reason.traceback,
                )
            )
            continue
        graft = graft_of.get(id(plan))
        operand_roles = _operand_roles(plan.site) | (_operand_roles(plan.form.site) if plan.form else {})
        if graft is not None and graft.result.name in present:
            roles = _removed_roles(plan.site, before, gone)
            gone -= set(roles)
            new = {n.name: n for n in graft.added if n.name in present}
            operands = {i.name: i for n in new.values() for i in n.all_input_nodes if i.name not in new}
            after = tuple(
                replace(describe_node(n), role=operand_roles.get(n.name, "operand")) for n in operands.values()
            )
            after += tuple(replace(describe_node(n), role="added") for n in new.values())
        else:
            roles, after = _kept_roles(plan.site, before), ()
        shown = _with_inputs(roles, before, position, operand_roles | roles)
        sites.append(_site_report(plan, graft, shown, after, errors, config))
    of_objects = tensors_of_objects(graph)
    return RewriteReport(
        sites=tuple(sites),
        target=config.target,
        lnc=config.logical_cores,
        policy=config.policy,
        nodes_before=len(before),
        nodes_after=len(present),
        unused_inputs=tuple(
            n.name
            for n in graph.find_nodes(op="placeholder")
            if tensor(n) is not None and not users[n.name] and n not in of_objects
        ),
        made_with=f"neuron_attn_rewrite {__version__}, torch {torch.__version__}",
    )


# Which nodes belong to a site


def _reachable(
    start: str, next_of: Callable[[str], Sequence[str]], enter: Callable[[str], bool], limit: int | None = None
) -> set[str]:
    """The names that a breadth-first walk from `start` reaches, at most `limit`. It enters names that pass `enter`."""
    reached: set[str] = set()
    waiting = deque([start])
    while waiting and (limit is None or len(reached) < limit):
        name = waiting.popleft()
        if name not in reached and enter(name):
            reached.add(name)
            waiting += next_of(name)
    return reached


def _around_softmax(anchor: str, before: Mapping[str, NodeReport], users: Mapping[str, Sequence[str]]) -> set[str]:
    """The nodes around a softmax that was not understood, up to the nearest products before and after it."""

    def is_call(name: str) -> bool:
        return bool(before[name].call)

    def inputs_of(name: str) -> Sequence[str]:
        return () if _is_product(before[name]) else before[name].inputs

    def users_of(name: str) -> Sequence[str]:
        return () if _is_product(before[name]) else users[name]

    behind = _reachable(anchor, inputs_of, is_call, MOST_NODES)
    ahead = _reachable(anchor, users_of, is_call, MOST_NODES)
    return behind | ahead


def _is_product(node: NodeReport) -> bool:
    return any(part in PRODUCTS.by_op for part in node.op.split("."))


def _removed_roles(site: AttentionSite, before: Mapping[str, NodeReport], gone: Collection[str]) -> dict[str, str]:
    """The role of each removed node of a site: "mask" if only the mask needed it, else "removed".

    A removed node belongs to the site if each node on its way to the output was removed too.
    """
    terms = {term.node.name for term in site.terms}
    everything = _reachable(site.output.name, lambda name: before[name].inputs, lambda name: name in gone)
    scores = _reachable(
        site.output.name, lambda name: before[name].inputs, lambda name: name in gone and name not in terms
    )
    return {name: "removed" if name in scores else "mask" for name in everything}


def _kept_roles(site: AttentionSite, before: Mapping[str, NodeReport]) -> dict[str, str]:
    """The role "kept" for each node from the operands and masks, without these, to the output of a site."""
    operands = [
        site.query,
        site.key,
        site.value,
        *(scale.operand for scale in site.operand_scales),
        *([site.sink] if site.sink else []),
    ]
    ends = {operand.node.name for operand in operands} | {term.node.name for term in site.terms}

    def enter(name: str) -> bool:
        return name not in ends and bool(before[name].call)

    return dict.fromkeys(_reachable(site.output.name, lambda name: before[name].inputs, enter, MOST_NODES), "kept")


def _operand_roles(site: AttentionSite) -> dict[str, str]:
    """The role of the query, key and value node. A node that is more than one of them is left out."""
    pairs = [(site.query.node.name, "query"), (site.key.node.name, "key"), (site.value.node.name, "value")]
    names = [name for name, _ in pairs]
    return {name: role for name, role in pairs if names.count(name) == 1}


def _with_inputs(
    names: Iterable[str], before: Mapping[str, NodeReport], position: Mapping[str, int], roles: Mapping[str, str]
) -> tuple[NodeReport, ...]:
    """The named nodes and the nodes that they read, in the order of the graph, with their roles."""
    own = set(names)
    shown = own | {i for name in own for i in before[name].inputs}
    nodes = [before[name] for name in sorted(shown, key=position.__getitem__)]
    return tuple(replace(n, role=roles.get(n.name, "operand")) for n in nodes)


def _site_report(
    plan: Verdict,
    graft: Graft | None,
    before: tuple[NodeReport, ...],
    after: tuple[NodeReport, ...],
    errors: Mapping[Graft, Compared],
    config: RewriteConfig,
) -> SiteReport:
    site, proof, decision = plan.example, plan.proof, plan.decision
    compared = errors.get(graft) if graft else None
    error = compared.error if compared else None
    reasons = decision.reasons
    if graft and not after:
        limit = config.tolerance(site.coarsest)
        words = f"put back: it differs by {error:.1e} of the largest output, more than {limit:g}"
        if compared:
            words += f", {compared.where}"
        reasons += (Reason("put-back", words),)
    elif compared and not compared.draws:
        words = "compared on the example inputs alone, not on inputs that were drawn"
        reasons += (Reason("example-only", words),)
    source, source_code = source_of(site.anchor)
    return SiteReport(
        name=site.name,
        pattern=site.pattern,
        source=source,
        source_code=source_code,
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
        bias=plan.form.problem.bias_shape if plan.form else None,
        mask=proof.mask if isinstance(proof, Proof) else proof,
        strategy=decision.strategy if after else FlashAttentionStrategy.NONE,
        kernel=decision.kernel if after else NATIVE,
        gradients=decision.gradients if after else None,
        reasons=reasons,
        before=before,
        after=after,
        max_error=error,
        draws=compared.draws if compared else 0,
    )


# One node as data


def describe_node(node: fx.Node) -> NodeReport:
    """The name, call, inputs, shape and dtype of a node."""
    value = tensor(node)
    return NodeReport(
        name=node.name,
        call=_call(node) if node.op == "call_function" else "",
        inputs=tuple(n.name for n in node.all_input_nodes),
        shape=None if value is None else tuple(s if isinstance(s, int) else str(s) for s in value.shape),
        dtype=None if value is None else value.dtype,
    )


def _call(node: fx.Node) -> str:
    target: Any = node.target
    is_op = isinstance(target, torch._ops.OpOverload)
    name = f"torch.ops.{target}" if is_op else f"{target.__module__.lstrip('_')}.{target.__name__}"
    given = [_literal(a) for a in node.args] + [f"{k}={_literal(v)}" for k, v in node.kwargs.items()]
    return f"{name}({', '.join(given)})"


def _literal(value: Any) -> str:
    """An argument as Python source. A node is written as its name."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (tuple, list)):
        items = ", ".join(map(_literal, value))
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' * (len(value) == 1)})"
    if isinstance(value, float):
        return repr(value) if abs(value) < float("inf") else f"float('{value}')"
    return f"torch.device('{value}')" if isinstance(value, torch.device) else repr(value)


FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+), in [^\n]*(?:\n\s*(?P<code>[^\n]*))?')
TORCH = str(Path(torch.__file__).parent)


def source_of(node: fx.Node) -> tuple[str, str]:
    """The innermost line of the model's own code that made the node, as `path:line`, and the text of that line."""
    frames = list(FRAME.finditer(node.meta.get("stack_trace") or ""))
    own = [f for f in frames if not f["path"].startswith((TORCH, "<"))] or frames
    if not own:
        return "", ""
    return f"{_short(own[-1]['path'])}:{own[-1]['line']}", (own[-1]["code"] or "").strip()


def _short(path: str) -> str:
    """A path that is the same on every machine: below site-packages or the working directory, or the file name."""
    if "site-packages/" in path:
        return path.rpartition("site-packages/")[2]
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else Path(path).name
