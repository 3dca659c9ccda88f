"""The public names of the package, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

import neuron_attn_rewrite


def in_new_process(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    """At run time, and in the imports that type checkers read."""
    tree = ast.parse(Path(neuron_attn_rewrite.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    home = {name: f"neuron_attn_rewrite.{module}" for name, module in neuron_attn_rewrite._HOME.items()}
    assert imported == home and set(neuron_attn_rewrite.__all__) == set(home)
    assert all(getattr(neuron_attn_rewrite, name) is not None for name in neuron_attn_rewrite.__all__)
    assert set(home) <= set(dir(neuron_attn_rewrite))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        neuron_attn_rewrite.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_is_that_of_the_installed_package() -> None:
    assert neuron_attn_rewrite.__version__ == version("neuron-attn-rewrite")


def test_a_part_is_imported_without_the_rest_and_all_of_it_without_sympy() -> None:
    in_new_process(
        """
        import sys
        import torch
        import neuron_attn_rewrite as package
        import neuron_attn_rewrite.simulator
        loaded = {name.split(".")[1] for name in sys.modules if name.startswith("neuron_attn_rewrite.")}
        assert loaded <= {"simulator", "errors", "hardware"}, loaded
        was_there = "sympy" in sys.modules
        assert all(getattr(package, name) for name in package.__all__)
        assert was_there or "sympy" not in sys.modules
        """
    )


def test_importing_ops_registers_the_operators() -> None:
    in_new_process("import torch, neuron_attn_rewrite.ops; torch.ops.neuron_attn.flash_fwd.default")
