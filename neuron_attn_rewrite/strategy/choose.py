"""Which kernel computes a site: first whether one can, then whether the policy wants it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from neuron_attn_rewrite.config import RewriteConfig
from neuron_attn_rewrite.problem import AttentionProblem, EmptyRows
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.strategy.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.strategy.tables import TABLES, is_causal_window

NATIVE = "native"
"""The kernel of a site that stays as it was."""
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NONE, UNSHARDED, SHARDED, CONTEXT_PARALLEL, STRIDED_CONTEXT_PARALLEL, SLIDING_WINDOW = FlashAttentionStrategy
CORES = {UNSHARDED: 1, SHARDED: 2}
"""Physical cores that one call runs on, where the strategy says it."""


@dataclass(frozen=True)
class Decision:
    """What a site gets."""

    strategy: FlashAttentionStrategy
    kernel: str
    """The op in `torch.ops.neuron_attn`, or `NATIVE`."""
    lnc: int
    """Physical cores that one call runs on."""
    reasons: tuple[Reason, ...]
    """Every rule that spoke, in order."""


@dataclass(frozen=True)
class Clause:
    """One thing that a kernel or a strategy demands."""

    code: str
    """The code of the reason that a broken demand is."""
    demand: str
    """In words, with the fields of the problem as {p.name}."""
    holds: Callable[[AttentionProblem, int], bool]
    """Tests the problem and the physical cores in a logical NeuronCore."""


KERNELS: Mapping[str, tuple[Clause, ...]] = MappingProxyType(
    {
        "flash_fwd": (
            Clause(
                "size-zero",
                "no size may be 0",
                lambda p, _: 0 not in (p.batch, p.num_kv_heads, p.q_len, p.kv_len, p.head_dim, p.v_head_dim),
            ),
            Clause(
                "head-groups",
                "num_heads {p.num_heads} must be a multiple of num_kv_heads {p.num_kv_heads}",
                lambda p, _: p.num_heads % p.num_kv_heads == 0,
            ),
            Clause(
                "head-dim",
                f"head_dim {{p.head_dim}} must be at most {MAX_HEAD_DIM}",
                lambda p, _: p.head_dim <= MAX_HEAD_DIM,
            ),
            Clause(
                "head-dim",
                f"v_head_dim {{p.v_head_dim}} must be at most {MAX_HEAD_DIM}",
                lambda p, _: p.v_head_dim <= MAX_HEAD_DIM,
            ),
            Clause(
                "dtype",
                f"dtype {{p.dtype}} must be one of {', '.join(map(str, DTYPES))}",
                lambda p, _: p.dtype in DTYPES,
            ),
            Clause("scale-not-finite", "scale {p.scale} must be finite", lambda p, _: math.isfinite(p.scale)),
            Clause(
                "softcap-sign", "softcap {p.softcap} must be positive", lambda p, _: p.softcap is None or p.softcap > 0
            ),
            Clause(
                "empty-rows",
                "a query that sees no key must give zeros or the mean of all values, and here gives neither; "
                'empty_rows="any" or padding="right" says that such rows do not matter',
                lambda p, _: p.empty_rows is not EmptyRows.OTHER,
            ),
        )
    }
)
"""What each kernel demands of a problem."""

STRATEGIES: Mapping[FlashAttentionStrategy, Clause] = MappingProxyType(
    {
        SHARDED: Clause("strategy-illegal", "SHARDED_KERNEL needs LNC 2", lambda _, cores: cores == 2),
        SLIDING_WINDOW: Clause(
            "strategy-illegal",
            "SLIDING_WINDOW_KERNEL needs a causal window, and the mask is {p.mask}",
            lambda p, _: is_causal_window(p),
        ),
        CONTEXT_PARALLEL: Clause("strategy-illegal", "CONTEXT_PARALLEL_KERNEL needs several ranks", lambda *_: False),
        STRIDED_CONTEXT_PARALLEL: Clause(
            "strategy-illegal", "STRIDED_CONTEXT_PARALLEL_KERNEL needs several ranks", lambda *_: False
        ),
    }
)
"""What some strategies demand on top."""


def broken(clauses: Iterable[Clause], problem: AttentionProblem, cores: int) -> Reason | None:
    """The first demand that the problem breaks; None without one."""
    return next((Reason(c.code, c.demand.format(p=problem)) for c in clauses if not c.holds(problem, cores)), None)


def choose(problem: AttentionProblem, config: RewriteConfig) -> Decision:
    """The kernel and strategy for a problem. What no kernel can compute stays native, whatever the policy."""
    cores, kernel = config.logical_cores, "flash_fwd"
    illegal = broken(KERNELS[kernel], problem, cores)
    if illegal:
        return Decision(NONE, NATIVE, cores, (illegal.behind(f"{kernel}: "),))
    strategy, reasons = _forced(problem, config) if config.strategy else _by_policy(problem, config)
    if strategy is NONE:
        return Decision(NONE, NATIVE, cores, reasons)
    return Decision(strategy, kernel, CORES.get(strategy, cores), reasons)


def _forced(problem: AttentionProblem, config: RewriteConfig) -> tuple[FlashAttentionStrategy, tuple[Reason, ...]]:
    assert config.strategy is not None
    demands = [STRATEGIES[config.strategy]] if config.strategy in STRATEGIES else []
    illegal = broken(demands, problem, config.logical_cores)
    forced = Reason("strategy-forced", f"strategy {config.strategy.name} is forced")
    return (NONE, (illegal,)) if illegal else (config.strategy, (forced,))


def _by_policy(problem: AttentionProblem, config: RewriteConfig) -> tuple[FlashAttentionStrategy, tuple[Reason, ...]]:
    cores = config.logical_cores
    rule = next(rule for rule in TABLES[config.sdk] if rule.holds(problem, cores))
    reason = Reason("sdk-rule", f"{rule.when}, here {problem.q_len}: {rule.strategy.name} ({rule.source})")
    if config.policy == "sdk" or rule.strategy is not NONE:
        return rule.strategy, (reason,)
    window = config.sdk == "2.26" and is_causal_window(problem)
    strategy = SLIDING_WINDOW if window else SHARDED if cores == 2 else UNSHARDED
    always = Reason("policy-always", f'policy "always": {strategy.name} at every legal site')
    return strategy, (reason, always)
