"""What is read of a mask element by element, against the mask itself, with blocks of any height."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_attn_rewrite.masks import read as module_read
from neuron_attn_rewrite.masks.read import OtherForm, Reading, _blocks, hiding, read
from neuron_attn_rewrite.masks.spec import Unproven
from neuron_attn_rewrite.patterns.axes import Atom, Dims, axis_dim
from neuron_attn_rewrite.patterns.site import Term
from neuron_attn_rewrite.values.cells import CellTable
from neuron_attn_rewrite.values.evaluator import Evaluator
from tests.masks.elements import Values
from tests.masks.test_conditions import COLUMNS, LOW, ROWS, Program, draw, with_inputs
from tests.masks.test_soundness import graph_of

HEADS = 3
DIMS = axis_dim(0, ROWS), axis_dim(1, HEADS), axis_dim(2, COLUMNS), axis_dim(3, COLUMNS)


def found(
    program: Program, kind: str = "show", fill: float = -torch.inf, dims: Dims = DIMS
) -> tuple[Reading | Unproven, Any, Evaluator]:
    module = graph_of(with_inputs(program), draw())
    (node,) = module.graph.output_node().all_input_nodes
    shape = node.meta["val"].shape
    at = tuple(dim if size > 1 else () for dim, size in zip(dims[-len(shape) :], shape, strict=True))
    evaluator = Evaluator(module, frozenset())
    return read(Term(kind, node, at, fill=fill), dims, evaluator), module, evaluator


def shown(of: Reading, known: Values, evaluator: Evaluator) -> Tensor:
    """Bool [ROWS, 1, COLUMNS, COLUMNS]."""
    first, end = of.rows[:, :, None].unbind(1)
    key = torch.arange(COLUMNS)
    seen = ((first <= key) & (key < end)).expand(ROWS, 1, COLUMNS, COLUMNS)
    if of.cells is None:
        assert not of.inverted
        return seen
    bits = torch.cat([(known.values[leaf.node] != 0).flatten() for leaf in evaluator.leaves])
    shows = (bits[of.cells.clamp_min(0)] != of.inverted) | (of.cells < 0)
    return seen & shows[:, None, None]


Case = tuple[str, Program, float]
READ: dict[str, Case] = {
    "all": ("show", lambda x: torch.ones(1, COLUMNS), -torch.inf),
    "nothing": ("show", lambda x: torch.zeros(COLUMNS, COLUMNS), -torch.inf),
    "causal": ("show", lambda x: x.key <= x.row, -1e4),
    "future": ("hide", lambda x: x.key > x.row, LOW),
    "as numbers": ("show", lambda x: (x.key <= x.row).float() * 3, LOW),
    "window": ("show", lambda x: (x.key <= x.row) & (x.key > x.row - 2), LOW),
    "the same for each head": ("show", lambda x: (x.key <= x.row).expand(ROWS, HEADS, COLUMNS, COLUMNS), LOW),
    "flags": ("show", lambda x: x.by_key(x.f), LOW),
    "no flags": ("show", lambda x: ~x.by_key(x.f), LOW),
    "hidden by flags": ("hide", lambda x: x.by_key(x.f), LOW),
    "mask": ("show", lambda x: x.by_key(x.m), LOW),
    "mask, in bytes": ("hide", lambda x: x.by_key(x.m.to(torch.uint8) * 200), LOW),
    "flags, reversed": ("show", lambda x: x.by_key(x.f.flip(1)), LOW),
    "flags of the other": ("show", lambda x: x.by_key(x.f.flip(0)), LOW),
    "flags of the first": ("show", lambda x: x.f[:1], LOW),
    "the first flag": ("show", lambda x: x.f[:1] & (x.key < 1), LOW),
    "one flag": ("show", lambda x: x.f[:, None, None, :1], LOW),
    "flags and causal": ("show", lambda x: x.by_key(x.f) & (x.key <= x.row), LOW),
    "flags and mask": ("show", lambda x: torch.where(x.key < 2, x.by_key(x.f), x.by_key(x.m) == 1), LOW),
    "flags of rows that see them": ("show", lambda x: x.by_key(x.f) & (x.key <= 2) & (x.row > 1), LOW),
    "wide flags for each head": (
        "show",
        lambda x: (x.by_key(x.wide[:, 1:6]) & (x.key <= x.row)).expand(ROWS, HEADS, -1, -1),
        LOW,
    ),
    "added": ("add", lambda x: torch.zeros(COLUMNS, COLUMNS).masked_fill(x.key > x.row, LOW), 0.0),
    "added flags": ("add", lambda x: (1.0 - x.by_key(x.f).float()) * LOW, 0.0),
    "added flags, causal": (
        "add",
        lambda x: torch.zeros(ROWS, 1, COLUMNS, COLUMNS).masked_fill(~(x.by_key(x.f) & (x.key <= x.row)), -1e9),
        0.0,
    ),
    "two numbers added": ("add", lambda x: torch.where(x.key > x.row, LOW, torch.where(x.key == 0, -1e9, 0.0)), 0.0),
    "nothing hidden": ("add", lambda x: torch.zeros(1, COLUMNS), 0.0),
}  # fmt: skip
FILLS = {
    "two numbers added": None,
    "nothing hidden": None,
    "added": LOW,
    "added flags": LOW,
    "added flags, causal": -1e9,
}
"""The numbers by which added tensors hide keys. The others hide by their own."""
UNREAD: dict[str, tuple[str, Program, float, str]] = {
    "for each head": ("show", lambda x: x.key < torch.arange(HEADS)[:, None, None], LOW, "mask-per-head"),
    "for each batch element": ("show", lambda x: x.key < torch.arange(ROWS)[:, None, None, None], LOW, "mask-per-head"),
    "holes": ("show", lambda x: x.key != 1, LOW, "mask-not-interval"),
    "holes in the first row": ("add", lambda x: LOW * ((x.key == 1) & (x.row == 0)), 0.0, "mask-not-interval"),
    "pairs": ("show", lambda x: x.f[:, None, None] == x.f[:, None, :, None], LOW, "mask-two-inputs"),
    "a sum": ("add", lambda x: (x.by_key(x.f).float() + x.f[:, None, :, None].float()) * LOW, 0.0, "mask-two-inputs"),
    "a difference": (
        "add",
        lambda x: (x.by_key(x.f).float() - x.f[:, None, :, None].float()).abs() * LOW,
        0.0,
        "mask-two-inputs",
    ),
    "flags or causal": ("show", lambda x: x.by_key(x.f) | (x.key <= x.row), LOW, "mask-padding"),
    "some flags": ("show", lambda x: x.by_key(x.f) | (x.key < 2), LOW, "mask-padding"),
    "flags of queries": ("show", lambda x: x.f[:, None, :, None], LOW, "mask-padding"),
    "flags that hide and show": ("show", lambda x: x.by_key(x.f) ^ (x.key < 2), LOW, "mask-padding"),
    "positions": ("add", lambda x: x.by_key(x.p), 0.0, "mask-computed"),
    "filled with -5": ("show", lambda x: x.key <= x.row, -5.0, "mask-weak-fill"),
    "added -5": ("add", lambda x: torch.where(x.key > x.row, -5.0, 0.0), 0.0, "mask-bias"),
    "added flags of -5": ("add", lambda x: x.by_key(x.f).float() * -5.0, 0.0, "mask-bias"),
    "added no flags of -5": ("add", lambda x: (1 - x.by_key(x.f).float()) * -5.0, 0.0, "mask-bias"),
}  # fmt: skip


@pytest.mark.parametrize("block", [2**20, 1, 2 * COLUMNS])
@pytest.mark.parametrize("name", READ)
def test_what_is_read(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_read, "BLOCK", block)
    kind, program, fill = READ[name]
    of, module, evaluator = found(program, kind, fill)
    assert isinstance(of, Reading), of
    assert of.fill == FILLS.get(name, fill)
    (node,) = module.graph.output_node().all_input_nodes
    for _ in range(3):
        known = Values(module, draw())
        held = (known.values[node] == 0) == (kind != "show")
        assert torch.equal(
            shown(of, known, evaluator).expand(ROWS, HEADS, -1, -1), held.expand(ROWS, HEADS, COLUMNS, COLUMNS)
        )


@pytest.mark.parametrize("block", [2**20, 1])
def test_more_keys_than_queries(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_read, "BLOCK", block)
    dims = (*DIMS[:2], axis_dim(2, 3), DIMS[3])
    for rows in (1, ROWS):
        of, _, evaluator = found(lambda x, n=rows: x.by_key(x.f[:n]) & (x.key <= x.row[:3] + 1), dims=dims)
        assert isinstance(of, Reading) and of.rows.tolist() == [[0, 2], [0, 3], [0, 4]]
        assert of.cells is not None and evaluator.leaves[0].first == 0
        cells = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS)[:rows]
        assert torch.equal(of.cells, cells.where(torch.arange(COLUMNS) < 4, -1))
    of, _, _ = found(lambda x: x.by_key(x.f), dims=dims)
    assert isinstance(of, Reading) and of.rows.tolist() == [[0, COLUMNS]] * 3


FOLDED = (Atom(2, COLUMNS, ROWS),), *DIMS[1:]
"""The batch elements and the queries are digits of one axis."""
ONE_ROW = ROWS * HEADS * COLUMNS


@pytest.mark.parametrize("dims", [DIMS, FOLDED])
@pytest.mark.parametrize(
    ("block", "heights"),
    [
        (2**20, [5]),
        (3 * ONE_ROW, [3, 2]),
        (2 * ONE_ROW, [2, 2, 1]),
        (5 * ONE_ROW - 1, [4, 1]),
        (1, [1] * 5),
    ],
)
def test_some_rows_at_a_time(block: int, heights: list[int], dims: Dims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_read, "BLOCK", block)
    given = torch.zeros(ROWS, HEADS, COLUMNS, COLUMNS, dtype=torch.bool)
    module = graph_of(lambda mask: mask.logical_not(), (given,))
    (node,) = module.graph.output_node().all_input_nodes
    tables = list(_blocks(Term("show", node, dims), dims, Evaluator(module, frozenset())))
    assert [height for _, height in tables] == heights
    cells = [table.cell for table, _ in tables if isinstance(table, CellTable)]
    assert torch.equal(torch.cat(cells, 2).flatten(), torch.arange(given.numel()).int())


@pytest.mark.parametrize("block", [2**20, 1])
@pytest.mark.parametrize(
    ("hidden", "code"),
    [
        (lambda x: x.key == 1, "mask-not-interval"),
        (lambda x: x.key < torch.arange(HEADS)[:, None, None], "mask-per-head"),
    ],
)
def test_several_numbers_that_hide_are_none(
    hidden: Program, code: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the later rows hide by another number than those of which no claim can be made."""
    monkeypatch.setattr(module_read, "BLOCK", block)
    of, _, _ = found(lambda x: torch.where(hidden(x), -1e9, torch.where(x.row == 1, LOW, 0.0)), "add", 0.0)
    assert isinstance(of, OtherForm) and of.reason.code == code and of.fill is None


