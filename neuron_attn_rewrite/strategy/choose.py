"""Chooses a kernel: those that can compute the problem, what the policy wants, and then the fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from neuron_attn_rewrite.strategy.clauses import DTYPES, Clause, Setting, first_refusal, is_limited
from neuron_attn_rewrite.strategy.cost import Time
from neuron_attn_rewrite.strategy.legality import OURS, PRIOR, bridged, illegal, reads_as_here
from neuron_attn_rewrite.strategy.tables import NOTES, first, is_causal_window, is_masked, table

NATIVE = "native"
"""In place of a kernel's name: the attention is not replaced."""
UNTRIED = 1.25
"""Our kernel has only run on a simulator. It must be predicted to be faster than the SDK's by this factor."""

NONE, UNSHARDED, SHARDED, CONTEXT_PARALLEL, STRIDED_CONTEXT_PARALLEL, SLIDING_WINDOW = FlashAttentionStrategy
MOST_RANKS = 32
"""The largest cp_degree that attention_cte takes."""
CORES = {UNSHARDED: 1, SHARDED: 2}
"""Physical cores of one call, for strategies that fix the number."""


@dataclass(frozen=True)
class Decision:
    """The strategy and the kernel of one attention."""

    strategy: FlashAttentionStrategy
    kernel: str
    """What the op launches: our `flash_fwd` or `flash_prior`, a name in `kernels.vendor.ADAPTERS`, or `NATIVE`."""
    lnc: int
    """Physical cores that one call runs on."""
    reasons: tuple[Reason, ...]
    """Every rule that applied, in order."""
    gradients: str | None = None
    """What computes the gradients, as `strategy.gradients` names it; None where none are taken."""


