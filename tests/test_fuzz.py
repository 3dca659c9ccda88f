"""A slice of `python -m benchmarks.fuzz`, with fixed seeds."""

from __future__ import annotations

import pytest

from benchmarks.fuzz import attack


@pytest.mark.parametrize("seed", range(100, 108))
def test_a_random_attention_is_what_it_was(seed: int) -> None:
    wrong, _ = attack(seed, times=1)
    assert wrong is None


@pytest.mark.parametrize("seed", range(8, 16))
def test_a_random_attention_of_written_tensors_is_what_it_was(seed: int) -> None:
    wrong, _ = attack(seed, times=1, memory=True)
    assert wrong is None
