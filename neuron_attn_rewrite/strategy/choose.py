"""Which kernel computes a site: first which can, then what the policy wants, then which is fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import MappingProxyType

import torch

from neuron_attn_rewrite.config.options import TOLERANCES, RewriteConfig
from neuron_attn_rewrite.config.rules import Case, Rule
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.strategy import cost, profile
from neuron_attn_rewrite.strategy.clauses import DTYPES, Clause, Setting, broken, is_limited
from neuron_attn_rewrite.strategy.cost import Time
from neuron_attn_rewrite.strategy.legality import OURS, bridged, illegal
from neuron_attn_rewrite.strategy.tables import NOTES, first, is_causal_window, is_masked, table

NATIVE = "native"
"""The kernel of a site that stays as it was."""
UNTRIED = 1.25
"""Our own kernel has run on a simulator only: the SDK's is taken unless ours is predicted to be faster by more."""

NONE, UNSHARDED, SHARDED, CONTEXT_PARALLEL, STRIDED_CONTEXT_PARALLEL, SLIDING_WINDOW = FlashAttentionStrategy
MOST_RANKS = 32
"""The largest cp_degree that attention_cte takes."""
CORES = {UNSHARDED: 1, SHARDED: 2}
"""Physical cores that one call runs on, where the strategy says it."""


@dataclass(frozen=True)
class Decision:
    """What a site gets."""

    strategy: FlashAttentionStrategy
    kernel: str
    """What the op launches: our `flash_fwd`, a name in `kernels.vendor.ADAPTERS`, or `NATIVE`."""
    lnc: int
    """Physical cores that one call runs on."""
    reasons: tuple[Reason, ...]
    """Every rule that spoke, in order."""
    gradients: str | None = None
    """What computes the gradients, as `strategy.gradients` names it; None where none are taken."""


def strategy_clauses(config: RewriteConfig) -> Mapping[FlashAttentionStrategy, Clause]:
    """What some strategies demand on top of what kernels do."""
    degree, rank = config.cp_degree, config.cp_rank
    ranks = f"needs cp_degree > 1 and this rank's rows, and cp_degree is {degree}, cp_rank {rank}, the mask {{p.mask}}"
    return MappingProxyType(
        {
            SHARDED: Clause("strategy-illegal", "SHARDED_KERNEL needs LNC 2", lambda _, s: s.cores == 2),
            SLIDING_WINDOW: Clause(
                "strategy-illegal",
                "SLIDING_WINDOW_KERNEL needs a causal window, and the mask is {p.mask}",
                lambda p, _: is_causal_window(p),
            ),
            CONTEXT_PARALLEL: Clause(
                "strategy-illegal",
                f"CONTEXT_PARALLEL_KERNEL {ranks}",
                lambda p, _: degree > 1 and _is_rank(p, degree, p.mask.band.upper == rank * p.q_len),
            ),
            STRIDED_CONTEXT_PARALLEL: Clause(
                "strategy-illegal",
                f"STRIDED_CONTEXT_PARALLEL_KERNEL {ranks}",
                lambda p, _: degree > 1 and _is_rank(p, degree, _is_strided(p, degree, rank)),
            ),
        }
    )


def _is_rank(problem: AttentionProblem, degree: int, rows_are_its: bool) -> bool:
    """The queries are one rank's part, the keys are all of them."""
    return problem.kv_len == problem.q_len * degree and rows_are_its


def _is_strided(problem: AttentionProblem, degree: int, rank: int) -> bool:
    """Row i is token `i * degree + rank`, and sees itself and what is before it, whatever the inputs are."""
    if degree > MOST_RANKS or is_limited(problem):
        return False
    ends = torch.arange(problem.q_len) * degree + rank + 1
    rows = problem.mask.rows(problem.q_len, problem.kv_len)
    return bool((rows[:, 0] == 0).all() and (rows[:, 1] == ends).all())


def _as_it_lies(*of: object) -> int:
    """No bytes are moved."""
    return 0


