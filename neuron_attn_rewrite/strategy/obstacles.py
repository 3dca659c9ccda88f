"""Why no kernel can replace an attention, even if it computes the same: gradients, writes, readers, open sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.graph.nodes import tensor
from neuron_attn_rewrite.graph.strides import memory_order
from neuron_attn_rewrite.graph.writes import Writes
from neuron_attn_rewrite.masks.nan_readers import nan_is_read
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.masks.prove import Prover
from neuron_attn_rewrite.patterns.extent import inside
from neuron_attn_rewrite.patterns.site import OVERFLOWS, AttentionSite
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.strategy.legality import OPEN_SIZES
from neuron_attn_rewrite.strategy.open_sizes import missing_size


def obstacle(site: AttentionSite, proof: Proof, prover: Prover, config: RewriteConfig) -> Reason | None:
    """The first reason to leave the attention as it is. None without one."""
    return (
        _other_readers(site, config)
        or _write_between(site, prover.writes)
        or _rounded(site)
        or (OVERFLOWS if site.overflows and nan_is_read(site.output) else None)
        or _mixed_gradients(site, prover.grad_modes)
        or _unknown_size(site, proof, prover, config)
    )


def _other_readers(site: AttentionSite, config: RewriteConfig) -> Reason | None:
    """Other nodes read the weights or the scores, so that the model has to compute them anyway."""
    for what in ("log-sum-exp", "weights", "scores"):
        readers = ", ".join(dict.fromkeys(_name_of(reader.node) for reader in site.readers if reader.what == what))
        if readers and what == "log-sum-exp":
            return Reason("weights-used", f"its log-sum-exp is read by {readers}, and no kernel gives it")
        if readers and config.weights == "native":
            hint = 'weights="beside" gives the output a kernel all the same'
            return Reason("weights-used", f"its {what} are also read by {readers}; {hint}")
    return None


def _write_between(site: AttentionSite, writes: Writes) -> Reason | None:
    """A tensor changes in place after the attention reads it and before the kernel call would."""
    nodes, _ = inside(site) if writes.changed else ((), ())
    if site.output in writes.changed or (writes.into_intermediates and memory_order(site.output.meta["val"]) is None):
        return Reason("written", "the model writes into its output, or into what may share memory with it")
    for reader in nodes:
        for node in reader.all_input_nodes:
            if writes.between(node, reader, site.output):
                return Reason("written", f"{node.name} is written after {reader.name} has read it")
    return None


def _rounded(site: AttentionSite) -> Reason | None:
    """The model rounds on the way to less than query, key, value and output have, and a kernel does not.

    A smaller range matters before the softmax only: a score beyond it is infinite.
    """
    coarsest, widest = torch.finfo(site.coarsest), torch.finfo(site.dtype)
    for node in inside(site)[0]:
        value = tensor(node)
        if value is None or not value.is_floating_point():
            continue
        kind = torch.finfo(value.dtype)
        if kind.eps > coarsest.eps or (kind.max < widest.max and node < site.anchor):
            return Reason("rounded", f"{node.name} is {kind.dtype}, and no kernel rounds as the model does there")
    return None


def _mixed_gradients(site: AttentionSite, modes: Mapping[fx.Node, bool]) -> Reason | None:
    """A part of the attention is computed without gradients: one kernel call would give other gradients."""
    nodes, _ = inside(site) if modes else ((), ())
    other = next((node for node in nodes if modes[node] != modes[site.output]), None)
    return Reason("gradient", f"at {other.name}: a part of it is computed without gradients") if other else None


def _unknown_size(site: AttentionSite, proof: Proof, prover: Prover, config: RewriteConfig) -> Reason | None:
    """The call needs a size that the graph can't read, or a kernel that takes open sizes is not allowed."""
    if not prover.is_dynamic:
        return None
    missing = missing_size(prover.module, site, proof)
    if missing:
        return Reason("dynamic-kernel", f"the call needs the size {missing}, and it is no sum of sizes of inputs")
    if config.kernels and not set(config.kernels) & set(OPEN_SIZES):
        names = " and ".join(OPEN_SIZES)
        return Reason("dynamic-kernel", f"only {names} take sizes that are symbols, and config.kernels leaves them out")
    return None


def _name_of(reader: fx.Node) -> str:
    return "the model's output" if reader.op == "output" else reader.name
