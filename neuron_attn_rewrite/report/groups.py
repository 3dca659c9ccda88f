"""Groups sites that differ only in their layer, so that a report shows them once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.report.data import ReportData, SiteReport


@dataclass(frozen=True)
class Group:
    """Sites that are shown as one, in the order of the graph."""

    sites: tuple[SiteReport, ...]

    @property
    def first(self) -> SiteReport:
        return self.sites[0]

    @property
    def name(self) -> str:
        """One name for all sites, such as `model.layers.[0-31].self_attn`."""
        return common_name([site.name for site in self.sites])

    @property
    def max_error(self) -> float | None:
        return max((s.max_error for s in self.sites if s.max_error is not None), default=None)

    @property
    def error(self) -> str:
        """The largest error of all sites in words, and on which inputs they were compared. Empty if they were not."""
        if self.max_error is None:
            return ""
        draws = min(s.draws for s in self.sites)
        drawn = f" and {draws} drawn {'input' if draws == 1 else 'inputs'}" if draws else ""
        return f"at most {self.max_error:.1e} of the largest output, on the example{drawn}"


def groups(report: ReportData) -> list[Group]:
    """The groups of a report, in the order of their first sites."""
    kinds: dict[SiteReport, list[SiteReport]] = {}
    for site in report.sites:
        kinds.setdefault(without_layer(site), []).append(site)
    return [Group(tuple(sites)) for sites in kinds.values()]


def without_layer(site: SiteReport) -> SiteReport:
    """The site without the fields that differ between layers or between runs."""
    return replace(site, name="", before=(), after=(), max_error=None, draws=0, reasons=without_numbers(site.reasons))


def without_numbers(reasons: Sequence[Reason]) -> tuple[Reason, ...]:
    """Reasons without the numbers in node names (`add_3` becomes `add`) and without measured numbers."""
    return tuple(Reason(r.code, r.code if r.code == "put-back" else re.sub(r"_\d+\b", "", r)) for r in reasons)


def common_name(names: Sequence[str]) -> str:
    """One name for several: with the ranges of a number in brackets if only this number differs, otherwise a list."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) == 1:
        return distinct[0]
    parts = [re.split(r"(\d+)", name) for name in distinct]
    columns = list(zip(*parts, strict=True)) if len({len(p) for p in parts}) == 1 else []
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(varying) != 1 or not columns[varying[0]][0].isdigit():
        return ", ".join(distinct) if len(distinct) < 3 else f"{distinct[0]}, ..., {distinct[-1]}"
    numbers = ranges([int(n) for n in columns[varying[0]]])
    return "".join(f"[{numbers}]" if i == varying[0] else column[0] for i, column in enumerate(columns))


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as text: `0-3` for 0, 1, 2, 3; `0,2..30` for a constant step; otherwise a list such as `0-3,7`."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if len(numbers) > 2 and step > 1 and all(b - a == step for a, b in pairwise(numbers)):
        return f"{numbers[0]},{numbers[1]}..{numbers[-1]}"
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