def strategy_clauses(config: RewriteConfig) -> Mapping[FlashAttentionStrategy, Clause]:
    """What strategies demand, in addition to kernels."""
    degree, rank = config.cp_degree, config.cp_rank
    ranks = f"needs cp_degree > 1 and this rank's rows, and cp_degree is {degree}, cp_rank {rank}, the mask {{p.mask}}"
    return MappingProxyType(
        {
            SHARDED: Clause("strategy-illegal", "SHARDED_KERNEL needs LNC 2", lambda _, s: s.cores == 2),
            SLIDING_WINDOW: Clause(
                "strategy-illegal",
                "SLIDING_WINDOW_KERNEL needs a causal window over keys in one tensor, and the mask is {p.mask}",
                lambda p, _: is_causal_window(p) and p.prior is None,
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
    """Whether the queries are one rank's share and the keys are all keys."""
    return problem.prior is None and problem.kv_len == problem.q_len * degree and rows_are_its


def _is_strided(problem: AttentionProblem, degree: int, rank: int) -> bool:
    """Whether row i is token `i * degree + rank` and sees the tokens up to itself, for all inputs."""
    if degree > MOST_RANKS or is_limited(problem):
        return False
    ends = torch.arange(problem.q_len) * degree + rank + 1
    rows = problem.mask.rows(problem.q_len, problem.kv_len)
    return bool((rows[:, 0] == 0).all() and (rows[:, 1] == ends).all())


def _as_it_lies(*of: object) -> int:
    """The default: operands and result already have the kernel's order, and no bytes are moved."""
    return 0


def choose_among(
    problems: Sequence[AttentionProblem],
    config: RewriteConfig,
    name: str = "",
    layout_bytes: Callable[[int, str], int] = _as_it_lies,
) -> tuple[int, Decision]:
    """The index and the decision of the form that is predicted to be fastest.

    Args:
        problems: the attention as the native operators compute it, then its other forms.
        config: see `RewriteConfig`.
        name: the site's.
        layout_bytes: bytes moved to bring operands and result of form i into an order that a kernel takes.
    """
    decisions = [choose(p, config, name, problems[0], partial(layout_bytes, i)) for i, p in enumerate(problems)]
    able = [i for i, decision in enumerate(decisions) if decision.kernel != NATIVE]
    if not able:  # the first one with a reason of its own
        able = [i for i, d in enumerate(decisions) if d.reasons and d.reasons[0].code != "two-sources"][:1] or [0]

    def micros(i: int) -> float:
        kernel = decisions[i].kernel
        return time_of(kernel, problems[i], config, layout_bytes(i, kernel)).micros * _factor(kernel)

    chosen = min(able, key=micros) if len(able) > 1 else able[0]
    apart = next((i for i in able if problems[i].prior is not None), chosen)
    if len(able) == 1 or apart == chosen == able[0]:
        return chosen, decisions[chosen]
    whole = min((i for i in able if i != apart), key=micros)
    ratio = micros(whole) / micros(apart)
    kernels = decisions[apart].kernel, decisions[whole].kernel
    reason = Reason(
        "cost", f"{kernels[0]} is predicted at {ratio:.2g} times the speed of {kernels[1]} with joined keys"
    )
    return chosen, replace(decisions[chosen], reasons=(*decisions[chosen].reasons, reason))


def choose(
    problem: AttentionProblem,
    config: RewriteConfig,
    name: str = "",
    native: AttentionProblem | None = None,
    layout_bytes: Callable[[str], int] = _as_it_lies,
) -> Decision:
    """The strategy and kernel for a problem. A problem that no kernel can compute stays native.

    Args:
        problem: what a kernel would compute.
        config: see `RewriteConfig`.
        name: the site's.
        native: what the native operators compute, if that is another form of it.
        layout_bytes: bytes moved to bring operands and result into an order that a kernel takes.
    """
    cores = config.logical_cores
    wish = next((wish for pattern, wish in config.sites.items() if fnmatchcase(name, pattern)), None)
    able, refused = candidates(problem, config, wish)
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
        strategy, reasons = _by_policy(problem, config, able, native or problem, layout_bytes)
    if strategy is NONE:
        return Decision(NONE, NATIVE, cores, reasons)
    kernel = fastest(able, problem, config, layout_bytes)
    others = tuple(refused.values()) if kernel in (OURS, PRIOR) else bridged(kernel, problem, able[kernel])
    return Decision(strategy, kernel, CORES.get(strategy, cores), (*reasons, *others))


def candidates(
    problem: AttentionProblem, config: RewriteConfig, wish: object = None
) -> tuple[dict[str, Setting], dict[str, Reason]]:
    """The kernels that can compute the problem, and the reason of each that can't.

    The candidates are `config.kernels`; if it is empty, those of our kernels and of the installed SDK that read keys as
    they lie here, and the one that is wished for.
    """
    able, refused = {}, {}
    names: tuple[str, ...] = config.kernels or (OURS, PRIOR, *vendor.installed())
    for name in names:
        if not config.kernels and name != wish and not reads_as_here(name, problem):
            continue
        setting = setting_of(name, config)
        reason = illegal(name, problem, setting)
        if reason is None:
            able[name] = setting
        else:
            refused[name] = reason
    return able, refused


def setting_of(name: str, config: RewriteConfig) -> Setting:
    """Where the kernel would run, with the parameters of its installed build."""
    adapter = vendor.find(name)
    loose = frozenset(d for d in DTYPES if config.tolerance(d) >= TOLERANCES[torch.bfloat16])
    return Setting(config.target, config.logical_cores, config.sdk, adapter.parameters if adapter else None, loose)


def time_of(kernel: str, problem: AttentionProblem, config: RewriteConfig, layout_bytes: int = 0) -> Time:
    """The time of a kernel or of the native operators: from the profile if it has one, else from the cost model.

    `layout_bytes` are moved to bring operands and result into an order that the kernel takes.
    """
    target, cores = config.target, config.logical_cores
    measured = profile.read(config.profile).time(kernel, problem, target, cores) if config.profile else None
    if measured:
        return measured
    if kernel == NATIVE:
        return cost.native_time(problem, target, cores)
    ranks = config.cp_degree if _plain(problem, config) is STRIDED_CONTEXT_PARALLEL else 1
    return cost.kernel_time(kernel, problem, target, cores, ranks=ranks, layout_bytes=layout_bytes)


def fastest(
    able: Mapping[str, Setting],
    problem: AttentionProblem,
    config: RewriteConfig,
    layout_bytes: Callable[[str], int] = _as_it_lies,
) -> str:
    """The kernel that is predicted to be fastest."""
    if len(able) == 1:
        return next(iter(able))
    return min(able, key=lambda k: time_of(k, problem, config, layout_bytes(k)).micros * _factor(k))


def _factor(kernel: str) -> float:
    return UNTRIED if kernel in (OURS, PRIOR) else 1.0


def _asked(
    strategy: FlashAttentionStrategy, problem: AttentionProblem, config: RewriteConfig, reason: Reason
) -> tuple[FlashAttentionStrategy, tuple[Reason, ...]]:
    clause = strategy_clauses(config).get(strategy)
    no = clause and first_refusal([clause], problem, Setting(config.target, config.logical_cores))
    return (NONE, (no,)) if no else (strategy, (reason,))


def _plain(problem: AttentionProblem, config: RewriteConfig) -> FlashAttentionStrategy:
    """The strategy of a call that nothing special is asked of."""
    parallel = STRIDED_CONTEXT_PARALLEL if config.strided_context_parallel else CONTEXT_PARALLEL
    if config.cp_degree > 1 and strategy_clauses(config)[parallel].holds(problem, Setting()):
        return parallel
    by_name = any(
        rule.strategy is SLIDING_WINDOW and rule.targets in ((), (config.target,)) for rule in table(config.sdk)
    )
    if by_name and is_causal_window(problem) and problem.prior is None:
        return SLIDING_WINDOW
    return SHARDED if config.logical_cores == 2 else UNSHARDED


def case_of(problem: AttentionProblem, config: RewriteConfig) -> Case:
    """What a rule table is asked about the problem."""
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
    """The strategy of the first row of the rule table that fits, with that row as the reason."""
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
    layout_bytes: Callable[[str], int],
) -> tuple[FlashAttentionStrategy, tuple[Reason, ...]]:
    if config.policy == "profitable":
        return _profitable(problem, config, able, native, layout_bytes)
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
    layout_bytes: Callable[[str], int],
) -> tuple[FlashAttentionStrategy, tuple[Reason, ...]]:
    kernel = fastest(able, problem, config, layout_bytes)
    ours, other = time_of(kernel, problem, config, layout_bytes(kernel)), time_of(NATIVE, native, config)
    measured = "measured" if ours.because == other.because == "a measurement" else "predicted"
    reason = Reason("cost", f"{kernel} is {measured} at {cost.ratio_words(native, ours, other)}")
    return (_plain(problem, config) if ours.micros < other.micros else NONE), (reason,)
