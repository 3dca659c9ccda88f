"""The configuration of a rewrite."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from neuron_attn_rewrite.config.rules import Rule
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.config.types import fits, in_words
from neuron_attn_rewrite.errors import ConfigError
from neuron_attn_rewrite.hardware import HARDWARE

TOLERANCES: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
)
"""Largest accepted difference of one attention's output, relative to the largest magnitude in it."""

Kernel = Literal[
    "flash_fwd",
    "flash_prior",
    "attention_cte",
    "attention_tkg",
    "attention_segmented_cte",
    "attention_isa_kernel",
    "neuronxcc_flash_fwd",
    "sliding_window_flash_fwd",
    "prefix_caching_attention_fwd_isa_kernel",
    "attention_tkg_fwd_isa_kernel",
]
"""The name of a kernel that `strategy.legality.KERNELS` describes: ours first, then those of the SDK."""
KERNEL_NAMES: tuple[str, ...] = get_args(Kernel)
TWO_CORE_TARGETS = tuple(name for name, chip in HARDWARE.items() if chip.max_lnc == 2)


@dataclass(frozen=True)
class RewriteConfig:
    """How to rewrite. With the defaults, the results stay the same up to floating-point rounding.

    Raises:
        ConfigError: a field is unknown, or its value is not one of those listed.
    """

    target: Literal["trn1", "inf2", "trn2", "trn3"] = "trn2"
    """Hardware: "trn1", "inf2", "trn2" or "trn3"."""
    lnc: Literal[1, 2] | None = None
    """Physical cores in a logical NeuronCore, 1 or 2; None takes the target's default (2 on trn2 and trn3)."""
    policy: Literal["profitable", "sdk", "always"] = "profitable"
    """When to take a kernel. "profitable": if the cost model predicts that it is faster. "sdk": if the rule table of
    the SDK release takes one. "always": wherever a kernel can compute the attention."""
    sdk: Literal["2.26", "2.26.1", "2.27", "2.28", "2.29", "2.30", "2.31", "2.32"] = "2.29"
    """The SDK release, "2.26" to "2.32": `policy="sdk"` follows its rule table, and its kernels are the candidates."""
    attn_kernel_enabled: bool | None = None
    """The switch of NxD Inference, for its rule table. True: also 512 to 4095 tokens on LNC 1. False: no kernel."""
    table: tuple[Rule | Mapping[str, Any], ...] = field(default=(), hash=False)
    """A rule table in place of the SDK's: rows, or plain data with the fields of `config.rules.Rule`."""
    kernels: tuple[Kernel, ...] = ()
    """Kernels that may be used: "flash_fwd" and "flash_prior" (of this package) and those of `kernels.vendor.ADAPTERS`.
    Empty means those of this package and those of the SDK that is installed where the rewrite runs."""
    sites: Mapping[str, FlashAttentionStrategy | Kernel] = field(default_factory=dict, hash=False)
    """Overrides by module path, such as {"model.layers.0.*": FlashAttentionStrategy.NONE}: a strategy, or the name of a
    kernel. The first pattern that matches counts. A kernel that cannot compute the attention is still refused."""
    profile: str | None = None
    """A file of measured times. Where it has a time, that replaces the prediction of the cost model."""
    cp_degree: int = 1
    """How many ranks share the query rows, if the graph is that of one rank."""
    cp_rank: int = 0
    """The rank whose graph this is."""
    strided_context_parallel: bool = False
    """Whether rank r holds the rows r, r + cp_degree, ... instead of a contiguous part."""
    strategy: FlashAttentionStrategy | None = None
    """Force one strategy on every attention that it can compute."""
    padding: Literal["exact", "right"] = "exact"
    """"right" is your promise that every `attention_mask` pads on the right. Key padding under a causal mask is then
    dropped, and output rows past the end of a sequence are undefined."""
    empty_rows: Literal["exact", "any"] = "exact"
    """"any" is your promise that output rows which see no key do not matter."""
    weights: Literal["native", "beside"] = "native"
    """If something else also reads the attention weights or scores (`output_attentions`): "native" does not replace the
    attention; "beside" lets a kernel compute the output and keeps the softmax for the weights."""
    gradients: bool | None = None
    """Whether gradients will be taken. If so, the report says what computes them. None means yes for a model in
    training mode with parameters that require gradients, and for a graph that torch.compile compiles for training."""
    verify: bool = True
    """Compare each replaced attention with the original on the example and on drawn inputs, and put back those that
    differ by more than the tolerance. Compare the captured graph with the model, and raise a `CaptureError` if they
    differ. docs/proofs.md says what is drawn."""
    require: int | Literal["all"] | None = None
    """How many attentions must be replaced: exactly this number, or "all" that are found, at least one. Any other
    number is a `RewriteError`."""
    strict: bool = False
    """Whether an internal error in the analysis of one attention is raised. If not, this attention is not replaced, its
    reason has the code `internal-error`, and the rest of the model is rewritten."""
    tolerances: Mapping[torch.dtype, float] = field(default_factory=dict, hash=False)
    """Largest accepted difference by dtype, relative to the largest output. A dtype that is not named keeps its
    default: float64 1e-9, float32 2e-5, bfloat16 1.6e-2, float16 2e-3."""

    def __new__(cls, *args: Any, **kwargs: Any) -> RewriteConfig:
        names = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(names)}."
                raise ConfigError(f"RewriteConfig has no field {name!r}: {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_types()
        if self.lnc == 2 and self.target not in TWO_CORE_TARGETS:
            raise ConfigError(
                f"RewriteConfig.lnc=2 needs one of {', '.join(TWO_CORE_TARGETS)}: {self.target} has no pairs of cores."
            )
        if isinstance(self.require, int) and self.require < 0:
            raise ConfigError(f'RewriteConfig.require={self.require!r} is not possible: give a number, "all" or None.')
        for dtype, tolerance in self.tolerances.items():
            if not fits(dtype, torch.dtype) or not fits(tolerance, float) or not 0 < tolerance < 1:
                raise ConfigError(
                    f"RewriteConfig.tolerances[{dtype!r}]={tolerance!r}: give a torch.dtype and a number in (0, 1)."
                )
        for pattern, wish in self.sites.items():
            if not isinstance(pattern, str) or not fits(wish, FlashAttentionStrategy | Kernel):
                raise ConfigError(
                    f"RewriteConfig.sites[{pattern!r}]={wish!r}: give a FlashAttentionStrategy, or a kernel among "
                    f"{', '.join(KERNEL_NAMES)}."
                )
        if not (self.cp_degree >= 1 and 0 <= self.cp_rank < self.cp_degree):
            raise ConfigError(
                f"RewriteConfig.cp_degree={self.cp_degree!r}, cp_rank={self.cp_rank!r}: "
                "the rank must lie in [0, cp_degree)."
            )
        if self.strided_context_parallel and self.cp_degree == 1:
            raise ConfigError("RewriteConfig.strided_context_parallel=True needs cp_degree > 1.")
        rows = tuple(row if isinstance(row, Rule) else Rule.read(row) for row in self.table)
        object.__setattr__(self, "table", rows)
        object.__setattr__(self, "tolerances", {**TOLERANCES, **self.tolerances})

    def _check_types(self) -> None:
        """Check that every value has the type of its field. Lists count as tuples.

        Raises:
            ConfigError: a value has another type, or is not one of those listed.
        """
        for name, hint in get_type_hints(RewriteConfig).items():
            value, allowed = getattr(self, name), choices().get(name)
            if name in ("table", "kernels") and isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            by_entry = name in ("sites", "tolerances")  # their entries are checked one by one
            if not fits(value, Mapping[Any, Any] if by_entry else hint):
                words = f"choose one of {', '.join(map(repr, allowed))}" if allowed else f"give {in_words(hint)}"
                raise ConfigError(f"RewriteConfig.{name}={value!r:.200} is not possible: {words}.")

    @classmethod
    def of(cls, config: RewriteConfig | None) -> RewriteConfig:
        """The defaults in the place of None.

        Raises:
            ConfigError: it is something else.
        """
        if config is not None and not isinstance(config, cls):
            raise ConfigError(f"config must be a RewriteConfig(...), not {type(config).__name__}.")
        return config or cls()

    @property
    def logical_cores(self) -> int:
        """`lnc`, or the target's default."""
        return self.lnc or (2 if self.target in TWO_CORE_TARGETS else 1)

    def tolerance(self, dtype: torch.dtype) -> float:
        """The largest accepted relative difference for outputs of this dtype."""
        return self.tolerances.get(dtype, TOLERANCES[torch.float32])


@cache
def choices() -> Mapping[str, tuple[object, ...]]:
    """The values that a field of `RewriteConfig` can have, for each field that has a fixed set of them."""
    found = {name: _values(hint) for name, hint in get_type_hints(RewriteConfig).items()}
    return MappingProxyType({name: values for name, values in found.items() if values})


def _values(hint: Any) -> tuple[object, ...]:
    """The values of a type that has finitely many: of literals, bools and None. Empty for any other type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if hint in (bool, NoneType):
        return (True, False) if hint is bool else (None,)
    parts = [_values(part) for part in get_args(hint)] if get_origin(hint) in (Union, UnionType) else []
    if not all(parts):
        return ()
    return tuple(sorted((value for part in parts for value in part), key=lambda value: value is not None))
