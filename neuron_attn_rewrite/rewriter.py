"""The whole way: capture, find, prove, choose, replace, verify, report."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import fx, nn

import neuron_attn_rewrite.ops  # noqa: F401  registers torch.ops.neuron_attn
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.errors import RewriteError, RewriteWarning
from neuron_attn_rewrite.graph.sizes import examples, expression_of
from neuron_attn_rewrite.graph.writes import Writes
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.masks.prove import Prover
from neuron_attn_rewrite.masks.spec import Unproven
from neuron_attn_rewrite.module import PROVEN_BUFFERS, RewrittenModule
from neuron_attn_rewrite.ops.launch import sdk_is_here
from neuron_attn_rewrite.patterns.find import find
from neuron_attn_rewrite.patterns.site import AttentionSite, UnknownAttention
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.replace.exact import inside
from neuron_attn_rewrite.replace.graft import Graft, Plan, commit, graft, missing_size
from neuron_attn_rewrite.replace.verify import capture_error, measure, measure_exactly
from neuron_attn_rewrite.report.build import make_report, snapshot
from neuron_attn_rewrite.report.report import RewriteReport
from neuron_attn_rewrite.strategy.arrange import arranged
from neuron_attn_rewrite.strategy.choose import NATIVE, Decision, choose_among
from neuron_attn_rewrite.strategy.forms import Form, at_example, forms, size_from_data
from neuron_attn_rewrite.strategy.gradients import told
from neuron_attn_rewrite.strategy.legality import OURS


def rewrite(
    model: nn.Module | torch.export.ExportedProgram,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: RewriteConfig | None = None,
    dynamic_shapes: Any = None,
) -> RewrittenModule:
    """Give back a module that computes what `model` computes, with every provable attention as one kernel call.

    Args:
        model: an nn.Module, an ExportedProgram, or an FX GraphModule. It is not changed; weights are shared.
        args: example positional inputs, with the shapes and dtypes that the result is to be called with.
        kwargs: example keyword inputs.
        config: see `RewriteConfig`.
        dynamic_shapes: as for `torch.export.export`: sizes that stay open, so that the result takes every value of
            them. What is claimed of a mask then is proven for all of these values.

    Raises:
        InputError: the example inputs are missing or don't fit.
        CaptureError: the model can't be captured as one graph, or that graph does not run on the example inputs.
        RewriteError: `config.require` is not met.
    """
    config = RewriteConfig.of(config)
    if isinstance(model, RewrittenModule):
        words = (
            "this model is rewritten already: its kernel calls stay as they are. Rewrite the original to choose anew."
        )
        warnings.warn(words, RewriteWarning, stacklevel=2)
    captured = capture(model, args, kwargs, dynamic_shapes)
    drift = capture_error(model, captured) if config.verify else None
    report = replace(rewrite_graph(captured.module, captured.inputs, config), capture_error=drift)
    for text in (*report.warnings, *unmatched(report, config)):
        warnings.warn(text, RewriteWarning, stacklevel=2)
    return RewrittenModule.wrap(captured.module, report)


def rewrite_graph(module: fx.GraphModule, inputs: Sequence[Any] | None, config: RewriteConfig) -> RewriteReport:
    """Everything behind capture: `module` is a normalised graph of our own, and is changed.

    Args:
        module: as `capture.normalise` leaves it.
        inputs: a value for each placeholder, to measure with; None without any.
        config: see `RewriteConfig`.

    Raises:
        RewriteError: fewer attentions were replaced than `config.require` asks for.
    """
    if config.gradients is None:
        trains = module.training and any(parameter.requires_grad for parameter in module.parameters())
        config = replace(config, gradients=trains)
    prover = Prover(module, config)
    plans = [make_plan(site, prover, config) for site in find(module, prover.evaluator)]
    before = snapshot(module.graph)
    chosen = [plan for plan in plans if isinstance(plan, Plan) and plan.decision.kernel != NATIVE]
    grafts = graft(module, chosen, prover.writes.changed)
    errors = compare(module, grafts, inputs, config) if config.verify and inputs is not None else {}
    accepted = [g for g in grafts if errors.get(g, 0.0) <= config.tolerance(g.plan.site.coarsest)]
    module.meta[PROVEN_BUFFERS] = commit(module, accepted)
    report = make_report(module.graph, before, plans, grafts, errors, config)
    demand(report, config)
    return report


def unmatched(report: RewriteReport, config: RewriteConfig) -> tuple[str, ...]:
    """The patterns of `config.sites` that no attention has matched, in words: most are slips."""
    names = [site.name for site in report.sites]
    return tuple(
        f"RewriteConfig.sites[{pattern!r}] matches no attention; they are {', '.join(names[:3]) or 'none'}"
        + (f" and {len(names) - 3} more." if len(names) > 3 else ".")
        for pattern in config.sites
        if not any(fnmatchcase(name, pattern) for name in names)
    )


def demand(report: RewriteReport, config: RewriteConfig) -> None:
    """Hold a report to `config.require`.

    Raises:
        RewriteError: fewer attentions were replaced, or others than all.
    """
    found, replaced = len(report.sites), len(report.replaced)
    if config.require is None or replaced == (found if config.require == "all" else config.require):
        return
    kept = [f"{site.name}: {site.reasons[-1]}" for site in report.kept if site.reasons]
    shown = "".join(f"\n  {line}" for line in kept[:3]) + (f"\n  and {len(kept) - 3} more" if len(kept) > 3 else "")
    raise RewriteError(
        f"RewriteConfig.require={config.require!r}, but {replaced} of {found} attentions were replaced.{shown}"
    )


def compare(
    module: fx.GraphModule, grafts: Sequence[Graft], inputs: Sequence[Any], config: RewriteConfig
) -> dict[Graft, float]:
    """How far each kernel is from the model, or from its formula where the model rounds more than the kernel."""
    errors = measure(module, grafts, inputs)
    far = [g for g in grafts if errors[g] > config.tolerance(g.plan.site.coarsest)]
    exact = measure_exactly(module, far, inputs) if far else {}
    return errors | {g: min(errors[g], error) for g, error in exact.items()}


def make_plan(site: AttentionSite | UnknownAttention, prover: Prover, config: RewriteConfig) -> Plan | UnknownAttention:
    """What is to become of one site, with every reason. Nothing is changed."""
    if isinstance(site, UnknownAttention):
        return site
    values = examples(prover.module.graph)
    if size := size_from_data(site, values):
        reason = Reason("data-sizes", f"its {size} depends on the values of an input")
        return UnknownAttention(site.name, site.pattern, site.anchor, reason)
    proof = prover.prove(site)
    if isinstance(proof, Unproven):
        return Plan(site, proof, None, _native(proof.reason.behind("unproven: "), config), at_example(site, values))
    possible = forms(site, proof, values)
    no = _shared(site, config) or _written(site, prover.writes) or _detached(site, prover.grad_modes)
    no = no or _unknown_size(site, proof, prover, config)
    form, decision = (possible[0], _native(no, config)) if no else _chosen(possible, prover, config)
    if config.gradients and decision.kernel != NATIVE:
        decision = _with_gradients(decision, form, config)
    said = (*proof.reasons, *_open_sizes(site, prover), *form.reasons, *decision.reasons)
    site = replace(site, output=form.site.output, output_dims=form.site.output_dims)
    return Plan(site, proof, form, replace(decision, reasons=said), at_example(site, values))


def _chosen(possible: Sequence[Form], prover: Prover, config: RewriteConfig) -> tuple[Form, Decision]:
    """One of the forms of a site and the kernel for it, laid out as the kernel likes it."""
    if prover.is_dynamic:
        config = replace(config, kernels=(OURS,))

    @cache
    def laid_out(i: int, kernel: str) -> Form:
        return arranged(possible[i], vendor.accepted(kernel), prover.evaluator.changed)

    problems = [form.problem for form in possible]
    i, decision = choose_among(problems, config, possible[0].site.name, lambda i, kernel: laid_out(i, kernel).turned)
    return possible[i] if decision.kernel == NATIVE else laid_out(i, decision.kernel), decision


def _with_gradients(decision: Decision, form: Form, config: RewriteConfig) -> Decision:
    """The decision with what will compute the gradients: of the SDK that is installed, else of the one meant."""
    sdk = None if sdk_is_here() else config.sdk
    name, reason = told(form.problem, config.target, decision.lnc, sdk)
    return replace(decision, gradients=name, reasons=(*decision.reasons, reason))


def _open_sizes(site: AttentionSite, prover: Prover) -> tuple[Reason, ...]:
    """For which sizes the call holds, where they are symbols."""
    if not prover.is_dynamic:
        return ()
    words = ", ".join(f"{name} {expression_of(getattr(site, name))}" for name in ("batch", "q_len", "kv_len"))
    return (Reason("dynamic-sizes", f"holds for every {words}; chosen for the sizes of the example"),)


def _unknown_size(site: AttentionSite, proof: Proof, prover: Prover, config: RewriteConfig) -> Reason | None:
    """Why a kernel can't be called where sizes are symbols; None if it can."""
    if not prover.is_dynamic:
        return None
    missing = missing_size(prover.module, site, proof)
    if missing:
        return Reason("dynamic-kernel", f"the call needs the size {missing}, and no input has it")
    if config.kernels and OURS not in config.kernels:
        return Reason("dynamic-kernel", f"only {OURS} takes sizes that are symbols, and config.kernels leaves it out")
    return None


