"""The conditions under which a key is seen, against the mask itself, and in words."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_attn_rewrite.masks.affine import Affine, Index
from neuron_attn_rewrite.masks.bounds import BATCH, HEAD, KEY, QUERY
from neuron_attn_rewrite.masks.conditions import Conditions, conditions
from neuron_attn_rewrite.masks.spec import MaskSpec, Unproven
from neuron_attn_rewrite.masks.symbolic import SymbolicEvaluator
from neuron_attn_rewrite.patterns.axes import axis_dim
from neuron_attn_rewrite.patterns.site import Term
from tests.masks.elements import Values
from tests.masks.test_soundness import graph_of

ROWS, COLUMNS, WIDTH = 2, 5, 7
LOW = torch.finfo(torch.float32).min
Program = Callable[[Any], Tensor]


class Inputs:
    """positions, mask, flags [ROWS, COLUMNS], wide [ROWS, WIDTH], cached [COLUMNS], lengths [ROWS]; and indices."""

    def __init__(self, *values: Tensor) -> None:
        self.p, self.m, self.f, self.wide, self.c, self.n = values

    row = property(lambda self: torch.arange(COLUMNS)[:, None])
    key = property(lambda self: torch.arange(COLUMNS)[None])

    def pairs(self, values: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What a comparison says of the value of each key and that of each query."""
        values = values.reshape(-1, COLUMNS)
        return compare(values[:, None, None], values[:, None, :, None])

    def by_key(self, values: Tensor) -> Tensor:
        return values[:, None, None]

    @property
    def part(self) -> Tensor:
        """The number of the sequence to which a position belongs."""
        return self.breaks(self.p, torch.ne).cumsum(1)

    def breaks(self, positions: Tensor, compare: Callable[[Tensor, int], Tensor]) -> Tensor:
        return compare(positions.diff(dim=1, prepend=positions[:, :1] - 1), 1)

    def packed_along_a_diagonal(self) -> Tensor:
        """A part ends where elements [0, i, i] and [0, i, i + 1] do not rise by 1."""
        numbers = self.wide[:1].cumsum(1)
        table, at = (numbers[..., None] * numbers[:, None])[0], torch.arange(COLUMNS)
        first, second = table[at, at], table[at, at + 1]
        return self.pairs((second - first != 1).cumsum(0), torch.eq) & self.pairs(second, torch.le)

    def packed(self, numbers: Tensor) -> Tensor:
        """Keys of the query's part up to its number. `numbers` are [ROWS, 1, COLUMNS]."""
        part = (numbers.diff(prepend=numbers[..., :1] - 1) != 1).cumsum(2)
        return self.pairs(part, torch.eq) & self.pairs(numbers, torch.le)

    def since(self, at: Tensor) -> Tensor:
        return at[None, None] - self.n[:, None, None, None]


def draw() -> tuple[Tensor, ...]:
    positions = torch.arange(COLUMNS) - torch.randint(0, 3, (ROWS, COLUMNS)).cummax(1).values * 2
    mask, flags = torch.rand(2, ROWS, COLUMNS) < 0.6
    wide = torch.rand(ROWS, WIDTH) < 0.6
    return positions, mask.long(), flags, wide, torch.randint(-1, 7, (COLUMNS,)), torch.randint(0, 7, (ROWS,))


def with_inputs(program: Program) -> Callable[..., Tensor]:
    """The program as a function of the tensors that `draw` gives, which are named like this in its graph."""

    def function(
        positions: Tensor, mask: Tensor, flags: Tensor, wide: Tensor, cached: Tensor, lengths: Tensor
    ) -> Tensor:
        return program(Inputs(positions, mask, flags, wide, cached, lengths))

    return function


def found(program: Program, kind: str, fill: float = -torch.inf) -> tuple[Conditions | Unproven, Any]:
    module = graph_of(with_inputs(program), draw())
    (node,) = module.graph.output_node().all_input_nodes
    dims = axis_dim(BATCH, ROWS), axis_dim(HEAD, 1), axis_dim(QUERY, COLUMNS), axis_dim(KEY, COLUMNS)
    shape = node.meta["val"].shape
    at = tuple(dim if size > 1 else () for dim, size in zip(dims[-len(shape) :], shape, strict=True))
    sizes = tuple(Affine(size) for size in (ROWS, 1, COLUMNS, COLUMNS))
    known: Any = Unproven
    for names_numbers in (False, True):
        evaluator = SymbolicEvaluator(module, changed=frozenset(), names_numbers=names_numbers)
        known = conditions(Term(kind, node, at, fill=fill), dims, sizes, evaluator)
        if isinstance(known, Conditions):
            break
    return known, module


