"""What a user sees while a command works: a spinner, and none of the messages of other libraries."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import click

PATIENCE = 3.0
"""Seconds of work after which a line says what is going on, where there is no terminal for a spinner."""


def note(text: str) -> None:
    """Print a line on standard error."""
    click.echo(f"note: {text}", err=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner while the block runs. Without a terminal, print one line on standard error if it takes long."""
    if not sys.stderr.isatty():
        line = threading.Timer(PATIENCE, click.echo, (f"{what} ...",), {"file": sys.stderr})
        line.daemon = True
        line.start()
        try:
            yield
        finally:
            line.cancel()
        return
    from rich.console import Console

    with Console(file=sys.stderr).status(f"{what} ..."):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings and log messages of libraries while a model is built or captured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with redirect_stderr(io.StringIO()):
                yield
        finally:
            logging.disable(before)
