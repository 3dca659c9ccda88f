"""What each kernel can compute, as data: clauses in words, with a test each. The first that is broken says no."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.strategy.clauses import Kernel, Setting, broken
from neuron_attn_rewrite.strategy.demands import neuronxcc, nkilib, ours

OURS = ours.OURS
KERNELS: Mapping[str, Kernel] = MappingProxyType({**ours.KERNELS, **nkilib.KERNELS, **neuronxcc.KERNELS})
"""What each kernel demands, by the name in `kernels.vendor.ADAPTERS`; some are known, and have no adapter."""
BACKWARD: Mapping[str, Kernel] = MappingProxyType({**nkilib.BACKWARD, **neuronxcc.BACKWARD})
"""The same for gradients, by the name in `kernels.vendor.BACKWARD`."""


def illegal(name: str, problem: AttentionProblem, setting: Setting) -> Reason | None:
    """Why this kernel can't compute this problem; None if it can."""
    reason = broken((KERNELS.get(name) or BACKWARD[name]).clauses, problem, setting)
    return reason and reason.behind(f"{name}: ")


def bridged(name: str, problem: AttentionProblem, setting: Setting) -> tuple[Reason, ...]:
    """What is done around a call so that the kernel can compute the problem."""
    return tuple(Reason("bridge", f"{name}: {b.words}") for b in KERNELS[name].bridges if b.needed(problem, setting))
