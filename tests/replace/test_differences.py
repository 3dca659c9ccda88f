"""The error of one kernel call, for values that the model, its formula in float64 and the kernel are given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from neuron_attn_rewrite import RewriteConfig
from neuron_attn_rewrite.masks.proof import Padding, Proof
from neuron_attn_rewrite.masks.spec import EmptyRows
from neuron_attn_rewrite.patterns.axes import Atom, Dims, axis_dim
from neuron_attn_rewrite.patterns.site import MASKED, Term
from neuron_attn_rewrite.replace.differences import Measured, output_error
from neuron_attn_rewrite.replace.graft import Graft

aten = torch.ops.aten
INF, NAN = math.inf, math.nan
BATCH, HEADS, LENGTH, FEATURES = 2, 2, 3, 2
TOLERANCE = 2.0**-7
DIMS: Dims = tuple(axis_dim(axis, size) for axis, size in enumerate((BATCH, HEADS, LENGTH, LENGTH)))
FAR = ((Atom(9, 1, 3),), *DIMS[2:])
"""Dims of a tensor that runs over an axis that the scores do not have."""


def graph_of(compute: Any = aten.alias.default) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """An operand, a mask, a vector of padding, and an output that is computed from the operand."""
    graph = fx.Graph()
    operand, mask, vector = (graph.placeholder(name) for name in ("operand", "mask", "vector"))
    output = graph.call_function(compute, (operand,))
    for node in (operand, mask, vector, output):
        node.meta["val"] = torch.zeros(2, device="meta")
    return operand, mask, vector, output


def filled(rows: tuple[float, ...]) -> Tensor:
    """Zeros, except one number for each row in the last batch element, head and feature."""
    result = torch.zeros(BATCH, HEADS, len(rows), FEATURES)
    result[-1, -1, :, -1] = torch.tensor(rows)
    return result


class Setting:
    """One attention with hand-made values. Without `exact`, the operand is what the model gives."""

    def __init__(
        self,
        old: tuple[float, ...],
        exact: tuple[float, ...] | None = None,
        masks: tuple[tuple[Term | None, Tensor], ...] = (),
        config: RewriteConfig | None = None,
        compute: Any = aten.alias.default,
        proof: Proof | None = None,
        is_read: bool = False,
        **site: Any,
    ) -> None:
        self.operand, self.mask, self.vector, self.output = graph_of(compute)
        if is_read:
            reader = self.output.graph.call_function(aten.isnan.default, (self.output,))
            reader.meta["val"] = torch.zeros(2, dtype=torch.bool)
        self.values: dict[fx.Node, Any] = {self.output: filled(old), self.operand: filled(exact or old)}
        terms = []
        for term, tensor in masks:
            node = self.output.graph.placeholder("term")
            self.values[node] = tensor
            dims = term.dims if term else DIMS
            of = term or Term("hide", node, DIMS)
            terms.append(Term(of.kind, node, dims, of.multiplier, of.fill))
        fields = {"is_causal": False, "overflows": False, "output_layout": ()} | site
        whole: Any = SimpleNamespace(
            output=self.output,
            operands=(SimpleNamespace(node=self.operand),),
            terms=tuple(terms),
            dims=DIMS,
            coarsest=torch.float32,
            **fields,
        )
        sizes = {"batch": BATCH, "num_heads": HEADS, "q_len": LENGTH, "kv_len": LENGTH, "v_head_dim": FEATURES}
        verdict: Any = SimpleNamespace(site=whole, example=SimpleNamespace(**sizes))
        self.graft = Graft(verdict, proof or Proof(), self.output, ())
        self.measured = Measured(self.output.graph, config or RewriteConfig(tolerances={torch.float32: TOLERANCE}))

    def error(self, new: tuple[float, ...]) -> float:
        return self.measured.error(self.graft, self.values, filled(new))


def hidden(*rows: int) -> tuple[tuple[None, Tensor], ...]:
    """A mask that hides every key of some rows, and one key of all others. With all rows, it hides everything."""
    mask = torch.zeros(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.bool)
    mask[..., 1] = True
    mask[-1, -1, list(rows)] = True
    mask |= len(rows) == LENGTH
    return ((None, mask),)


@dataclass(frozen=True)
class Case:
    """Numbers of the model, of its formula, and of the kernel, the rows that see no key, and the error."""

    old: tuple[float, ...]
    exact: tuple[float, ...]
    new: tuple[float, ...]
    expected: float
    empty: tuple[int, ...] = ()


CASES = {
    "nothing": Case((4, 2, 1), (4, 2, 1), (4, 2, 1), 0),
    "the tolerance is enough": Case((128, 2, 1), (128, 3, 1), (128, 3, 1), TOLERANCE),
    "relative to the largest": Case((-128, 2, 1), (128, 2, 1), (-128, 6, 1), 4 / 128),
    "the other sign": Case((4, 2, 1), (4, 2, 1), (4, -2, 1), 1),
    "the formula is closer": Case((4, 2, 1), (7, 3.5, 1), (4, 4, 1), 0.5 / 4),
    "the model is closer": Case((4, 2, 1), (4, -9, 1), (4, 4, 1), 2 / 4),
    "small numbers": Case((0.25, 0.125, 0), (0.25, 0.125, 0), (0.25, 0.25, 0), 0.125 / 0.25),
    "small numbers beside infinity": Case((0.25, INF, 0), (0.25, INF, 0), (0.5, INF, 0), 1),
    "small numbers, and an empty row": Case((0.25, 0.125, 0), (0.25, 0.1875, 0), (0.25, 0.25, 0), 0.25, (2,)),
    "small numbers, and the model is closer": Case((0.25, 0.125, 0), (0.25, 0.875, 0), (0.25, 0.25, 0), 0.5, (2,)),
    "no numbers": Case((), (), (), 0),
    "all zeros": Case((0, 0, 0), (0, 0, 0), (0, 0, 0), 0),
    "NaN for a number": Case((4, 2, 1), (4, 2, 1), (4, NAN, 1), INF),
    "a number for NaN": Case((4, NAN, 1), (4, 2, 1), (4, 2, 1), INF),
    "NaN for NaN": Case((4, NAN, 1), (4, 2, 1), (4, NAN, 1), 0),
    "infinity for infinity": Case((4, -INF, 1), (4, -INF, 1), (4, -INF, 1), 0),
    "a number for infinity": Case((4, INF, 1), (4, INF, 1), (4, 2, 1), INF),
    "little rounding": Case((100, 2, 1), (100, 9, 1.5), (100, 9, 21), 0.19, (2,)),
    "rounding at the limit": Case((100, 2, 1), (100, 9, 2), (100, 9, 21), 0.18, (2,)),
    "rounding beyond the limit": Case((100, 2, 1), (100, 9, 2.5), (100, 9, 2.5), 0.015, (2,)),
    "much rounding, and the model's number": Case((100, 2, 1), (100, 9, 7), (100, 9, 1), 0, (2,)),
    "rounding explains it in each row": Case((100, 0, 0), (100, 1, 0), (100, 1.5, 0), 0, (0, 1, 2)),
    "only rounding of rows that see no key": Case((100, 2, 1), (100, 90, 1.5), (100, 9, 21), 0.19, (2,)),
    "rows that see a key are worse": Case((100, 2, 1), (100, 2, 1.5), (100, 52, 21), 0.5, (2,)),
}


@pytest.mark.parametrize("name", CASES)
def test_error(name: str) -> None:
    case = CASES[name]
    found = Setting(case.old, case.exact, hidden(*case.empty) if case.empty else ()).error(case.new)
    assert found == pytest.approx(case.expected, rel=1e-12, abs=1e-12)


def test_an_operator_without_float64_and_another_shape() -> None:
    def only_float32(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return x

    assert Setting((4, 2, 1), (4, 4, 1), compute=only_float32).error((4, 4, 1)) == 0.5
    assert Setting((4, 2, 1), (4, 4, 1)).error((4, 2)) == INF


ANY = Proof(empty_rows=EmptyRows.ANY)
UNDEFINED: dict[str, tuple[dict[str, Any], bool]] = {
    "rows of NaN are known to see no key": ({"proof": ANY, "exact": (4, 2, 1)}, False),
    "and exponentials overflow": ({"proof": ANY, "overflows": True, "exact": (4, 2, 1)}, False),
    "the model's exponentials overflow": ({"overflows": True, "exact": (4, 2, 1)}, False),
    "an operand has NaN": ({"exact": (NAN, NAN, NAN)}, False),
    "an operand has NaN, and the output is read": ({"exact": (NAN, NAN, NAN), "is_read": True}, True),
    "it is not known why": ({"exact": (4, 2, 1)}, True),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_nan_of_the_model_counts_or_not(name: str) -> None:
    fields, counts = UNDEFINED[name]
    setting = Setting((4, NAN, 1), **fields)
    assert setting.error((4, 2, 1)) == (INF if counts else 0)
    assert setting.error((5, NAN, 1)) == pytest.approx(0.25), "numbers of the model count"


def row(number: float, kind: torch.dtype = torch.float32, rest: float = 0) -> Tensor:
    """A number in row 1 for each key, and in row 2 for one key."""
    found = torch.full((LENGTH, LENGTH), float(rest))
    found[1], found[2, 1] = number, number
    return found.to(kind)


NODE = fx.Graph().placeholder("a")
SOME = DIMS[2:]
IGNORES = RewriteConfig(empty_rows="any", tolerances={torch.float32: TOLERANCE})


def term(kind: str, dims: Dims = SOME, multiplier: float = 1.0, fill: float = -INF) -> Term:
    return Term(kind, NODE, dims, multiplier, fill)


HIDING: dict[str, tuple[tuple[tuple[Term, Tensor], ...], bool, tuple[bool, bool, bool]]] = {
    "nothing": ((), False, (False, False, False)),
    "an added number": (((term("add"), row(-INF)),), False, (False, True, False)),
    "a factor": (((term("add", multiplier=-MASKED), row(-1)),), False, (False, True, False)),
    "a factor that is too small": (((term("add", multiplier=-MASKED), row(-0.99)),), False, (False,) * 3),
    "hides": (((term("hide"), row(2, torch.int64)),), False, (False, True, False)),
    "hides, with the number of the border": (((term("hide", fill=MASKED), row(1)),), False, (False, True, False)),
    "does not hide enough": (((term("hide", fill=MASKED + 1), row(1)),), False, (False,) * 3),
    "shows": (((term("show"), row(0, rest=1)),), False, (False, True, False)),
    "shows, not hides": (((term("show"), row(1, torch.bool)),), False, (True, False, False)),
    "of another axis": (((term("hide", FAR), row(1).expand(3, 3, 3)),), False, (False,) * 3),
    "two": (
        ((term("hide"), row(1)), (term("hide", (SOME[1],)), torch.tensor([1, 0, 1]))),
        False,
        (False, True, True),
    ),
    "causal": ((), True, (False,) * 3),
    "causal and the first key": (((term("hide", (SOME[1],)), torch.tensor([1, 0, 0])),), True, (True, False, False)),
    "causal and the last key": (((term("hide", (SOME[1],)), torch.tensor([0, 0, 1])),), True, (False,) * 3),
}


@pytest.mark.parametrize("name", HIDING)
def test_rows_that_see_no_key_do_not_count_if_the_caller_says_so(name: str) -> None:
    masks, is_causal, empty = HIDING[name]
    setting = Setting((1, 1, 1), masks=masks, config=IGNORES, is_causal=is_causal)
    for place in range(LENGTH):
        new = [1.0, 1.0, 1.0]
        new[place] = 3
        assert setting.error((new[0], new[1], new[2])) == (0 if empty[place] else 2), place
    instead = setting.measured.instead(setting.graft, setting.values, filled((3, 3, 3)))
    assert torch.equal(instead, filled(tuple(1 if is_empty else 3 for is_empty in empty)))


def test_nan_of_a_row_that_sees_no_key_is_replaced() -> None:
    setting = Setting((NAN, NAN, 1), masks=hidden(1), config=IGNORES)
    instead = setting.measured.instead(setting.graft, setting.values, filled((2, 3, 4)))
    assert torch.equal(instead, filled((2, 3, 4)))


def test_without_a_promise_the_result_of_the_call_stays() -> None:
    setting, new = Setting((1, 1, 1), masks=hidden(1)), filled((2, 3, 4))
    assert setting.measured.instead(setting.graft, setting.values, new) is new


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("shape", [(BATCH, 5), (BATCH, 1, 1, 5)])
def test_promised_padding_does_not_count(shape: tuple[int, ...], inverted: bool) -> None:
    setting = Setting((1, 1, 1))
    padding = Padding(setting.vector, 1, inverted)
    setting.graft = Graft(setting.graft.verdict, Proof(promised=(padding,)), setting.output, ())
    seen = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    setting.values[setting.vector] = (seen ^ inverted).long().reshape(shape)
    assert setting.error((1, 1, 9)) == 0 and setting.error((1, 3, 9)) == 2 and setting.error((3, 1, 9)) == 2
    instead = setting.measured.instead(setting.graft, setting.values, filled((2, 3, 4)))
    assert torch.equal(instead, filled((2, 3, 1)))


def test_what_is_read() -> None:
    setting = Setting((1, 1, 1), masks=hidden(1))
    graph = setting.output.graph
    with graph.inserting_before(setting.output):
        table = graph.get_attr("table")
        between = graph.call_function(aten.add.Tensor, (setting.operand, table))
    setting.output.args = (between,)
    padding = Padding(setting.vector, 0, False)
    setting.graft = Graft(setting.graft.verdict, Proof(promised=(padding,)), setting.output, ())
    terms = {t.node for t in setting.graft.verdict.site.terms}
    assert setting.measured.reads(setting.graft) == {setting.output, setting.operand, setting.vector, table, *terms}


def test_noise_has_the_accepted_size() -> None:
    setting = Setting((1, 1, 1))
    output = torch.cat([torch.zeros(20_000), torch.tensor([-0.5, NAN, INF, -INF])])
    setting.values[setting.output] = output
    noise = setting.measured.noise(setting.graft, setting.values, output)[:20_000]
    assert noise.std() == pytest.approx(0.5 * TOLERANCE, rel=0.05) and noise.mean().abs() < 0.05 * TOLERANCE


def test_error_of_an_output() -> None:
    assert output_error(torch.tensor([4.0, NAN]), torch.tensor([5.0, 1.0])) == 0.25
    assert output_error(torch.zeros(2), torch.zeros(3)) == INF
