"""The differences between two reports, site by site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.report.data import ReportData, SiteReport
from neuron_attn_rewrite.report.groups import common_name


@dataclass(frozen=True)
class ReportDiff:
    """The differences between two reports, one line for each kind of change. It is false if there are none."""

    lines: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __str__(self) -> str:
        return "\n".join(self.lines) or "no change"


IGNORED = {"name", "before", "after", "max_error", "draws", "source", "source_code"}
"""Fields that may differ between two runs, or after any edit of the model's file."""


def diff(old: ReportData, new: ReportData) -> ReportDiff:
    """Compare two reports. Sites are paired by name; sites of the same name are paired in their order."""
    lines = [
        f"~ {name}: {getattr(old, name)} -> {getattr(new, name)}"
        for name in ("target", "lnc", "policy")
        if getattr(old, name) != getattr(new, name)
    ]
    lines += [f"+ input {name} is no longer read" for name in new.unused_inputs if name not in old.unused_inputs]
    lines += [f"- input {name} is read again" for name in old.unused_inputs if name not in new.unused_inputs]
    changes: dict[str, list[str]] = {}
    old_sites, new_sites = _sites_by_key(old), _sites_by_key(new)
    for key in dict.fromkeys([*old_sites, *new_sites]):
        for change in _changes(old_sites.get(key), new_sites.get(key)):
            changes.setdefault(change, []).append(key[0])
    lines += [f"{change[0]} {common_name(names)}{change[1:]}" for change, names in changes.items()]
    return ReportDiff(tuple(lines))


def _sites_by_key(report: ReportData) -> Mapping[tuple[str, int], SiteReport]:
    seen: Counter[str] = Counter()
    keyed = {}
    for site in report.sites:
        keyed[site.name, seen[site.name]] = site
        seen[site.name] += 1
    return keyed


def _changes(old: SiteReport | None, new: SiteReport | None) -> Iterator[str]:
    """Each change as its sign (+, - or ~) and the text after the name of the site."""
    if old is None or new is None:
        site = new if old is None else old
        assert site is not None
        yield f"{'+' if old is None else '-'}: {site.kernel} ({site.strategy.name}), mask {site.mask}"
        return
    parts = []
    for name in (f.name for f in fields(SiteReport) if f.name not in IGNORED):
        a, b = _comparable(getattr(old, name)), _comparable(getattr(new, name))
        if a != b:
            parts.append(f"{name} {_shown(a)} -> {_shown(b)}")
    if parts:
        yield f"~: {', '.join(parts)}"


def _comparable(value: Any) -> Any:
    """The value to compare. Reasons are compared by code, because their sentences contain the names of nodes."""
    is_reasons = isinstance(value, tuple) and value and isinstance(value[0], Reason)
    return [v.code for v in value] if is_reasons else value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return str(getattr(value, "name", value)).removeprefix("torch.")