def words(of: Conditions) -> set[str]:
    """The conditions. `!` marks a bound that each query satisfies with its own key."""
    bounds = {f"{bound}{' !' if bound.shows_itself else ''}" for bound in of.key_bounds}
    paddings = {f"{'not ' if hides else ''}{node.name}[{start}:]" for node, start, hides in of.paddings}
    assumed = {f"{node.name} is binary" for node in of.assumed}
    return {
        *bounds,
        *paddings,
        *assumed,
        *([str(of.band)] if of.band.lower is not None or of.band.upper is not None else []),
    }


def shown(of: Conditions, known: Values) -> Tensor:
    """Bool [ROWS, 1, COLUMNS, COLUMNS]."""
    seen = torch.ones(ROWS, 1, COLUMNS, COLUMNS, dtype=torch.bool)
    rows, columns = Affine(ROWS), Affine(COLUMNS)
    for b, i, j in itertools.product(range(ROWS), range(COLUMNS), range(COLUMNS)):
        known.places = {Index(BATCH, rows): b, Index(QUERY, columns): i, Index(KEY, columns): j}
        ends = [(known.sum(bound.end), bound) for bound in of.key_bounds]
        inside = all(j >= end if bound.is_lower else j <= end for end, bound in ends)
        inside &= all(i >= end if bound.is_lower else i <= end for end, bound in ends if bound.shows_itself) or i != j
        for node, start, hides in of.paddings:
            bits = known.values[node].expand(ROWS, -1)
            inside &= bool(bits[b, start + j]) != hides
        seen[b, 0, i, j] = inside
    return seen & MaskSpec((of.band,)).visible(COLUMNS, COLUMNS)


