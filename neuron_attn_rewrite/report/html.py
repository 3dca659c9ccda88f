"""The report as one self-contained HTML page: no script, no network, light and dark colours."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files

from neuron_attn_rewrite.errors import RewriteError
from neuron_attn_rewrite.reasons import REASONS
from neuron_attn_rewrite.report.data import ReportData
from neuron_attn_rewrite.report.drawing import graph_svg, sides
from neuron_attn_rewrite.report.groups import groups
from neuron_attn_rewrite.report.pictures import mask_svg
from neuron_attn_rewrite.report.text import amount, mask, shape


def to_html(report: ReportData) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise RewriteError("to_html needs jinja2: pip install jinja2.") from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files(__package__).joinpath("template.html").read_text(encoding="utf-8"))
    grouped = groups(report)
    number = {id(site): i for i, group in enumerate(grouped) for site in group.sites}
    return template.render(
        report=report,
        groups=grouped,
        strip=[(number[id(site)], site) for site in report.sites],
        strategies=Counter(site.strategy.name for site in report.replaced).most_common(),
        max_error=max((s.max_error for s in report.replaced if s.max_error is not None), default=None),
        flops=magnitude(sum(site.flops for site in report.replaced)),
        skipped=_skipped(report),
        amount=amount,
        entry=REASONS.__getitem__,
        graph_svg=lambda nodes, label: jinja2.filters.do_mark_safe(graph_svg(nodes, label)),
        mask_svg=lambda site: jinja2.filters.do_mark_safe(mask_svg(site)),
        mask=mask,
        shape=shape,
        sides=sides,
    )


def magnitude(count: int) -> str:
    """A large number in powers of 1000, such as `12.3 k`."""
    value, units = float(count), ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}".strip()


def _skipped(report: ReportData) -> float:
    """The fraction of the work, from 0 to 1, that the proven masks of the replaced attentions hide."""
    total = sum(site.flops for site in report.replaced)
    return 1 - sum(site.flops * site.visible for site in report.replaced) / total if total else 0.0