def choose_among(
    problems: Sequence[AttentionProblem],
    config: RewriteConfig,
    name: str = "",
    turned: Callable[[int, str], int] = _as_it_lies,
) -> tuple[int, Decision]:
    """Which of several forms of one attention, and its kernel: the form that is predicted to be fastest.

    Args:
        problems: the attention as the native operators compute it, then its other forms.
        config: see `RewriteConfig`.
        name: of the site.
        turned: bytes that are moved to lay out the operands and the result of form i for a kernel.
    """
    decisions = [choose(p, config, name, problems[0], partial(turned, i)) for i, p in enumerate(problems)]
    able = [i for i, decision in enumerate(decisions) if decision.kernel != NATIVE] or [0]

    def micros(i: int) -> float:
        kernel = decisions[i].kernel
        return time_of(kernel, problems[i], config, turned(i, kernel)).micros

    chosen = min(able, key=micros) if len(able) > 1 else able[0]
    return chosen, decisions[chosen]


def choose(
    problem: AttentionProblem,
    config: RewriteConfig,
    name: str = "",
    native: AttentionProblem | None = None,
    turned: Callable[[str], int] = _as_it_lies,
) -> Decision:
    """The kernel and strategy for a problem at the site `name`. What no kernel can compute stays native, always.

    Args:
        problem: what a kernel would compute.
        config: see `RewriteConfig`.
        name: of the site.
        native: what the native operators compute, if that is another form of it.
        turned: bytes that are moved to lay out operands and result for a kernel.
    """
    cores = config.logical_cores
    able, refused = candidates(problem, config)
    wish = next((wish for pattern, wish in config.sites.items() if fnmatchcase(name, pattern)), None)
    if isinstance(wish, str):
        able, refused = {k: v for k, v in able.items() if k == wish}, {k: v for k, v in refused.items() if k == wish}
    if not able:
        return Decision(NONE, NATIVE, cores, tuple(refused.values()))
    if isinstance(wish, FlashAttentionStrategy):
        strategy, reasons = _asked(wish, problem, config, Reason("site-override", f"{wish.name} is set for this site"))
    elif config.strategy:
        forced = Reason("strategy-forced", f"strategy {config.strategy.name} is forced")
        strategy, reasons = _asked(config.strategy, problem, config, forced)
    elif wish == OURS or isinstance(wish, str):
        strategy, reasons = _plain(problem, config), (Reason("site-override", f"{wish} is set for this site"),)
    else:
        strategy, reasons = _by_policy(problem, config, able, native or problem, turned)
    if strategy is NONE:
        return Decision(NONE, NATIVE, cores, reasons)
    kernel = fastest(able, problem, config, turned)
    others = tuple(refused.values()) if kernel == OURS else bridged(kernel, problem, able[kernel])
    return Decision(strategy, kernel, CORES.get(strategy, cores), (*reasons, *others))


def candidates(problem: AttentionProblem, config: RewriteConfig) -> tuple[dict[str, Setting], dict[str, Reason]]:
    """The kernels that can compute the problem, and why the others can't.

    Without `config.kernels` these are ours and those of the installed SDK.
    """
    able, refused = {}, {}
    for name in config.kernels or (OURS, *vendor.installed()):
        setting = setting_of(name, config)
        reason = illegal(name, problem, setting)
        if reason is None:
            able[name] = setting
        else:
            refused[name] = reason
    return able, refused


def setting_of(name: str, config: RewriteConfig) -> Setting:
    """Where the kernel would run, and the build of it that is installed."""
    adapter = vendor.find(name)
    loose = frozenset(d for d in DTYPES if config.tolerance(d) >= TOLERANCES[torch.bfloat16])
    return Setting(config.target, config.logical_cores, config.sdk, adapter.parameters if adapter else None, loose)


def time_of(kernel: str, problem: AttentionProblem, config: RewriteConfig, turned: int = 0) -> Time:
    """What a kernel, or the native operators, take: measured where the profile has it, else by the model.

    `turned` is the bytes that are moved to lay out operands and result for the kernel.
    """
    target, cores = config.target, config.logical_cores
    measured = profile.read(config.profile).time(kernel, problem, target, cores) if config.profile else None
    if measured:
        return measured
    if kernel == NATIVE:
        return cost.native_time(problem, target, cores)
    ranks = config.cp_degree if _plain(problem, config) is STRIDED_CONTEXT_PARALLEL else 1
    return cost.kernel_time(kernel, problem, target, cores, ranks=ranks, turned=turned)


