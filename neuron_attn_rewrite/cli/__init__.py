"""The command line. Importing it needs no optional package."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `neuron-attn-rewrite` and exit: 0 is success, 1 a finding, 2 an error."""
    try:
        import click  # noqa: F401
    except ImportError:
        print("neuron-attn-rewrite needs more packages: pip install click jinja2 rich", file=sys.stderr)
        sys.exit(2)
    from neuron_attn_rewrite.cli.commands import run

    sys.exit(run(arguments))
