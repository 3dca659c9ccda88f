"""Which graphs process a number of new tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_attn_rewrite.generation.plan import Lengths, Piece

SIMPLE = Lengths.of((8, 16), (4,), 64, recurrent=False)
RECURRENT = Lengths.of((8, 16), (4,), 64, recurrent=True)


@pytest.mark.parametrize(
    ("lengths", "count", "kept", "cached", "wanted"),
    [
        (SIMPLE, 5, 1, 0, [Piece(0, 5, 8, fresh=True)]),
        (SIMPLE, 16, 1, 0, [Piece(0, 16, 16, fresh=True)]),
        (SIMPLE, 17, 1, 0, [Piece(0, 1, 8, fresh=True), Piece(1, 17, 16, fresh=False)]),
        (SIMPLE, 32, 1, 0, [Piece(0, 16, 16, fresh=True), Piece(16, 32, 16, fresh=False)]),
        (SIMPLE, 1, 1, 9, [Piece(0, 1, 1, fresh=False)]),
        (SIMPLE, 3, 3, 9, [Piece(0, 3, 4, fresh=False)]),
        (SIMPLE, 6, 6, 9, [Piece(0, 4, 4, fresh=False), Piece(4, 6, 4, fresh=False)]),
        (SIMPLE, 8, 3, 0, [Piece(0, 6, 8, fresh=True), Piece(6, 8, 4, fresh=False)]),
        (SIMPLE, 3, 3, 0, [Piece(0, 1, 8, fresh=True), Piece(1, 3, 4, fresh=False)]),
        (SIMPLE, 1, 1, 0, [Piece(0, 1, 8, fresh=True)]),
        (RECURRENT, 18, 1, 0, [Piece(0, 16, 16, fresh=True), Piece(16, 17, 1, fresh=False), Piece(17, 18, 1, False)]),
        (RECURRENT, 2, 2, 9, [Piece(0, 1, 1, fresh=False), Piece(1, 2, 1, fresh=False)]),
    ],
)
def test_pieces(lengths: Lengths, count: int, kept: int, cached: int, wanted: list[Piece]) -> None:
    assert lengths.plan(count, kept, cached) == wanted


@given(
    st.sets(st.integers(1, 20), min_size=1, max_size=3),
    st.sets(st.integers(1, 6), min_size=1, max_size=2),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 60),
    st.booleans(),
)
def test_every_token_is_processed_once_and_fits(
    prompts: set[int], steps: set[int], count: int, kept: int, cached: int, recurrent: bool
) -> None:
    longest = 60
    count, kept = min(count, longest - min(cached, longest - 1)), min(kept, count)
    cached = min(cached, longest - count)
    lengths = Lengths.of(tuple(sorted(prompts)), tuple(sorted(steps)), longest, recurrent)
    pieces = lengths.plan(count, min(kept, count), cached)
    assert [p.begin for p in pieces] == [0, *(p.end for p in pieces[:-1])]
    assert pieces[-1].end == count
    gap = 0
    for place, piece in enumerate(pieces):
        assert piece.begin < piece.end
        assert piece.fresh == (place == 0 and not cached)
        assert piece.length in (lengths.prompts if piece.fresh else (*lengths.steps, *lengths.pieces))
        gap = piece.filling if piece.fresh and lengths.fill_left else gap
        # What is filled in behind must find room in the cache, and a fresh graph has as many rows as it is long.
        end = max(piece.length, cached + piece.end + gap) if piece.fresh else cached + piece.begin + piece.length + gap
        assert end <= max(longest, lengths.prompts[-1]) + lengths.slack
        if recurrent and not piece.fresh:
            assert piece.filling == 0
    if not cached:
        assert pieces[0].end <= count - min(kept, count) + 1


def test_a_long_graph_only_where_prompts_can_be_longer_than_the_longest_prompt_graph() -> None:
    assert SIMPLE.pieces == (16,)
    assert Lengths.of((8, 64), (1,), 64, recurrent=False).pieces == ()
    assert RECURRENT.pieces == ()
