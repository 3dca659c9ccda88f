"""`--fast` leaves out the tests that take long: whole models, compilers, other processes, thousands of programs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

SLOW = (
    "backends",
    "capture/test_objects.py",
    "cli/test_commands.py",
    "graph/test_sizes.py",
    "graph/test_writes.py",
    "kernels/nki",
    "masks/test_real_models.py",
    "masks/test_soundness.py",
    "ops",
    "patterns/test_dialects.py",
    "patterns/test_fused.py",
    "patterns/test_inductor.py",
    "patterns/test_mutants.py",
    "patterns/test_spellings.py",
    "replace/test_gradients.py",
    "report/test_report.py",
    "strategy/test_chosen_kernels.py",
    "strategy/test_forms.py",
    "strategy/test_orders.py",
    "strategy/test_training.py",
    "test_bad_input.py",
    "test_docs.py",
    "test_fuzz.py",
    "storage",
    "test_imports.py",
    "test_memory.py",
    "test_models.py",
    "test_module.py",
    "test_rewriter.py",
    "values/test_regions.py",
)
"""Files and folders of tests that `make check` leaves out."""


CACHES = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Two workers do not race for the files of Inductor: each has a directory of its own."""
    config.stash[CACHES] = tempfile.TemporaryDirectory(prefix="inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.stash[CACHES].name


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[CACHES].cleanup()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the tests that take long")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether a path is left out; None leaves it to pytest."""
    place = collection_path.relative_to(Path(__file__).parent).as_posix() if config.getoption("fast") else ""
    return True if place in SLOW else None
