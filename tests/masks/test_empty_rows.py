"""What a row that sees no key computes, and what dense operands must add for it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from neuron_attn_rewrite.masks.addends import LOWERED, absorbs, fills_of_addends, may_hide, rounds_alike
from neuron_attn_rewrite.masks.empty_rows import ABSORBS, Effect, empty_row_value, may_be_nan
from neuron_attn_rewrite.masks.spec import EmptyRows
from neuron_attn_rewrite.patterns.site import Term, hides
from neuron_attn_rewrite.values.ranges import Ranges

INF, LOW = torch.inf, torch.finfo(torch.float32).min
ZERO, MEAN, ANY, OTHER = EmptyRows.ZERO, EmptyRows.MEAN, EmptyRows.ANY, EmptyRows.OTHER
BIAS = Effect(0.0, is_dense=True)
DENSE = Effect(None, is_dense=True)


def held(value: Tensor | tuple[Tensor, Tensor]) -> fx.Node:
    """A node with a stored value."""
    module, graph = nn.Module(), fx.Graph()
    module.register_buffer("held", value if isinstance(value, Tensor) else None)
    node = graph.get_attr("held")
    node.meta["val"] = value
    graph.output(node)
    return next(iter(fx.GraphModule(module, graph).graph.nodes))


def term(kind: str, value: Tensor | None = None, **options: Any) -> Term:
    return Term(kind, held(torch.zeros(2, dtype=torch.bool) if value is None else value), (), **options)


def site(dtype: torch.dtype = torch.float32, softmax: torch.dtype = torch.float32, **options: Any) -> Any:
    """What is read of a site."""
    facts = {"pattern": "softmax", "safe": False, "floor": -INF, "is_causal": False, "terms": ()}
    nodes = {"anchor": held(torch.zeros(2, dtype=softmax)), "output": held(torch.zeros(2, dtype=torch.float16))}
    return SimpleNamespace(**{**facts, "dtype": dtype, "sink": None, **nodes, **options})


def added(fill: float | None, **options: Any) -> Effect:
    return Effect(fill, **options)


def replaced(fill: float, **options: Any) -> Effect:
    return Effect(fill, replaces=True, **options)


SCORES = torch.tensor([-ABSORBS, 17.0, ABSORBS])
F64 = torch.float64
SDPA = "scaled_dot_product_attention"
ONES = term("add", torch.ones(2))
WIDE = torch.zeros(2, dtype=F64)
PAIR = held((WIDE, WIDE))
"""The node of an operator that gives two tensors."""
HALF_BIAS = term("add", torch.zeros(2, dtype=torch.bfloat16))
ROWS: dict[str, tuple[list[Effect], Any, EmptyRows]] = {
    "no term": ([], site(), OTHER),
    "only a bias": ([BIAS], site(), OTHER),
    "-inf added": ([added(-INF)], site(), ANY),
    "-inf added, in SDPA": ([added(-INF)], site(safe=True), ZERO),
    "-inf added to a bias": ([BIAS, added(-INF)], site(safe=True), ZERO),
    "finfo.min added": ([added(LOW)], site(), MEAN),
    "finfo.min in place of": ([replaced(LOW)], site(), MEAN),
    "-1e9 added": ([added(-1e9)], site(), OTHER),
    "-1e9 in place of": ([replaced(-1e9)], site(), MEAN),
    "-1e9 in place of, and a bias": ([replaced(-1e9), BIAS], site(), OTHER),
    "-1e9 in place of a bias": ([BIAS, replaced(-1e9)], site(), MEAN),
    "finfo.min and a bias": ([replaced(LOW), BIAS], site(), MEAN),
    "two sums of finfo.min": ([added(LOW), added(LOW)], site(), OTHER),
    "two sums of finfo.min above a floor": ([added(LOW), added(LOW)], site(floor=LOW), MEAN),
    "a floor of -inf scores": ([added(-INF)], site(floor=LOW, safe=True), MEAN),
    "the same twice in place of": ([replaced(LOW), replaced(LOW)], site(), MEAN),
    "two numbers in place of": ([replaced(LOW), replaced(-1e4)], site(), OTHER),
    "finfo.min in place of, then -inf": ([replaced(LOW), added(-INF)], site(), OTHER),
    "-inf in place of, then finfo.min": ([replaced(-INF), replaced(LOW)], site(), OTHER),
    "several numbers": ([added(None)], site(), OTHER),
    "several numbers behind -inf": ([added(-INF), added(None)], site(), OTHER),
    "absorbed by float32": ([added(-1e20)], site(), MEAN),
    "absorbed by float32, scores in float64": ([added(-1e20)], site(F64), OTHER),
    "absorbed by float32, softmax in float64": ([added(-1e20)], site(softmax=F64), OTHER),
    "absorbed by float32, an operator in float64": ([added(-1e20)], site(anchor=PAIR, output=held(WIDE)), OTHER),
    "absorbed by float32, mask in float64": ([added(-1e20)], site(terms=(term("add", torch.zeros(2).to(F64)),)), OTHER),
    "absorbed by float32, mask in int64": ([added(-1e20)], site(terms=(term("add", torch.zeros(2).long()),)), MEAN),
    "absorbed by float32, scores in 16 bits": ([added(-1e20)], site(torch.bfloat16), MEAN),
    "as many as are combined": ([added(-INF)] * 6, site(), ANY),
    "more than are combined": ([added(-INF)] * 7, site(), OTHER),
    "as many, with a bias": ([added(-INF)] * 6 + [BIAS], site(), ANY),
    "a dense mask": ([DENSE], site(), ANY),
    "a dense mask, in SDPA": ([DENSE], site(safe=True), ZERO),
    "a dense mask and -inf": ([DENSE, added(-INF)], site(), ANY),
    "a dense mask and -1e9": ([DENSE, added(-1e9)], site(), OTHER),
    "a dense mask and a dense bias": ([BIAS, DENSE], site(), ANY),
    "a dense mask and a dense fill": ([DENSE, replaced(-1e9, is_dense=True)], site(), OTHER),
    "a dense fill that is a number": ([replaced(-1e9, is_dense=True)], site(), MEAN),
    "a dense mask and zeroed weights": ([DENSE, added(-INF, zeroes_weights=True)], site(), OTHER),
    "a dense mask above a floor": ([DENSE], site(floor=LOW), OTHER),
    "a dense mask in 16 bits": ([DENSE], site(terms=(HALF_BIAS,)), OTHER),
    "a dense mask in 16 bits, in SDPA": ([DENSE], site(terms=(HALF_BIAS,), pattern=SDPA), ANY),
    "a dense mask and fills in 16 bits": ([DENSE], site(torch.bfloat16, terms=(term("show"),)), OTHER),
    "a dense mask that is added in float32": ([DENSE], site(torch.bfloat16, terms=(ONES,)), ANY),
    "a dense mask of integers": ([DENSE], site(terms=(term("add", torch.zeros(2).long()),)), ANY),
    "weights set to zero": ([replaced(-1e9, zeroes_weights=True)], site(), ZERO),
    "weights set to zero and -inf": ([replaced(-1e9, zeroes_weights=True), added(-INF)], site(), ZERO),
    "weights set to zero and -1e9": ([replaced(-1e9, zeroes_weights=True), added(-1e9)], site(), OTHER),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_sees_no_key(name: str) -> None:
    effects, of, value = ROWS[name]
    assert empty_row_value(effects, of) is value


def test_the_mean_is_that_of_equal_scores() -> None:
    """Each claim of a mean or of zeros, against all ways to hide a key."""
    fills = [added(LOW), replaced(LOW), added(-1e9), replaced(-1e9), added(-INF), replaced(-INF), added(-3e13)]
    for effects in itertools.chain(itertools.product([BIAS, *fills], repeat=2), itertools.product(fills, repeat=3)):
        hiding = [e for e in effects if e.hides]
        found = empty_row_value(effects, site(safe=True))
        results: set[float] = set()
        for ways in itertools.product((False, True), repeat=len(hiding)):
            row, hidden = SCORES, iter(ways)
            for effect in effects:
                if not effect.hides:
                    row = row + SCORES / 2
                elif next(hidden):
                    row = torch.full_like(row, effect.fill) if effect.replaces else row + effect.fill
            results |= set(row.tolist()) if any(ways) else set()
        if found is MEAN:
            assert len(results) == 1 and -INF not in results, effects
        elif found is ZERO:
            assert results == {-INF}, effects


@pytest.mark.parametrize(
    ("fill", "does"),
    [
        (-INF, True),
        (LOW, True),
        (-1e9, False),
        (-1.5 * 2.0**44, True),
        (-(2.0**44), False),
        (2.0**44, False),
        (-1.5 * 2.0**43, False),
    ],
)
def test_what_absorbs_a_score(fill: float, does: bool) -> None:
    assert absorbs(fill, torch.float32) == does
    scores = torch.cat([torch.linspace(-ABSORBS, ABSORBS, 99), torch.tensor([0.0])])
    assert bool((scores + fill == fill).all()) == does


def test_what_hidden_scores_are_lowered_to() -> None:
    assert hides(LOWERED) and absorbs(LOWERED, torch.float32) and float(torch.tensor(LOW) + LOWERED) == LOW


ZEROED = replaced(-1e9, zeroes_weights=True)
MAY_BE_NAN: dict[str, tuple[list[Effect], bool]] = {
    "-inf": ([added(-INF)], False),
    "-inf beside a bias": ([BIAS, added(-INF)], False),
    "-inf beside zeroed weights": ([ZEROED, added(-INF)], True),
    "a dense mask beside zeroed weights": ([ZEROED, DENSE], True),
    "zeroed weights": ([ZEROED, ZEROED], False),
}


@pytest.mark.parametrize("name", MAY_BE_NAN)
def test_a_row_that_may_be_nan(name: str) -> None:
    effects, does = MAY_BE_NAN[name]
    assert may_be_nan(effects, site()) == does
    assert not may_be_nan(effects, site(safe=True))


RANGES = Ranges(frozenset())


@pytest.mark.parametrize(
    ("value", "multiplier", "does"),
    [(-9984.0, 1.0, True), (-9983.0, 1.0, False), (9984.0, 1.0, False), (9984.0, -1.0, True), (-5000.0, 2.0, True)],
)
def test_an_added_tensor_that_may_hide_keys(value: float, multiplier: float, does: bool) -> None:
    assert may_hide(term("add", torch.tensor([0.0, value]), multiplier=multiplier), RANGES) == does


def test_an_input_may_hide_keys() -> None:
    node = fx.Graph().placeholder("bias")
    node.meta["val"] = torch.zeros(2)
    assert may_hide(Term("add", node, ()), RANGES)


SHOW, LESS = term("show", fill=-1e4), term("hide", fill=LOW)
MASK = term("add", torch.tensor([0.0, LOW]))
SOFT = term("add", torch.tensor([0.0, 1.0]))
DEEP = term("add", torch.tensor([0.0, -INF]))
UPSIDE_DOWN = term("add", torch.tensor([0.0, 1.0]), multiplier=-INF)
ROUGH = term("add", torch.tensor([0.0, LOW]), rounds_alike=False)
ROUNDING: dict[str, tuple[tuple[Term, ...], list[float | None], bool]] = {
    "nothing": ((), [], True),
    "a mask": ((MASK,), [LOW], True),
    "masks": ((MASK, MASK), [LOW, LOW], True),
    "a mask of unknown numbers": ((MASK,), [None], True),
    "masks of unknown numbers": ((MASK, MASK), [None, None], False),
    "a mask of -1e9 behind a bias": ((SOFT, MASK), [0.0, -1e9], False),
    "a mask of -1e9 before a bias": ((MASK, SOFT), [-1e9, 0.0], False),
    "a mask of -1e9 and one that absorbs": ((MASK, MASK), [-1e9, LOW], True),
    "biases": ((SOFT, SOFT), [0.0, 0.0], True),
    "a fill": ((SHOW, MASK), [-1e4, None], True),
    "a rounded mask of -1e9": ((ROUGH,), [-1e9], False),
    "a rounded mask that absorbs": ((ROUGH,), [LOW], True),
    "a rounded bias": ((term("add", torch.ones(2), rounds_alike=False),), [0.0], True),
}


@pytest.mark.parametrize("name", ROUNDING)
def test_sums_that_are_rounded_alike(name: str) -> None:
    terms, fills, alike = ROUNDING[name]
    assert rounds_alike(site(terms=terms), fills, RANGES) == alike


FILLS: dict[str, tuple[Any, list[float | None], bool, tuple[float, ...] | None]] = {
    "a mask": (site(terms=(MASK,)), [LOW], False, (-INF,)),
    "a bias and a mask": (site(terms=(SOFT, MASK)), [0.0, LOW], False, (-INF, -INF)),
    "scores replaced by finfo.min": (site(terms=(LESS,)), [LOW], False, (LOW,)),
    "scores replaced by -1e4": (site(terms=(SHOW,)), [-1e4], False, (LOWERED,)),
    "scores replaced by -1e4, then finfo.min": (site(terms=(SHOW, MASK)), [-1e4, LOW], False, (LOWERED, -INF)),
    "scores replaced by -1e4, then -1e9": (site(terms=(SHOW, MASK)), [-1e4, -1e9], False, None),
    "scores replaced by -1e4, then what absorbs just below": (
        site(terms=(SHOW, term("add", torch.tensor([0.0, -(2.0**124)])))),
        [-1e4, -(2.0**124)],
        False,
        (LOWERED, -INF),
    ),
    "scores replaced by -1e4, then anything": (site(terms=(SHOW, MASK)), [-1e4, None], False, None),
    "scores replaced behind a bias": (site(terms=(SOFT, LESS)), [0.0, LOW], False, (-INF, LOW)),
    "scores replaced behind a mask": (site(terms=(MASK, LESS)), [LOW, LOW], False, None),
    "scores replaced twice": (site(terms=(LESS, LESS)), [LOW, LOW], False, None),
    "16 bits": (site(torch.bfloat16, terms=(LESS,)), [LOW], False, None),
    "causal": (site(terms=(MASK,), is_causal=True), [LOW], False, None),
    "a floor": (site(terms=(MASK,), floor=LOW), [LOW], False, None),
    "a sink": (site(terms=(MASK,), sink=held(torch.zeros(2))), [LOW], False, None),
    "weights set to zero": (site(terms=(term("hide", fill=LOW, zeroes_weights=True),)), [LOW], False, None),
    "NaN is read of -inf": (site(terms=(DEEP,)), [-INF], True, None),
    "NaN is read of -inf by a factor": (site(terms=(UPSIDE_DOWN,)), [-INF], True, None),
    "NaN is read of a fill of -inf": (site(terms=(term("hide"),)), [-INF], True, None),
    "NaN is read, in SDPA": (site(terms=(DEEP,), safe=True), [-INF], True, (-INF,)),
    "NaN is read of no -inf": (site(terms=(MASK, SOFT)), [LOW, 0.0], True, (-INF, -INF)),
    "NaN is read of a finite fill": (site(terms=(LESS,)), [LOW], True, (LOW,)),
}  # fmt: skip


@pytest.mark.parametrize("name", FILLS)
def test_what_dense_operands_add(name: str) -> None:
    of, fills, nan_is_read, expected = FILLS[name]
    assert fills_of_addends(of, fills, RANGES, nan_is_read) == expected
