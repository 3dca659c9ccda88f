"""The rule tables of the SDK's generations, as data. In each the first row that holds decides.

A table answers which strategy NxD Inference would take. It knows lengths and cores only: whether a kernel can compute
the site at all is asked before (`choose.CLAUSES`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy.strategies import FlashAttentionStrategy

SDK_2_26 = "NxD Inference 2.26, get_flash_attention_strategy"
SDK_2_29 = "NxD Inference 2.29, attention_base.py:1001-1034"


@dataclass(frozen=True)
class Rule:
    """One row: the strategy for every problem on `lnc` cores of which `holds` is true."""

    when: str
    """The row in words, as the report prints it."""
    holds: Callable[[AttentionProblem, int], bool]
    """The row as a test of the problem and the physical cores in a logical NeuronCore."""
    strategy: FlashAttentionStrategy
    source: str


def is_causal_window(problem: AttentionProblem) -> bool:
    """Whether each query sees some keys up to its own and none behind it, by one window."""
    band = problem.mask.band
    return band.lower is not None and band.upper is not None and band.upper <= problem.kv_len - problem.q_len


def is_masked(problem: AttentionProblem) -> bool:
    """What NxD Inference calls `has_attention_mask`."""
    return bool(problem.mask.claims) or problem.bias_shape is not None


def _rules(source: str, *rows: tuple[str, Callable[[AttentionProblem, int], bool], str]) -> tuple[Rule, ...]:
    return tuple(Rule(when, holds, FlashAttentionStrategy[strategy], source) for when, holds, strategy in rows)


TABLES: Mapping[str, tuple[Rule, ...]] = MappingProxyType(
    {
        "2.26": _rules(
            SDK_2_26,
            (
                "sliding window, q_len >= 512",
                lambda p, _: is_causal_window(p) and p.q_len >= 512,
                "SLIDING_WINDOW_KERNEL",
            ),
            ("sliding window, q_len < 512", lambda p, _: is_causal_window(p), "NONE"),
            ("q_len >= 4096", lambda p, _: p.q_len >= 4096, "UNSHARDED_KERNEL"),
            ("LNC 2, q_len >= 1024", lambda p, lnc: lnc == 2 and p.q_len >= 1024, "SHARDED_KERNEL"),
            ("LNC 1, q_len >= 1024", lambda p, _: p.q_len >= 1024, "UNSHARDED_KERNEL"),
            ("q_len < 1024", lambda p, _: True, "NONE"),
        ),
        # The row for a kernel that is forced on (LNC 1, q_len >= 512) is `policy="always"` here.
        "2.29": _rules(
            SDK_2_29,
            ("LNC 2, no mask", lambda p, lnc: lnc == 2 and not is_masked(p), "SHARDED_KERNEL"),
            (
                "LNC 2, masked, q_len >= 1024 and a multiple of 512",
                lambda p, lnc: lnc == 2 and p.q_len >= 1024 and p.q_len % 512 == 0,
                "SHARDED_KERNEL",
            ),
            (
                "LNC 2, masked, q_len < 1024 and a multiple of 256",
                lambda p, lnc: lnc == 2 and p.q_len < 1024 and p.q_len % 256 == 0,
                "SHARDED_KERNEL",
            ),
            ("LNC 2, masked, any other q_len", lambda p, lnc: lnc == 2, "NONE"),
            ("LNC 1, q_len >= 4096", lambda p, _: p.q_len >= 4096, "UNSHARDED_KERNEL"),
            ("LNC 1, q_len < 4096", lambda p, _: True, "NONE"),
        ),
    }
)