def _native(reason: Reason, config: RewriteConfig) -> Decision:
    return Decision(FlashAttentionStrategy.NONE, NATIVE, config.logical_cores, (reason,))


def _shared(site: AttentionSite, config: RewriteConfig) -> Reason | None:
    """Why a kernel would not spare the model the scores; None if it does, or if the caller wants one all the same."""
    for what in ("log-sum-exp", "weights", "scores"):
        readers = ", ".join(dict.fromkeys(_named(reader.node) for reader in site.readers if reader.what == what))
        if readers and what == "log-sum-exp":
            return Reason("weights-used", f"its log-sum-exp is read by {readers}, and no kernel gives it")
        if readers and config.weights == "native":
            hint = 'weights="beside" gives the output a kernel all the same'
            return Reason("weights-used", f"its {what} are also read by {readers}; {hint}")
    return None


def _written(site: AttentionSite, writes: Writes) -> Reason | None:
    """Why one kernel call can't read what the attention reads; None if it can."""
    nodes, _ = inside(site) if writes.changed else ((), ())
    for reader in nodes:
        for node in reader.all_input_nodes:
            if writes.between(node, reader, site.output):
                return Reason("written", f"{node.name} is written after {reader.name} has read it")
    return None


def _detached(site: AttentionSite, modes: Mapping[fx.Node, bool]) -> Reason | None:
    """Why one kernel call does not have the attention's gradients; None if it has."""
    nodes, _ = inside(site) if modes else ((), ())
    other = next((node for node in nodes if modes[node] != modes[site.output]), None)
    return Reason("gradient", f"at {other.name}: a part of it is computed without gradients") if other else None


def _named(reader: fx.Node) -> str:
    return "the model's output" if reader.op == "output" else reader.name
