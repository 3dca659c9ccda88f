"""The rule tables of NxD Inference's generations, as data. In each the first row that fits decides.

A table answers which strategy NxD Inference would take. It knows lengths, cores and a few switches: whether a kernel
can compute the attention at all is asked before (`legality`). `NOTES` says where NxD Inference would go wrong or raise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from neuron_attn_rewrite.errors import ConfigError
from neuron_attn_rewrite.masks.spec import KeyPadding
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy.strategies import FlashAttentionStrategy

NONE, UNSHARDED, SHARDED, CONTEXT_PARALLEL, STRIDED_CONTEXT_PARALLEL, SLIDING_WINDOW = FlashAttentionStrategy

LADDER = "the ladder documented for NxD Inference 2.26"
SOURCE_2_26 = "NxD Inference 2.26, attention_base.py:999-1049"
SOURCE_2_28 = "NxD Inference 2.27 and 2.28, attention_base.py:1330-1381"
SOURCE_2_29 = "NxD Inference 2.29, attention_base.py:1001-1034"
SOURCE_CP = "NxD Inference 2.26 to 2.29, get_flash_attention_strategy_cp"

SDKS = ("2.26", "2.26.1", "2.27", "2.28", "2.29", "2.30", "2.31", "2.32")
"""The releases that a configuration can name."""


@dataclass(frozen=True)
class Case:
    """What a rule table looks at."""

    q_len: int
    head_dim: int
    masked: bool
    """What NxD Inference calls `has_attention_mask`."""
    window: bool
    """A causal sliding window."""
    lnc: int
    target: str
    enabled: bool | None = None
    """`attn_kernel_enabled`: None leaves it to the lengths, True also takes 512 to 4095 tokens on LNC 1."""
    cp_degree: int = 1
    strided: bool = False
    """`strided_context_parallel_kernel_enabled`."""


@dataclass(frozen=True)
class Rule:
    """One row. A field that is None, or at its default, is not asked."""

    strategy: FlashAttentionStrategy
    source: str
    min_q_len: int = 0
    max_q_len: int | None = None
    """Inclusive."""
    multiple_of: int = 1
    """Of which q_len must be a multiple."""
    lnc: int | None = None
    targets: tuple[str, ...] = ()
    masked: bool | None = None
    window: bool | None = None
    enabled: bool | None = None
    context_parallel: bool | None = None
    strided: bool | None = None
    beyond_head_dim: bool | None = None
    """Whether q_len is larger than head_dim."""
    error: str = ""
    """What NxD Inference raises here."""

    def holds(self, case: Case) -> bool:
        """Whether the row fits."""
        asked = {
            "lnc": case.lnc,
            "masked": case.masked,
            "window": case.window,
            "enabled": case.enabled,
            "context_parallel": case.cp_degree > 1,
            "strided": case.strided,
            "beyond_head_dim": case.q_len > case.head_dim,
        }
        return (
            self.min_q_len <= case.q_len <= (case.q_len if self.max_q_len is None else self.max_q_len)
            and case.q_len % self.multiple_of == 0
            and (not self.targets or case.target in self.targets)
            and all(getattr(self, name) in (None, value) for name, value in asked.items())
        )

    @property
    def when(self) -> str:
        """The row in words."""
        flags = {
            "masked": ("masked", "no mask"),
            "window": ("sliding window", "no window"),
            "enabled": ("kernel forced on", "kernel switched off"),
            "context_parallel": ("context parallel", "one rank"),
            "strided": ("strided", "contiguous"),
            "beyond_head_dim": ("q_len > head_dim", "q_len <= head_dim"),
        }
        words = [f"LNC {self.lnc}"] if self.lnc else []
        words += ["/".join(self.targets)] if self.targets else []
        words += [yes if getattr(self, f) else no for f, (yes, no) in flags.items() if getattr(self, f) is not None]
        words += [f"q_len >= {self.min_q_len}"] if self.min_q_len else []
        words += [f"q_len < {self.max_q_len + 1}"] if self.max_q_len is not None else []
        words += [f"q_len a multiple of {self.multiple_of}"] if self.multiple_of > 1 else []
        return ", ".join(words) or "anything else"

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Rule:
        """A row given as plain data, such as JSON: fields by name, the strategy by its name.

        Raises:
            ConfigError: a field is unknown or the strategy is missing.
        """
        names = [f.name for f in fields(cls)]
        unknown = [name for name in row if name not in names]
        if unknown or row.get("strategy") not in FlashAttentionStrategy.__members__:
            raise ConfigError(
                f"a table row {dict(row)!r} needs a strategy, one of {', '.join(FlashAttentionStrategy.__members__)}, "
                f"and may have the fields {', '.join(names[1:])}."
            )
        values = {**row, "strategy": FlashAttentionStrategy[row["strategy"]], "targets": tuple(row.get("targets", ()))}
        return cls(**{"source": "the caller's table", **values})


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
        lambda p, _: is_masked(p) and (bool(p.mask.runs.claims) or p.mask.band.upper != p.kv_len - p.q_len),
    ),
)
