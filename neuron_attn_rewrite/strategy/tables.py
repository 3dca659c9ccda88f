"""The rule tables of NxD Inference. In each table the first row that fits decides.

A table gives the strategy that NxD Inference would take. It depends only on lengths, cores and a few switches: whether
a kernel can compute the attention is a question for `legality`. `NOTES` lists the cases that NxD Inference gets wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from neuron_attn_rewrite.config.rules import Case, Rule
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.masks.spec import KeyPadding
from neuron_attn_rewrite.problem import AttentionProblem

NONE, UNSHARDED, SHARDED, CONTEXT_PARALLEL, STRIDED_CONTEXT_PARALLEL, SLIDING_WINDOW = FlashAttentionStrategy

LADDER = "the ladder documented for NxD Inference 2.26"
SOURCE_2_26 = "NxD Inference 2.26, attention_base.py:999-1049"
SOURCE_2_28 = "NxD Inference 2.27 and 2.28, attention_base.py:1330-1381"
SOURCE_2_29 = "NxD Inference 2.29, attention_base.py:1001-1034"
SOURCE_CP = "NxD Inference 2.26 to 2.29, get_flash_attention_strategy_cp"


def is_causal_window(problem: AttentionProblem) -> bool:
    """Whether each query sees some keys up to its own and none behind it, by one window."""
    band = problem.mask.band
    return band.lower is not None and band.upper is not None and band.upper <= problem.kv_len - problem.q_len


def is_masked(problem: AttentionProblem) -> bool:
    """What NxD Inference calls `has_attention_mask`."""
    return bool(problem.mask.claims) or problem.bias_shape is not None


CP_ERROR = (
    "ValueError: strided context parallel kernel is enabled but cannot be used "
    "(it needs LNC 2, q_len > head_dim and no sliding window)"
)
OFF = (Rule(NONE, SOURCE_2_29, enabled=False),)
CP = (
    Rule(
        CONTEXT_PARALLEL,
        SOURCE_CP,
        context_parallel=True,
        strided=False,
        lnc=2,
        beyond_head_dim=True,
    ),
    Rule(
        STRIDED_CONTEXT_PARALLEL,
        SOURCE_CP,
        context_parallel=True,
        strided=True,
        lnc=2,
        beyond_head_dim=True,
        window=False,
    ),
    Rule(NONE, SOURCE_CP, context_parallel=True, strided=True, error=CP_ERROR),
    Rule(NONE, SOURCE_CP, context_parallel=True),
)


def _lengths(source: str) -> tuple[Rule, ...]:
    return (
        Rule(SHARDED, source, lnc=2, masked=False),
        Rule(SHARDED, source, lnc=2, masked=True, min_q_len=1024, multiple_of=512),
        Rule(SHARDED, source, lnc=2, masked=True, max_q_len=1023, multiple_of=256),
        Rule(NONE, source, lnc=2, masked=True),
        Rule(UNSHARDED, source, lnc=1, min_q_len=4096),
        Rule(UNSHARDED, source, lnc=1, enabled=True, min_q_len=512),
        Rule(NONE, source, lnc=1),
    )


def _windows(source: str, *targets: str) -> tuple[Rule, ...]:
    return (
        Rule(SLIDING_WINDOW, source, window=True, min_q_len=512, targets=targets),
        Rule(NONE, source, window=True, max_q_len=511, targets=targets),
    )


TABLES: Mapping[str, tuple[Rule, ...]] = MappingProxyType(
    {
        "2.26": (
            *OFF,
            *CP,
            *_windows(LADDER),
            Rule(UNSHARDED, LADDER, min_q_len=4096),
            Rule(SHARDED, LADDER, lnc=2, min_q_len=1024),
            Rule(UNSHARDED, LADDER, lnc=1, min_q_len=1024),
            Rule(NONE, LADDER, max_q_len=1023),
        ),
        "2.26.1": (*OFF, *CP, *_windows(SOURCE_2_26), *_lengths(SOURCE_2_26)),
        "2.27": (*OFF, *CP, *_windows(SOURCE_2_28, "trn1"), *_lengths(SOURCE_2_28)),
        "2.29": (*OFF, *CP, *_lengths(SOURCE_2_29)),
    }
)
"""By the release from which on it holds. "2.26" is the ladder as it was documented; the code of 2.26, which also asks
for multiples and looks at LNC before the length, has the rows of "2.26.1"."""


def table(sdk: str) -> tuple[Rule, ...]:
    """The table of a release: the newest that is not newer."""
    return TABLES[max(name for name in TABLES if name <= sdk)]


def first(rules: Sequence[Rule], case: Case) -> Rule | None:
    """The row that decides; None if the caller's table has none that fits."""
    return next((rule for rule in rules if rule.holds(case)), None)


@dataclass(frozen=True)
class Note:
    """What NxD Inference's kernel path does wrong, or raises, at a problem for which its table takes a kernel."""

    words: str
    source: str
    holds: Callable[[AttentionProblem, Case], bool]


NOTES: tuple[Note, ...] = (
    Note(
        "AssertionError: head_dim above 128",
        "attention_cte.py:410-415",
        lambda p, _: max(p.head_dim, p.v_head_dim) > 128,
    ),
    Note(
        "AssertionError: sink argument is not supported by trn1",
        "attention_base.py:714",
        lambda p, case: p.sink and case.target == "trn1",
    ),
    Note(
        "AssertionError: sliding_window argument is not supported by trn1",
        "attention_base.py:717",
        lambda _, case: case.window and case.target == "trn1",
    ),
    Note("drops the softcap", "no kernel argument", lambda p, _: p.softcap is not None),
    Note("drops the bias", "no kernel argument", lambda p, _: p.bias_shape is not None),
    Note(
        "drops the key padding, or AssertionError unless it is on the right",
        "attention_base.py:654-657",
        lambda p, _: any(isinstance(c, KeyPadding) for c in p.mask.claims),
    ),
    Note(
        "computes a causal mask in place of the given one",
        "attention_base.py:727",
        lambda p, _: is_masked(p) and (bool(p.mask.row_bounds.claims) or p.mask.band.upper != p.kv_len - p.q_len),
    ),
)
