"""Reasons: strings with a code, and a table that holds every code that is used and no other."""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import neuron_attn_rewrite
from neuron_attn_rewrite.reasons import REASONS, TOPICS, Reason

PACKAGE = Path(neuron_attn_rewrite.__file__).parent
CARRIERS = {"Reason", "Clause", "unknown"}
"""Calls whose first argument is a code."""


def codes_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CARRIERS and node.args:
            code = node.args[0]
            if isinstance(code, ast.Constant) and isinstance(code.value, str):
                yield code.value


def test_every_code_has_an_entry_and_every_entry_is_used() -> None:
    used = {code for path in PACKAGE.rglob("*.py") for code in codes_in(path.read_text(encoding="utf-8"))}
    assert used == set(REASONS)


def test_every_entry_is_complete() -> None:
    assert {entry.topic for entry in REASONS.values()} == set(TOPICS)
    for code, entry in REASONS.items():
        assert code == code.lower() and " " not in code
        assert entry.meaning.endswith(".") and entry.remedy.endswith((".", ";")), code


def test_a_reason_is_a_string_with_a_code() -> None:
    reason = Reason("head-dim", "head_dim 300 must be at most 256")
    assert reason == "head_dim 300 must be at most 256" and reason.code == "head-dim"
    assert reason.behind("flash_fwd: ") == "flash_fwd: head_dim 300 must be at most 256"
    for copied in (reason.behind(""), copy.deepcopy(reason), pickle.loads(pickle.dumps(reason))):
        assert copied == reason and copied.code == "head-dim"
    with pytest.raises(KeyError):
        Reason("no-such-code", "")