OWN = "key >= first(cumsum >= cumsum[batch, query]) !"
UP_TO_OWN = "key <= first(cumsum >= cumsum[batch, query] + 1) - 1 !"
SHOW: dict[str, tuple[Program, set[str]]] = {
    "all": (lambda x: torch.ones(1, 1, 1, COLUMNS), set()),
    "causal": (lambda x: x.key <= x.row, {"causal(offset=0)"}),
    "ahead": (lambda x: x.key <= x.row + 1, {"causal(offset=1)"}),
    "window": (lambda x: (x.key <= x.row) & (x.key > x.row - 3), {"sliding_window(3)"}),
    "two windows": (
        lambda x: (x.key <= x.row + 2) & (x.key <= x.row + 1) & (x.key >= x.row - 3) & (x.key > x.row - 1),
        {"sliding_window(2, offset=1)"},
    ),
    "prefix": (lambda x: (x.key < 2)[None, None], {"key <= 1"}),
    "suffix": (lambda x: (x.key >= 2)[None, None] & (x.key <= x.row), {"causal(offset=0)", "key >= 2"}),
    "chunks": (lambda x: x.key // 2 == x.row // 2, {"key <= 2 * (query // 2) + 1 !", "key >= 2 * (query // 2) !"}),
    "up to a position": (lambda x: x.key <= x.c[:, None], {"key <= cached[query]"}),
    "up to a position, twice": (
        lambda x: (x.key <= x.c[:, None]) & (x.key <= x.c[:, None] + 1),
        {"key <= cached[query]"},
    ),
    "window at a position": (
        lambda x: (x.key <= x.c[:, None]) & (x.key > x.c[:, None] - 2),
        {"key <= cached[query]", "key >= cached[query] - 1"},
    ),
    "position of a batch": (lambda x: x.key[None, None] <= x.p[:, None, :, None], {"key <= positions[batch, query]"}),
    "lengths": (lambda x: x.key[None, None] < x.n[:, None, None, None], {"key <= lengths[batch] - 1"}),
    "lengths and rows": (
        lambda x: x.key[None, None] < x.n[:, None, None, None] + x.row,
        {"key <= lengths[batch] + query - 1"},
    ),
    "lengths less rows": (
        lambda x: x.key[None, None] < x.n[:, None, None, None] - x.row,
        {"key <= lengths[batch] - query - 1"},
    ),
    "left of the length": (
        lambda x: x.key[None, None] >= 5 - x.n[:, None, None, None],
        {"key >= - lengths[batch] + 5"},
    ),
    "up to twice the length": (
        lambda x: x.key[None, None] < 2 * x.n[:, None, None, None],
        {"key <= 2 * lengths[batch] - 1"},
    ),
    "chunks from a position on": (
        lambda x: x.key // 2 == x.c[:, None] // 2,
        {"key <= 2 * (cached[query] // 2) + 1", "key >= 2 * (cached[query] // 2)"},
    ),
    "chunks that move": (
        lambda x: x.since(x.key) // 3 == x.since(x.row) // 3,
        {
            "key <= lengths[batch] + 3 * ((- lengths[batch] + query) // 3) + 2 !",
            "key >= lengths[batch] + 3 * ((- lengths[batch] + query) // 3) !",
        },
    ),
    "chunks not before": (
        lambda x: x.since(x.key) // 2 >= x.since(x.row) // 2,
        {"key >= lengths[batch] + 2 * ((- lengths[batch] + query) // 2) !"},
    ),
    "a product": (
        lambda x: x.key[None, None] < x.p[:, None, :, None] * x.n[:, None, None, None],
        {"key <= mul[batch, 0, query, 0] - 1"},
    ),
    "mask": (lambda x: x.by_key(x.m) != 0, {"mask[0:]"}),
    "mask equal one": (lambda x: x.by_key(x.m) == 1, {"mask is binary", "mask[0:]"}),
    "mask is zero": (lambda x: x.by_key(x.m) == 0, {"not mask[0:]"}),
    "flags": (lambda x: x.by_key(x.f), {"flags[0:]"}),
    "no flags": (lambda x: ~x.by_key(x.f), {"not flags[0:]"}),
    "wide flags": (lambda x: x.by_key(x.wide[:, 1:6]), {"wide[1:]"}),
    "wide flags at the end": (lambda x: x.by_key(x.wide[:, 2:]), {"wide[2:]"}),
    "flags and causal": (lambda x: x.by_key(x.f) & (x.key <= x.row), {"causal(offset=0)", "flags[0:]"}),
    "flags and mask": (lambda x: x.by_key(x.f) & x.by_key(x.m).bool(), {"flags[0:]", "mask[0:]"}),
    "packed": (
        lambda x: x.pairs(x.part, torch.eq),
        {UP_TO_OWN, OWN},
    ),
    "packed by positions": (
        lambda x: x.pairs(x.part, torch.eq) & x.pairs(x.p, torch.le),
        {"causal(offset=0)", OWN},
    ),
    "packed by numbers of three dims": (
        lambda x: x.packed(x.p[:, None] * x.p[:, None]),
        {"causal(offset=0)", "key >= first(cumsum >= cumsum[batch, 0, query]) !"},
    ),
    "packed windows": (
        lambda x: x.pairs(x.part, torch.eq) & x.pairs(x.p, torch.le) & x.pairs(x.p, lambda k, q: k > q - 2),
        {OWN, "sliding_window(2)"},
    ),
    "packed and causal": (
        lambda x: x.pairs(x.part, torch.eq) & (x.key <= x.row),
        {"causal(offset=0)", OWN},
    ),
    "packed, looking ahead": (
        lambda x: x.pairs(x.part, torch.eq) & (x.key <= x.row + 1),
        {
            "causal(offset=1)",
            UP_TO_OWN,
            OWN,
        },
    ),
    "parts in order": (lambda x: x.pairs(x.part, torch.le), {UP_TO_OWN}),
    "parts behind": (lambda x: x.pairs(x.part, torch.gt), {"key >= first(cumsum >= cumsum[batch, query] + 1)"}),
    "the part and the one before": (
        lambda x: x.pairs(x.part, lambda k, q: (k <= q) & (k + 1 >= q)),
        {
            UP_TO_OWN,
            "key >= first(cumsum >= cumsum[batch, query] - 1) !",
        },
    ),
    "part of a number": (
        lambda x: x.by_key(x.part) <= x.c[:, None],
        {"key <= first(cumsum >= cached[query] + 1) - 1"},
    ),
    "parts of shifted keys": (
        lambda x: x.by_key(x.wide.cumsum(1)[:, 1:6]) > x.c[:, None],
        {"key >= first(cumsum >= cached[query] + 1) - 1"},
    ),
    "numbers of shifted rows": (
        lambda x: x.key <= x.wide.cumsum(1)[:, None, 1:6, None],
        {"key <= cumsum[batch, query + 1]"},
    ),
    "parts of a single row": (
        lambda x: x.pairs((x.c > 1).cumsum(0), torch.le),
        {"key <= first(cumsum >= cumsum[query] + 1) - 1 !"},
    ),
    "packed in a single tensor": (
        lambda x: x.pairs((x.c.diff(prepend=x.c[:1] - 1) != 1).cumsum(0), torch.eq) & x.pairs(x.c, torch.le),
        {"causal(offset=0)", "key >= first(cumsum >= cumsum[query]) !"},
    ),
    "packed, up to a position": (
        lambda x: x.pairs(x.part, torch.eq) & (x.by_key(x.p) <= x.c[:, None]),
        {OWN, UP_TO_OWN, "key <= cached[query] - positions[batch, query] + query"},
    ),
    "packed by the one before the last": (
        lambda x: (
            x.pairs((x.wide.cumsum(1)[:, 2:] - x.wide.cumsum(1)[:, :-2] != 1).cumsum(1), torch.eq)
            & x.pairs(x.wide.cumsum(1)[:, 2:], torch.le)
        ),
        {
            UP_TO_OWN.replace("cumsum", "cumsum_2"),
            OWN.replace("cumsum", "cumsum_2"),
            "key <= first(cumsum_3 >= cumsum_3[batch, query + 2] + 1) - 3 !",
        },
    ),
    "parts before, and causal": (
        lambda x: x.pairs(x.part, torch.lt) & (x.key <= x.row),
        {"causal(offset=0)", "key <= first(cumsum >= cumsum[batch, query]) - 1"},
    ),
    "parts up to the next, and causal": (
        lambda x: x.pairs(x.part, lambda k, q: k <= q + 1) & (x.key <= x.row),
        {"causal(offset=0)"},
    ),
    "a bool for all": (lambda x: x.c * 0.3 > 0.5, {"gt[0:]"}),
    "parts in int32": (
        lambda x: x.pairs(x.f.cumsum(1, dtype=torch.int32), torch.le),
        {UP_TO_OWN},
    ),
    "packed, positions before": (
        lambda x: x.pairs(x.part, torch.eq) & x.pairs(x.p, lambda k, q: k < q - 1),
        {"causal(offset=-2)", OWN},
    ),
    "parts of the first": (
        lambda x: x.pairs(x.part[:1], torch.eq),
        {"key <= first(cumsum >= cumsum[0, query] + 1) - 1 !", "key >= first(cumsum >= cumsum[0, query]) !"},
    ),
    "packed backwards": (
        lambda x: x.pairs((x.p.diff(dim=1, prepend=x.p[:, :1] + 1) != -1).cumsum(1), torch.eq) & x.pairs(x.p, torch.ge),
        {"causal(offset=0)", OWN},
    ),
}
CONDITION, KEYS = "neither a key bound nor key padding", "can't be written as key bounds"
UNPROVEN: dict[str, tuple[Program, str]] = {
    "twice the length": (lambda x: 2 * x.key[None, None] < x.n[:, None, None, None], CONDITION),
    "later positions": (lambda x: x.key <= torch.constant_pad_nd(x.c[1:], (0, 1), 3)[:, None], KEYS),
    "flags of the first": (lambda x: x.f[:1], CONDITION),
    "flags of the last": (lambda x: x.f[-1:], CONDITION),
    "positions of one": (lambda x: x.by_key(x.p == 1), CONDITION),
    "numbers of reversed rows": (lambda x: x.key <= x.wide.cumsum(1).flip(1)[:, None, 2:, None], CONDITION),
    "numbers of a diagonal": (
        lambda x: x.key <= (x.c[:, None] * x.c)[torch.arange(COLUMNS), torch.arange(COLUMNS)][:, None],
        CONDITION,
    ),
    "numbers, transposed": (lambda x: x.key <= (x.p.mT * x.n).mT[:, None, :, None], CONDITION),
    "up to the batch": (lambda x: x.key <= torch.arange(ROWS)[:, None, None, None], CONDITION),
    "flags reversed": (lambda x: x.by_key(x.f.flip(1)), CONDITION),
    "flags of the other": (lambda x: x.by_key(x.f.flip(0)), CONDITION),
    "flags of queries": (lambda x: x.f[:, None, :, None], CONDITION),
    "one flag": (lambda x: x.f[:, None, None, :1], CONDITION),
    "flags of pairs": (lambda x: x.f[:, None, None] == x.f[:, None, :, None], KEYS),
    "flags or causal": (lambda x: x.by_key(x.f) | (x.key <= x.row), KEYS),
    "segments": (lambda x: x.pairs(x.p, torch.eq), CONDITION),
    "remainders": (lambda x: x.key % 2 == x.row % 2, CONDITION),
    "nothing": (lambda x: torch.zeros(1, 1, 1, COLUMNS), KEYS),
    "parts in int8": (lambda x: x.pairs(x.f.cumsum(1, dtype=torch.int8).int(), torch.le), CONDITION),
    "parts across the batch": (lambda x: x.pairs(x.f.cumsum(0), torch.le), CONDITION),
    "sums of any numbers": (lambda x: x.pairs(x.p.cumsum(1), torch.le), CONDITION),
    "sums of minus one": (lambda x: x.pairs((-x.f.long()).cumsum(1), torch.le), CONDITION),
    "two parts": (lambda x: x.pairs(x.part * 2, torch.le), CONDITION),
    "parts in order, by positions": (lambda x: x.pairs(x.part, torch.le) & x.pairs(x.p, torch.le), CONDITION),
    "the part before, by positions": (
        lambda x: (x.by_key(x.part) + 1 == x.part[:, None, :, None]) & x.pairs(x.p, torch.le),
        CONDITION,
    ),
    "the part of another row": (
        lambda x: (x.by_key(x.part) == x.part.flip(0)[:, None, :, None]) & x.pairs(x.p, torch.le),
        CONDITION,
    ),
    "the part of another tensor": (
        lambda x: (x.by_key(x.part) == x.wide.cumsum(1)[:, None, :5, None]) & x.pairs(x.p, torch.le),
        CONDITION,
    ),
    "the part of another row of keys": (
        lambda x: (x.by_key(x.part.flip(0)) == x.part[:, None, :, None]) & x.pairs(x.p, torch.le),
        CONDITION,
    ),
    "the part of another tensor of keys": (
        lambda x: (x.by_key(x.wide.cumsum(1)[:, :5]) == x.part[:, None, :, None]) & x.pairs(x.p, torch.le),
        CONDITION,
    ),
    "parts between twos": (lambda x: x.pairs((x.p != 2).cumsum(1), torch.eq) & x.pairs(x.p, torch.le), CONDITION),
    "packed along a diagonal": (lambda x: x.packed_along_a_diagonal(), CONDITION),
    "packed, whatever the second is": (
        lambda x: x.pairs(((x.key != 1) & x.breaks(x.p, torch.ne)).cumsum(1), torch.eq) & x.pairs(x.p, torch.le),
        CONDITION,
    ),
    "sums that fall at the end": (
        lambda x: x.pairs(torch.where(x.key == 4, -1, x.f.long()).cumsum(1), torch.le),
        CONDITION,
    ),
    "windows of positions that rise": (
        lambda x: x.pairs(x.breaks(x.p, torch.lt).cumsum(1), torch.eq) & x.pairs(x.p, lambda k, q: k > q - 2),
        CONDITION,
    ),
    "packed, positions of the other": (lambda x: x.pairs(x.part, torch.eq) & x.pairs(x.p.flip(0), torch.le), CONDITION),
    "packed, other positions": (lambda x: x.pairs(x.part, torch.eq) & x.pairs(x.c[None], torch.le), CONDITION),
    "parts of the other": (lambda x: x.pairs(x.part.flip(0), torch.eq), CONDITION),
    "packed by steps of two": (
        lambda x: x.pairs((x.p.diff(dim=1, prepend=x.p[:, :1] - 2) != 2).cumsum(1), torch.eq) & x.pairs(x.p, torch.le),
        CONDITION,
    ),
}


def assert_shown(program: Program, of: Conditions, module: Any, hides: bool = False) -> None:
    (node,) = module.graph.output_node().all_input_nodes
    for _ in range(3):
        known = Values(module, draw())
        held = (known.values[node] == 0) == hides
        assert torch.equal(shown(of, known), held.expand(ROWS, 1, COLUMNS, COLUMNS))


@pytest.mark.parametrize("name", SHOW)
def test_when_a_key_is_seen(name: str) -> None:
    program, expected = SHOW[name]
    of, module = found(program, "show")
    assert isinstance(of, Conditions), of
    assert {word.replace("_1", "") for word in words(of)} == expected
    assert_shown(program, of, module)


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_no_kernel_can_be_given(name: str) -> None:
    of, _ = found(UNPROVEN[name][0], "show")
    assert isinstance(of, Unproven) and UNPROVEN[name][1] in str(of)


ADDED: dict[str, tuple[str, Program, float, str]] = {
    "finfo.min": ("add", lambda x: torch.zeros(COLUMNS, COLUMNS).masked_fill(x.key > x.row, LOW), 0.0, f"{LOW}"),
    "-inf of flags": (
        "add",
        lambda x: torch.zeros(ROWS, 1, 1, COLUMNS).masked_fill(x.by_key(x.f), -torch.inf),
        0.0,
        "-inf",
    ),
    "two numbers": (
        "add",
        lambda x: torch.where(x.key > x.row, LOW, 0.0) + torch.where(x.key > 2, -1e9, 0.0),
        0.0,
        "None",
    ),
    "integers": ("add", lambda x: (x.key > x.row).long() * -20000, 0.0, "mask-bias"),
    "numbers that hide nothing": ("add", lambda x: torch.zeros(1, COLUMNS), 0.0, "None"),
    "integers that hide nothing": ("add", lambda x: torch.zeros(1, COLUMNS).long(), 0.0, "None"),
    "not low enough": ("add", lambda x: torch.where(x.key > x.row, -5.0, 0.0), 0.0, "mask-bias"),
    "above zero": ("add", lambda x: torch.where(x.key > x.row, LOW, 1.0), 0.0, "mask-bias"),
    "positions": ("add", lambda x: x.by_key(x.p), 0.0, "mask-bias"),
    "hidden by -1e4": ("hide", lambda x: x.key > x.row, -1e4, "-10000.0"),
    "hidden by bits": ("hide", lambda x: x.by_key(x.f).float(), -1e4, "-10000.0"),
    "hidden by -5": ("hide", lambda x: x.key > x.row, -5.0, "mask-bias"),
    "hidden by positions": ("hide", lambda x: x.by_key(x.p), -1e4, "mask-bias"),
    "shown by -5": ("show", lambda x: x.key <= x.row, -5.0, "mask-bias"),
}


@pytest.mark.parametrize("name", ADDED)
def test_the_number_that_hides_keys(name: str) -> None:
    kind, program, fill, expected = ADDED[name]
    of, module = found(program, kind, fill)
    if isinstance(of, Unproven):
        assert of.reason.code == expected
    else:
        assert str(of.fill) == expected
        assert_shown(program, of, module, hides=kind != "show")


def test_a_mask_must_run_along_the_axes_of_the_scores() -> None:
    module = graph_of(lambda f: f.logical_not(), (torch.ones(COLUMNS, COLUMNS, dtype=torch.bool),))
    (node,) = module.graph.output_node().all_input_nodes
    dims = axis_dim(0, ROWS), (), axis_dim(2, COLUMNS), axis_dim(3, COLUMNS)
    sizes = (Affine(ROWS), Affine(1), Affine(COLUMNS), Affine(COLUMNS))
    term = Term("show", node, (axis_dim(4, COLUMNS), dims[3]))
    of = conditions(term, dims, sizes, SymbolicEvaluator(module, changed=frozenset()))
    assert isinstance(of, Unproven) and of.reason.code == "mask-axes"