@pytest.mark.parametrize("block", [2**20, 1])
@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_read, "BLOCK", block)
    kind, program, fill, code = UNREAD[name]
    of, _, _ = found(program, kind, fill)
    assert isinstance(of, Unproven) and of.reason.code == code
    is_mask = code in ("mask-per-head", "mask-not-interval", "mask-padding")
    assert isinstance(of, OtherForm) == is_mask and getattr(of, "fill", LOW) == LOW


def test_other_axes_are_not_read() -> None:
    module = graph_of(lambda f: f.logical_not(), (torch.ones(COLUMNS, COLUMNS, dtype=torch.bool),))
    (node,) = module.graph.output_node().all_input_nodes
    of = read(Term("show", node, (axis_dim(4, COLUMNS), DIMS[3])), DIMS, Evaluator(module, frozenset()))
    assert isinstance(of, Unproven) and of.reason.code == "mask-axes"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([0.0, 0.0], set()),
        ([0.0, LOW], {LOW}),
        ([LOW, LOW], {LOW}),
        ([0.0, -1e9, LOW, -2e9], {LOW, -1e9}),
        ([0.0, -5.0], None),
        ([0.0, LOW, -5.0], None),
        ([0.0, LOW, 5.0], None),
        ([0.0, float("nan")], None),
        ([-1e9, LOW], {LOW, -1e9}),
    ],
)
def test_the_numbers_that_hide(values: list[float], found: set[float] | None) -> None:
    held = torch.tensor(values)
    module = graph_of(lambda x: x + 1, (held,))
    (node,) = module.graph.output_node().all_input_nodes
    assert hiding(held, held == 0, Term("add", node, ())) == found
