"""The rows of a rule table. The first row that fits decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.config.types import fits, in_words
from neuron_attn_rewrite.errors import ConfigError

SDKS = ("2.26", "2.26.1", "2.27", "2.28", "2.29", "2.30", "2.31", "2.32")
"""The releases that a configuration can name."""


@dataclass(frozen=True)
class Case:
    """What the rows of a table ask about an attention."""

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

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Rule).items():
            if not fits(value := getattr(self, name), hint):
                raise ConfigError(f"a table row has {name}={value!r:.80}: give {in_words(hint)}.")
        if self.multiple_of < 1:
            raise ConfigError(f"a table row has multiple_of={self.multiple_of}: give a number of at least 1.")

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
        if unknown or str(row.get("strategy")) not in FlashAttentionStrategy.__members__:
            raise ConfigError(
                f"a table row {dict(row)!r} needs a strategy, one of {', '.join(FlashAttentionStrategy.__members__)}, "
                f"and may have the fields {', '.join(names[1:])}."
            )
        targets = row.get("targets", ())
        values = {
            **row,
            "strategy": FlashAttentionStrategy[str(row["strategy"])],
            "targets": tuple(targets) if isinstance(targets, list) else targets,
        }
        return cls(**{"source": "the caller's table", **values})
