"""`RewriteReport`: the report with its methods to print, draw, store and compare it."""

from __future__ import annotations

from pathlib import Path

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.report import codec, drawing, html, text
from neuron_attn_rewrite.report.data import ReportData, SiteReport
from neuron_attn_rewrite.report.diff import ReportDiff, diff
from neuron_attn_rewrite.report.reproduce import reproducer


class RewriteReport(ReportData):
    """Every attention of a model, and what became of it."""

    def __str__(self) -> str:
        return self.to_text(color=False)

    def to_text(self, color: bool | None = None) -> str:
        """The report as text.

        Args:
            color: whether to colour the text, which needs rich. None means: if standard output is a terminal and rich
                is installed.
        """
        return text.to_text(self, color)

    def to_markdown(self) -> str:
        """The report as a Markdown table, such as for a pull request or a model card."""
        return text.to_markdown(self)

    def to_json(self) -> str:
        """The whole report as JSON. `report/schema.json` in this package is its JSON Schema."""
        return codec.to_json(self)

    @staticmethod
    def from_json(text: str | bytes) -> RewriteReport:
        """The report that `to_json` wrote.

        Raises:
            InputError: the text is not a report, or its schema has another version.
        """
        return codec.from_json(text, RewriteReport)

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one self-contained page, written to `path` if one is given.

        Raises:
            RewriteError: jinja2 is not installed (extra `report`).
        """
        page = html.to_html(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def to_dot(self) -> str:
        """The graphs before and after of each kind of site, in the DOT language of Graphviz."""
        return drawing.to_dot(self)

    def diff(self, other: RewriteReport) -> ReportDiff:
        """The differences from this report to `other`. The result is false if there are none, and prints as text."""
        return diff(self, other)

    def reproducer(self, site: SiteReport | str | int) -> str:
        """A Python script that rebuilds one attention alone, with its shapes and its mask, and rewrites it.

        Args:
            site: one of `sites`, or its name, or its position.

        Raises:
            InputError: there is no such site.
        """
        return reproducer(self, self._site(site))

    def _site(self, site: SiteReport | str | int) -> SiteReport:
        if isinstance(site, SiteReport):
            return site
        if isinstance(site, int) and -len(self.sites) <= site < len(self.sites):
            return self.sites[site]
        found = next((s for s in self.sites if s.name == site), None)
        if found is None:
            names = ", ".join(dict.fromkeys(s.name for s in self.sites)) or "none"
            raise InputError(f"the report has no site {site!r}: its sites are {names}.")
        return found
