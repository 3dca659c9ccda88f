"""What changed between two reports, site by site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.report.groups import common_name
from neuron_attn_rewrite.report.model import ReportDiff, RewriteReport, SiteReport

IGNORED = {"name", "before", "after", "max_error", "source", "source_code"}
"""What may differ from run to run, or with any edit of the model's file."""


def diff(old: RewriteReport, new: RewriteReport) -> ReportDiff:
    """Sites are paired by name, and by order where several share one."""
    lines = [
        f"~ {name}: {getattr(old, name)} -> {getattr(new, name)}"
        for name in ("target", "lnc", "policy")
        if getattr(old, name) != getattr(new, name)
    ]
    lines += [f"+ input {name} is no longer read" for name in new.unused_inputs if name not in old.unused_inputs]
    lines += [f"- input {name} is read again" for name in old.unused_inputs if name not in new.unused_inputs]
    changes: dict[str, list[str]] = {}
    was, now = _keyed(old), _keyed(new)
    for key in dict.fromkeys([*was, *now]):
        for change in _changes(was.get(key), now.get(key)):
            changes.setdefault(change, []).append(key[0])
    lines += [f"{change[0]} {common_name(names)}{change[1:]}" for change, names in changes.items()]
    return ReportDiff(tuple(lines))


def _keyed(report: RewriteReport) -> Mapping[tuple[str, int], SiteReport]:
    seen: Counter[str] = Counter()
    keyed = {}
    for site in report.sites:
        keyed[site.name, seen[site.name]] = site
        seen[site.name] += 1
    return keyed


def _changes(old: SiteReport | None, new: SiteReport | None) -> Iterator[str]:
    """Each change as a sign and what follows the site's name."""
    if old is None or new is None:
        site = new if old is None else old
        assert site is not None
        yield f"{'+' if old is None else '-'}: {site.kernel} ({site.strategy.name}), mask {site.mask}"
        return
    said = []
    for name in (f.name for f in fields(SiteReport) if f.name not in IGNORED):
        a, b = _compared(getattr(old, name)), _compared(getattr(new, name))
        if a != b:
            said.append(f"{name} {_told(a)} -> {_told(b)}")
    if said:
        yield f"~: {', '.join(said)}"


def _compared(value: Any) -> Any:
    """Of reasons the codes, because their sentences name nodes."""
    is_reasons = isinstance(value, tuple) and value and isinstance(value[0], Reason)
    return [v.code for v in value] if is_reasons else value


def _told(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return str(getattr(value, "name", value)).removeprefix("torch.")
