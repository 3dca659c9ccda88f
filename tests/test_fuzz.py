"""A slice of `python -m benchmarks.fuzz`, with fixed seeds."""

from __future__ import annotations

import pytest

from benchmarks.fuzz.kinds import KINDS


@pytest.mark.parametrize("seed", range(100, 106))
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_program_is_what_it_was(kind: str, seed: int) -> None:
    assert KINDS[kind](seed).wrong is None
