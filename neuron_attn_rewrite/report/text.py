"""The report as text: plain, coloured, or as a Markdown table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec

from neuron_attn_rewrite.report.data import ReportData, SiteReport
from neuron_attn_rewrite.report.groups import Group, groups

Line = tuple[tuple[str, str], ...]
"""The pieces of one line, each with its style."""


def to_text(report: ReportData, color: bool | None) -> str:
    if color is None:
        color = sys.stdout.isatty() and find_spec("rich") is not None
    lines = [_headline(report), *_notes(report)]
    for group in groups(report):
        lines += [(), *_lines(group)]
    if not color:
        return "\n".join("".join(text for text, _ in line) for line in lines)
    from rich.console import Console
    from rich.text import Text

    console = Console(force_terminal=True, soft_wrap=True, highlight=False)
    with console.capture() as capture:
        for line in lines:
            console.print(Text.assemble(*line))
    return capture.get().rstrip("\n")


def _headline(report: ReportData) -> Line:
    done, found = len(report.replaced), len(report.sites)
    saved = f", {amount(report.score_bytes_saved)} of scores never formed" if report.score_bytes_saved else ""
    style = "bold green" if done == found else "bold yellow" if done else "bold red"
    return (
        (f"{done} of {found} attentions replaced", style),
        (f" for {report.target} (LNC {report.lnc}, policy {report.policy})", ""),
        (f", {report.nodes_before} -> {report.nodes_after} nodes{saved}", ""),
    )


def _notes(report: ReportData) -> Iterator[Line]:
    for name in report.unused_inputs:
        yield ((f"input {name} is not read by the captured graph", "yellow"),)


def _lines(group: Group) -> Iterator[Line]:
    site = group.first
    sign, style = ("+", "bold green") if site.is_replaced else ("-", "bold yellow")
    times = f"  ({len(group.sites)} times)" if len(group.sites) > 1 else ""
    yield (f"{sign} {group.name}", style), (times, "dim")
    yield _entry("pattern", site.pattern)
    if site.source:
        yield _entry("source", site.source, "dim")
    if site.q_len is not None:
        yield _entry("shape", shape(site))
        yield _entry("mask", mask(site))
    yield _entry("becomes", becomes(site))
    for i, reason in enumerate(site.reasons):
        yield (*_entry("" if i else "why", str(reason)), (f"  [{reason.code}]", "dim"))
    if site.is_replaced:
        removed, added = (sum(len(getattr(s, f)) for s in group.sites) for f in ("removed_nodes", "added_nodes"))
        saved = sum(s.transposes_saved for s in group.sites)
        fewer = f", {saved} transposes fewer" if saved > 0 else ""
        yield _entry("nodes", f"{removed} removed, {added} added{fewer}")
    if group.error:
        yield _entry("error", group.error)


def _entry(label: str, text: str, style: str = "") -> Line:
    return (f"    {label:<9} ", "cyan"), (text, style)


def shape(site: SiteReport) -> str:
    """Sizes, dtype and scale of an attention that was understood."""
    query = [site.batch, site.num_heads, site.q_len, site.head_dim]
    key = [site.batch, site.num_kv_heads, site.kv_len, site.head_dim]
    value = "" if site.v_head_dim == site.head_dim else f", v_head_dim {site.v_head_dim}"
    kind = str(site.dtype).removeprefix("torch.")
    return f"query {query}, key {key}{value}, {kind}, scale {site.scale:.6g}"


def becomes(site: SiteReport) -> str:
    """The kernel with its strategy, and for training what computes the gradients."""
    backward = f", gradients by {site.gradients}" if site.gradients else ""
    return f"{site.kernel} ({site.strategy.name}){backward}"


def mask(site: SiteReport) -> str:
    """The mask and everything else that changes the scores."""
    extras = [f"softcap {site.softcap:g}"] if site.softcap else []
    extras += ["sink"] if site.sink else []
    extras += [f"bias {list(site.bias)}"] if site.bias else []
    return ", ".join([str(site.mask), *extras])


def amount(size: int) -> str:
    """A number of bytes in powers of 1024, such as `1.5 GiB`."""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def to_markdown(report: ReportData) -> str:
    lines = ["".join(text for text, _ in line) + "." for line in [_headline(report), *_notes(report)]]
    lines += ["", "| attention | becomes | shape | mask | why | error |", "|---|---|---|---|---|---|"]
    for group in groups(report):
        site = group.first
        times = f" ({len(group.sites)} times)" if len(group.sites) > 1 else ""
        sizes = (shape(site), mask(site)) if site.q_len is not None else ("", "")
        why = "; ".join(f"{r} (`{r.code}`)" for r in site.reasons)
        error = "" if group.max_error is None else f"{group.max_error:.1e}"
        cells = (f"`{group.name}`{times}", becomes(site), *sizes, why, error)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
