"""What each kernel can compute: a table of clauses, each a sentence and a test."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.strategy.clauses import Clause, Kernel, Setting, first_refusal
from neuron_attn_rewrite.strategy.demands import neuronxcc, nkilib, ours

OURS: Final = ours.OURS
"""The name of our own kernel."""
PRIOR: Final = ours.PRIOR
"""The name of our kernel for two sources of keys."""
OPEN_SIZES: Final = (OURS, PRIOR)
"""The kernels that take sizes that are symbols."""
KERNELS: Mapping[str, Kernel] = MappingProxyType({**ours.KERNELS, **nkilib.KERNELS, **neuronxcc.KERNELS})
"""By name: ours, then those in `kernels.vendor.ADAPTERS`. Some have no adapter, and are never chosen."""
BACKWARD: Mapping[str, Kernel] = MappingProxyType({**nkilib.BACKWARD, **neuronxcc.BACKWARD})
"""The kernels for gradients, by the name in `kernels.vendor.BACKWARD`."""

NOT_IN_BLOCKS: Final = (Clause("cache-copied", "it reads no cache in blocks", lambda *_: False),)
"""What a kernel demands that reads no cache in blocks."""


def illegal(name: str, problem: AttentionProblem, setting: Setting) -> Reason | None:
    """Why this kernel can't compute this problem. None if it can."""
    kernel = KERNELS.get(name) or BACKWARD[name]
    if not reads_as_here(name, problem):
        words = "keys in two tensors, a cache and new ones" if 2 in kernel.sources else "keys in one tensor"
        return Reason("two-sources", f"{name}: it takes {words}")
    more = () if problem.block_size is None else NOT_IN_BLOCKS if kernel.in_blocks is None else kernel.in_blocks
    reason = first_refusal((*kernel.clauses, *more), problem, setting)
    return reason and reason.behind(f"{name}: ")


def reads_as_here(name: str, problem: AttentionProblem) -> bool:
    """Whether a kernel reads keys from as many tensors as the problem has."""
    return (1 if problem.prior is None else 2) in (KERNELS.get(name) or BACKWARD[name]).sources


def bridged(name: str, problem: AttentionProblem, setting: Setting) -> tuple[Reason, ...]:
    """The bridges that a call of the kernel needs for the problem."""
    return tuple(Reason("bridge", f"{name}: {b.words}") for b in KERNELS[name].bridges if b.needed(problem, setting))
