"""Writes the pages that are made from the code: `python -m docs.generate`.

The tests call `pages` and compare, so a page that is out of date fails there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from neuron_attn_rewrite.reasons import REASONS, TOPICS

HERE = Path(__file__).parent


def troubleshooting() -> str:
    """Each code with its meaning and what to do, by topic."""

    def lines() -> Iterator[str]:
        yield "# Troubleshooting"
        yield ""
        yield "Every decision in a report carries a reason, and every reason a code: `site.reasons[0].code`. The"
        yield "codes are stable, so a script may rely on them. Some say what was chosen, others what stood in the way."
        yield ""
        yield "<!-- made from neuron_attn_rewrite/reasons.py by python -m docs.generate -->"
        for topic, title in TOPICS.items():
            yield f"\n## {title}"
            for code, entry in REASONS.items():
                if entry.topic == topic:
                    yield f"\n### `{code}`\n\n{entry.meaning}\n\n{entry.remedy}"

    return "\n".join(lines()) + "\n"


def pages() -> dict[Path, str]:
    """What each generated page should hold."""
    return {HERE / "troubleshooting.md": troubleshooting()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
