"""The command line. Importing this needs none of its extra."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `neuron-attn-rewrite`. Leaves by SystemExit: 0 is fine, 1 a finding, 2 an error."""
    try:
        import click  # noqa: F401
    except ImportError:
        print("neuron-attn-rewrite needs more packages: pip install click jinja2 rich", file=sys.stderr)
        sys.exit(2)
    from neuron_attn_rewrite.cli.commands import run

    sys.exit(run(arguments))
