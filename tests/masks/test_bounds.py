"""Bounds of the key and key padding, from single inequalities."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from neuron_attn_rewrite.masks.affine import Affine, Below, Element, Floor, Index, Size, Truth, variable
from neuron_attn_rewrite.masks.bounds import BATCH, HEAD, KEY, QUERY, KeyBound, key_bound, key_padding, solve_for_key
from neuron_attn_rewrite.masks.symbolic import SymbolicEvaluator
from tests.masks.test_soundness import graph_of

ROWS, COLUMNS = 2, 5
MODULE = graph_of(
    lambda flags, numbers: (flags.cumsum(1), flags[0] & flags[1], flags[:, None] & flags),
    (torch.ones(ROWS, COLUMNS, dtype=torch.bool), torch.ones(ROWS, COLUMNS).long()),
)
FLAGS, NUMBERS = MODULE.graph.find_nodes(op="placeholder")
PART: fx.Node = MODULE.graph.output_node().args[0][0]  # type: ignore[index, assignment]
LINE: fx.Node = MODULE.graph.output_node().args[0][1]  # type: ignore[index, assignment]
CUBE: fx.Node = MODULE.graph.output_node().args[0][2]  # type: ignore[index, assignment]
EVALUATOR = SymbolicEvaluator(MODULE, changed=frozenset(), names_numbers=True)
BATCH_INDEX, HEAD_INDEX = Index(BATCH, Affine(ROWS)), Index(HEAD, Affine(3))
batch, head = variable(BATCH_INDEX), variable(HEAD_INDEX)
query, key = (variable(Index(axis, Affine(COLUMNS))) for axis in (QUERY, KEY))
zero, one, size = Affine(), Affine(1), variable(Size("n"))


def number(*at: Affine) -> Affine:
    return variable(Element(NUMBERS, at))


def part(*at: Affine) -> Affine:
    return variable(Element(PART, at))


def bit(*at: Affine, node: fx.Node = FLAGS) -> Affine:
    return variable(Truth(node, at))


def first(value: Affine, row: Affine = batch) -> Affine:
    return variable(Below(PART, (row,), value))


BOUNDS: dict[str, tuple[Affine, KeyBound | None]] = {
    "up to the query": (query - key, KeyBound(False, query)),
    "from the query on": (key - query + 2, KeyBound(True, query - 2)),
    "up to a size": (size - key - 1, KeyBound(False, size - 1)),
    "up to a number": (number(batch, query) - key, KeyBound(False, number(batch, query))),
    "up to a quotient": (variable(Floor(query + size, 2)) - key, KeyBound(False, variable(Floor(query + size, 2)))),
    "parts from a number on": (part(batch, key) - number(batch, query), KeyBound(True, first(number(batch, query)))),
    "parts up to a number": (size - part(batch, key), KeyBound(False, first(size + 1) - 1)),
    "parts of one row": (part(one, key) - size, KeyBound(True, first(size, one))),
    "parts of the keys before": (part(batch, key - 1) - size, KeyBound(True, first(size) + 1)),
    "no key": (query - 3, None),
    "twice the key": (query - key * 2, None),
    "twice the key and a part": (part(batch, key) + key * 2 - 5, None),
    "two parts": (part(batch, key) + part(zero, key) - 5, None),
    "twice a part": (part(batch, key) * 2 - 5, None),
    "what is no part": (number(batch, key) - 5, None),
    "parts from a bit on": (part(batch, key) - bit(batch, query), None),
    "parts of a row for each query": (part(query, key) - 5, None),
    "parts of a row that is not there": (part(Affine(ROWS), key) - 5, None),
    "up to a bit": (bit(batch, query) - key, None),
    "up to the batch": (batch - key, None),
    "up to the head": (head - key, None),
    "up to a quotient of the batch": (variable(Floor(batch, 2)) - key, None),
    "up to a number of the query and batch": (number(query, batch) - key, None),
    "up to a number of the batch twice": (number(batch, batch) - key, None),
    "up to every second number": (number(batch, query * 2) - key, None),
    "up to a number that is not there": (number(batch, query + 1) - key, None),
    "up to a number of two indices": (number(batch, query + batch) - key, None),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_an_inequality_as_a_bound(name: str) -> None:
    inequality, bound = BOUNDS[name]
    assert key_bound(inequality, key, EVALUATOR) == bound


def test_a_bound_need_not_show_the_own_key() -> None:
    bound = key_bound(query - key, key, EVALUATOR)
    assert bound is not None and not bound.shows_itself


PADDINGS: dict[str, tuple[Affine, Truth, tuple[fx.Node, int, bool] | None]] = {
    "shown by 1": (bit(batch, key) - 1, Truth(FLAGS, (batch, key)), (FLAGS, 0, False)),
    "shown by 0": (-bit(batch, key), Truth(FLAGS, (batch, key)), (FLAGS, 0, True)),
    "one for all": (bit(key, node=LINE) - 1, Truth(LINE, (key,)), (LINE, 0, False)),
    "always": (bit(batch, key), Truth(FLAGS, (batch, key)), None),
    "never": (-bit(batch, key) - 1, Truth(FLAGS, (batch, key)), None),
    "another term": (bit(batch, key) + query - 1, Truth(FLAGS, (batch, key)), None),
    "one bit": (variable(Truth(LINE, ())) - 1, Truth(LINE, ()), None),
    "of the query": (bit(batch, query) - 1, Truth(FLAGS, (batch, query)), None),
    "of one row": (bit(zero, key) - 1, Truth(FLAGS, (zero, key)), None),
    "of two rows": (bit(batch, batch, key, node=CUBE) - 1, Truth(CUBE, (batch, batch, key)), None),
    "of the next key": (bit(batch, key + 1) - 1, Truth(FLAGS, (batch, key + 1)), None),
    "of the key before": (bit(batch, key - 1) - 1, Truth(FLAGS, (batch, key - 1)), None),
}


@pytest.mark.parametrize("name", PADDINGS)
def test_an_inequality_as_key_padding(name: str) -> None:
    inequality, of, padding = PADDINGS[name]
    assert key_padding(inequality, of, key, EVALUATOR) == padding


def test_a_quotient_of_the_key_is_solved() -> None:
    def floor(of: Affine, by: int) -> Affine:
        return variable(Floor(of, by))

    assert solve_for_key(floor(key, 4) - size) == key - size * 4
    assert solve_for_key(size - floor(key - 1, 4)) == size * 4 - key + 4
    for other in (floor(query, 4) - size, floor(key, 4) * 2 - size, key - size):
        assert solve_for_key(other) == other


a, b = Size("a"), Size("b")
TEXTS: dict[str, Affine] = {
    "key >= 0": zero,
    "key >= 3": Affine(3),
    "key >= - 3": Affine(-3),
    "key >= b - a": variable(b) - variable(a),
    "key >= b - 2 * a + query - 1": query + variable(b) - variable(a) * 2 - 1,
    "key >= 2 * a + b": variable(b) + variable(a) * 2,
    "key >= - query + 1": one - query,
    "key >= b - batch": variable(b) - batch,
    "key >= 3 * head": head * 3,
    "key >= numbers_1[batch, query + 2]": number(batch, query + 2),
    "key >= first(cumsum >= a - 1)": first(variable(a) - 1),
    "key >= (query // 2)": variable(Floor(query, 2)),
    "key >= ((query + 1) // 2)": variable(Floor(query + 1, 2)),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_bound_in_words(text: str) -> None:
    assert str(KeyBound(True, TEXTS[text])) == text
    assert str(KeyBound(False, TEXTS[text])) == text.replace("key >=", "key <=")


@pytest.mark.parametrize(
    ("end", "is_runtime"),
    [(zero, False), (query + size, False), (number(batch, query) + 1, True), (first(number(batch, query)), True)],
)
def test_a_bound_that_is_known_at_run_time_only(end: Affine, is_runtime: bool) -> None:
    assert KeyBound(True, end).is_runtime == is_runtime
