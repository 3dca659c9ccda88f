"""Decides about one attention: proves its mask, chooses a kernel, and keeps every reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.graph.sizes import examples
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.kernels.orders import ACCEPTS_PLAIN
from neuron_attn_rewrite.kernels.vendor.sdk import sdk_is_installed
from neuron_attn_rewrite.masks.behind import Behind, behind
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.masks.prove import Prover
from neuron_attn_rewrite.masks.spec import Unproven
from neuron_attn_rewrite.patterns.site import AttentionSite, UnknownAttention
from neuron_attn_rewrite.reasons import Reason, internal_error
from neuron_attn_rewrite.strategy.arrange import arranged
from neuron_attn_rewrite.strategy.choose import NATIVE, Decision, choose, choose_among
from neuron_attn_rewrite.strategy.forms import Form, forms, reads_in_place
from neuron_attn_rewrite.strategy.gradients import gradients_with_reason
from neuron_attn_rewrite.strategy.legality import OPEN_SIZES, OURS, PRIOR
from neuron_attn_rewrite.strategy.obstacles import obstacle
from neuron_attn_rewrite.strategy.open_sizes import at_example, missing_size, range_reason, size_from_data

IN_BLOCKS = "flash_blocks"
"""In place of a kernel's name: the op that reads a cache in blocks."""


@dataclass(frozen=True)
class Verdict:
    """Everything that is decided about one attention. The graph is not changed yet."""

    site: AttentionSite
    proof: Proof | Unproven
    form: Form | None
    """What a kernel would compute. None if nothing is proven about the mask."""
    decision: Decision
    example: AttentionSite
    """The site with the sizes of the example inputs in place of open sizes."""

    @property
    def is_replaced(self) -> bool:
        """Whether a kernel call is to replace the attention."""
        return self.decision.kernel != NATIVE


def decide(site: AttentionSite | UnknownAttention, prover: Prover, config: RewriteConfig) -> Verdict | UnknownAttention:
    """Decide about one site, with every reason. The graph is not changed.

    Args:
        site: as `patterns.find` gives it.
        prover: of the graph.
        config: see `RewriteConfig`. With `strict`, an internal error is raised.
    """
    if isinstance(site, UnknownAttention):
        return site
    try:
        return _decided(site, prover, config)
    except Exception as error:
        reason = internal_error(error, config.strict)
        return UnknownAttention(site.name, site.pattern, site.anchor, reason)


def _decided(site: AttentionSite, prover: Prover, config: RewriteConfig) -> Verdict | UnknownAttention:
    values = examples(prover.module.graph)
    if size := size_from_data(site, values):
        reason = Reason("data-sizes", f"its {size} depends on the values of an input")
        return UnknownAttention(site.name, site.pattern, site.anchor, reason)
    proof = prover.prove(site)
    if isinstance(proof, Unproven):
        return Verdict(site, proof, None, _native(proof.reason.behind("unproven: "), config), at_example(site, values))
    found = _behind(site, prover, config)
    of_sources = (found,) if isinstance(found, Reason) else ()
    possible = forms(site, proof, values, found if isinstance(found, Behind) else None)
    no = obstacle(site, proof, prover, config)
    if no:
        form, decision = possible[0], _native(no, config)
    else:
        in_place = _in_place(reads_in_place(site, proof, values, prover), prover, config)
        form, decision = in_place if isinstance(in_place, tuple) else _fastest(possible, prover, config)
        if isinstance(in_place, Reason):
            decision = replace(decision, reasons=(*decision.reasons, in_place))
    if config.gradients and decision.kernel != NATIVE:
        decision = _with_gradients(decision, form, config)
    of_sizes = (range_reason(site),) if prover.is_dynamic else ()
    proof = form.proof if form.behind else proof
    reasons = (*proof.reasons, *of_sizes, *of_sources, *form.reasons, *decision.reasons)
    site = replace(site, output=form.site.output, output_dims=form.site.output_dims)
    return Verdict(site, proof, form, replace(decision, reasons=reasons), at_example(site, values))


def _behind(site: AttentionSite, prover: Prover, config: RewriteConfig) -> Behind | Reason | None:
    """The two sources of keys and values. None if there is one; a reason if a call can't read them apart."""
    found = behind(site, prover)
    if not isinstance(found, Behind):
        return found
    if config.gradients:
        return Reason("two-sources", f"{PRIOR}: it has no kernel for gradients")
    missing = missing_size(prover.module, site, found.proof, found) if prover.is_dynamic else None
    if missing:
        return Reason("two-sources", f"{PRIOR}: the call needs the size {missing}, and it is no sum of sizes of inputs")
    return found


def _in_place(
    form: Form | Reason | None, prover: Prover, config: RewriteConfig
) -> tuple[Form, Decision] | Reason | None:
    """The form that makes no copy of a cache, wherever a kernel can compute it and is wanted. Else the reason."""
    if not isinstance(form, Form):
        return form
    if prover.is_dynamic:
        config = replace(config, kernels=(OURS,))
        if size := missing_size(prover.module, form.site, form.proof):
            return Reason("cache-copied", f"the call needs the size {size}, and it is no sum of sizes of inputs")
    decision = choose(form.problem, config, form.site.name)
    if decision.kernel == NATIVE:
        return Reason("cache-copied", f"the blocks of the cache are copied: {decision.reasons[-1]}")
    return form, replace(decision, kernel=IN_BLOCKS)


def _fastest(possible: Sequence[Form], prover: Prover, config: RewriteConfig) -> tuple[Form, Decision]:
    """The form that is predicted to be fastest and its kernel, with operands in the order that the kernel takes."""
    if prover.is_dynamic:
        config = replace(config, kernels=tuple(k for k in OPEN_SIZES if not config.kernels or k in config.kernels))

    @cache
    def in_order(i: int, kernel: str) -> Form:
        accepted = ACCEPTS_PLAIN if possible[i].behind else vendor.accepted(kernel)
        return arranged(possible[i], accepted, prover.evaluator.changed)

    problems = [form.problem for form in possible]
    i, decision = choose_among(
        problems, config, possible[0].site.name, lambda i, kernel: in_order(i, kernel).layout_bytes
    )
    return possible[i] if decision.kernel == NATIVE else in_order(i, decision.kernel), decision


def _with_gradients(decision: Decision, form: Form, config: RewriteConfig) -> Decision:
    """Adds what computes the gradients: a kernel of the installed SDK, or without one of the configured release."""
    sdk = None if sdk_is_installed() else config.sdk
    name, reason = gradients_with_reason(form.problem, config.target, decision.lnc, sdk)
    return replace(decision, gradients=name, reasons=(*decision.reasons, reason))


def _native(reason: Reason, config: RewriteConfig) -> Decision:
    return Decision(FlashAttentionStrategy.NONE, NATIVE, config.logical_cores, (reason,))
