"""The version of the installed package. It comes from pyproject.toml."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("neuron-attn-rewrite")
except PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "unknown"