def fastest(
    able: Mapping[str, Setting],
    problem: AttentionProblem,
    config: RewriteConfig,
    turned: Callable[[str], int] = _as_it_lies,
) -> str:
    """The kernel that is predicted to be fastest."""
    if len(able) == 1:
        return next(iter(able))
    return min(able, key=lambda k: time_of(k, problem, config, turned(k)).micros * (UNTRIED if k == OURS else 1))


def _asked(
    strategy: FlashAttentionStrategy, problem: AttentionProblem, config: RewriteConfig, reason: Reason
) -> tuple[FlashAttentionStrategy, tuple[Reason, ...]]:
    clause = strategy_clauses(config).get(strategy)
    no = clause and broken([clause], problem, Setting(config.target, config.logical_cores))
    return (NONE, (no,)) if no else (strategy, (reason,))


def _plain(problem: AttentionProblem, config: RewriteConfig) -> FlashAttentionStrategy:
    """The strategy of a call that nothing special is asked of."""
    parallel = STRIDED_CONTEXT_PARALLEL if config.strided_context_parallel else CONTEXT_PARALLEL
    if config.cp_degree > 1 and strategy_clauses(config)[parallel].holds(problem, Setting()):
        return parallel
    by_name = any(
        rule.strategy is SLIDING_WINDOW and rule.targets in ((), (config.target,)) for rule in table(config.sdk)
    )
    if by_name and is_causal_window(problem):
        return SLIDING_WINDOW
    return SHARDED if config.logical_cores == 2 else UNSHARDED


def case_of(problem: AttentionProblem, config: RewriteConfig) -> Case:
    """The problem as a rule table sees it."""
    return Case(
        q_len=problem.q_len,
        head_dim=problem.head_dim,
        masked=is_masked(problem),
        window=is_causal_window(problem),
        lnc=config.logical_cores,
        target=config.target,
        enabled=config.attn_kernel_enabled,
        cp_degree=config.cp_degree,
        strided=config.strided_context_parallel,
    )


def by_table(problem: AttentionProblem, config: RewriteConfig) -> tuple[FlashAttentionStrategy, Reason]:
    """What the rule table says, and its row."""
    rows = [row for row in config.table if isinstance(row, Rule)] or table(config.sdk)
    rule = first(rows, case_of(problem, config))
    if rule is None:
        return NONE, Reason("sdk-rule", f"no row of the given table fits q_len {problem.q_len}")
    error = f", where it raises {rule.error}" if rule.error else ""
    words = f"{rule.when}, here {problem.q_len}: {rule.strategy.name}{error} ({rule.source})"
    return rule.strategy, Reason("sdk-rule", words)


def notes(problem: AttentionProblem, config: RewriteConfig) -> tuple[str, ...]:
    """What NxD Inference would get wrong, or raise, if its table takes a kernel here."""
    case = case_of(problem, config)
    return tuple(f"{note.words} ({note.source})" for note in NOTES if note.holds(problem, case))


def _by_policy(
    problem: AttentionProblem,
    config: RewriteConfig,
    able: Mapping[str, Setting],
    native: AttentionProblem,
    turned: Callable[[str], int],
) -> tuple[FlashAttentionStrategy, tuple[Reason, ...]]:
    if config.policy == "profitable":
        return _profitable(problem, config, able, native, turned)
    strategy, row = by_table(problem, config)
    if strategy is not NONE:
        return _asked(strategy, problem, config, row)
    if config.policy == "sdk":
        return NONE, (row,)
    strategy = _plain(problem, config)
    return strategy, (row, Reason("policy-always", f'policy "always": {strategy.name} at every legal site'))


def _profitable(
    problem: AttentionProblem,
    config: RewriteConfig,
    able: Mapping[str, Setting],
    native: AttentionProblem,
    turned: Callable[[str], int],
) -> tuple[FlashAttentionStrategy, tuple[Reason, ...]]:
    kernel = fastest(able, problem, config, turned)
    ours, other = time_of(kernel, problem, config, turned(kernel)), time_of(NATIVE, native, config)
    measured = "measured" if ours.because == other.because == "a measurement" else "predicted"
    reason = Reason("cost", f"{kernel} is {measured} at {cost.ratio_words(native, ours, other)}")
    return (_plain(problem, config) if ours.micros < other.micros else NONE), (reason,)
