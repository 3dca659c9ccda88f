"""The documentation: generated pages are up to date."""

from __future__ import annotations

from docs.generate import pages


def test_generated_pages_are_up_to_date() -> None:
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m docs.generate"
