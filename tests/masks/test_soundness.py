"""Soundness of the proof: random mask programs, and every claim against brute force over all inputs.

A program is a small expression over mask inputs, in the operators from which models build their masks. It is rewritten
with `verify=False`, so that nothing is put back, and the original and the rewritten graph run on every value that the
inputs can have. Equal outputs at every row prove claim and empty-row meaning together.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from neuron_attn_rewrite import RewriteConfig, RewrittenModule, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from neuron_attn_rewrite.kernels import reference
from neuron_attn_rewrite.ops.arguments import checked_terms

BATCH, LENGTH = 2, 4
EXACT = RewriteConfig(policy="always", verify=False)
LOW = torch.finfo(torch.float32).min
FILLS = (-torch.inf, LOW, -1e9, -1e4, -5.0, 0.0)


def row() -> Tensor:
    return torch.arange(LENGTH)[:, None]


def key() -> Tensor:
    return torch.arange(LENGTH)[None, :]


def _chunk(at: Tensor, mask: Tensor) -> Tensor:
    """Chunks of two positions that begin behind the left padding."""
    padding = (mask.cumsum(1) == 0).sum(1)[:, None, None, None]
    return (at[None, None] - padding) // 2


def _span(mask: Tensor) -> Tensor:
    """Which run of ones a position belongs to, -1 for none."""
    starts = (mask != 0) & (F.pad(mask, (1, 0))[:, :-1] == 0)
    return torch.where(mask != 0, starts.int().cumsum(1) - 1, -1)


def _same_part(parts: Tensor) -> Tensor:
    return _pairs(parts, torch.eq)


def _pairs(values: Tensor, compare: Any) -> Tensor:
    """What a comparison says of the value of each key and that of each query, [BATCH | 1, 1, LENGTH, LENGTH]."""
    values = values.reshape(-1, LENGTH)
    found: Tensor = compare(values[:, None, None, :], values[:, None, :, None])
    return found


def _breaks(positions: Tensor, step: int = 1) -> Tensor:
    """The number of the sequence that each position belongs to, if sequences are packed one behind the other."""
    return (positions.diff(dim=1, prepend=positions[:, :1] - step) != step).cumsum(1)


def _put(mask: Tensor) -> Tensor:
    """The mask with its first key shown."""
    first = torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64)
    return torch.index_put(mask.bool(), first, torch.tensor(True))


# Programs: nested tuples (operator, *operands). A bool program gives [BATCH | 1, 1, LENGTH | 1, LENGTH | 1].

LEAVES: dict[str, Any] = {
    "keys": lambda m, n: m[:, None, None, :] != 0,
    "keys as bool": lambda m, n: m.bool()[:, None, None, :],
    "keys equal one": lambda m, n: m[:, None, None, :] == 1,
    "keys above zero": lambda m, n: (m > 0).view(BATCH, 1, 1, LENGTH),
    "queries": lambda m, n: m[:, None, :, None].bool(),
    "indexed": lambda m, n: m.bool()[torch.arange(BATCH)[:, None, None, None], key()[None, None]],
    "other keys": lambda m, n: n[:, None, None, :].bool(),
    "both": lambda m, n: (m * n)[:, None, None, :].bool(),
    "either": lambda m, n: (m + n)[:, None, None, :] > 0,
    "shifted": lambda m, n: torch.cat([m[:, 1:], m[:, :1]], 1)[:, None, None, :].bool(),
    "padded": lambda m, n: F.pad(m[:, 1:], (1, 0), value=1)[:, None, None, :] == 1,
    "first key": lambda m, n: m[:, :1, None, None].bool(),
    "cumulated": lambda m, n: m.cumsum(1)[:, None, None, :] > 1,
    "lengths": lambda m, n: key()[None, None] < m.sum(-1)[:, None, None, None],
    "positions": lambda m, n: (m.cumsum(1) - 1)[:, None, None, :] <= row(),
    "positions of queries": lambda m, n: key() <= (m.cumsum(1) - 1)[:, None, :, None],
    "segments": lambda m, n: m[:, None, None, :] == m[:, None, :, None],
    "product": lambda m, n: (m[:, None, None, :] * m[:, None, :, None]).bool(),
    "causal": lambda m, n: (key() <= row())[None, None],
    "anticausal": lambda m, n: (key() >= row())[None, None],
    "offset": lambda m, n: (key() <= row() + 1)[None, None],
    "strict": lambda m, n: (key() < row())[None, None],
    "window": lambda m, n: (key() > row() - 2)[None, None],
    "tril": lambda m, n: torch.ones(LENGTH, LENGTH).tril().bool()[None, None],
    "chunks": lambda m, n: (key() // 2 == row() // 2)[None, None],
    "chunks behind padding": lambda m, n: _chunk(key(), m) == _chunk(row(), m),
    "segments of a sum": lambda m, n: m.cumsum(1)[:, None, None, :] == m.cumsum(1)[:, None, :, None],
    "spans": lambda m, n: _span(m)[:, None, None, :] == _span(m)[:, None, :, None],
    "blocks": lambda m, n: _same_part(torch.arange(2).repeat_interleave(2)),
    "buckets": lambda m, n: _same_part(torch.bucketize(torch.arange(LENGTH), torch.tensor([1, 3]))),
    "rolled": lambda m, n: m.roll(1, 1)[:, None, None, :].bool(),
    "upper triangle": lambda m, n: torch.ones(LENGTH, LENGTH).triu(-1).bool()[None, None],
    "scattered": lambda m, n: torch.zeros(LENGTH, LENGTH).scatter(1, row(), 1.0).bool()[None, None],
    "put": lambda m, n: _put(m)[:, None, None, :],
    "remainders": lambda m, n: (key() % 2 == row() % 2)[None, None],
    "prefix": lambda m, n: (key() < 2)[None, None],
    "last key": lambda m, n: (key() == LENGTH - 1)[None, None],
    "holes": lambda m, n: (key() != 1)[None, None],
    "true": lambda m, n: torch.ones(1, 1, 1, LENGTH, dtype=torch.bool),
    "false": lambda m, n: torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool),
}
NEED_NUMBERS = ("both", "either", "cumulated", "positions", "chunks behind", "sum", "spans")
"""What can't be computed of a bool mask."""
UNARY: dict[str, Any] = {
    "not": torch.logical_not,
    "inverse": lambda a: (1 - a.int()) == 1,
    "reverse keys": lambda a: a.expand(-1, -1, -1, LENGTH).flip(-1),
    "swap batch": lambda a: a.expand(BATCH, -1, -1, -1).flip(0),
    "transpose": lambda a: a.mT,
    "widen": lambda a: a.expand(BATCH, 1, LENGTH, LENGTH),
    "filled": lambda a: torch.zeros(a.shape).masked_fill(~a, LOW) == 0,
    "every key": lambda a: a.all(-1, keepdim=True),
    "clone": lambda a: a.to(torch.float32).clone().to(torch.bool),
}
BINARY: dict[str, Any] = {
    "and": torch.logical_and,
    "bitand": lambda a, b: a & b,
    "or": torch.logical_or,
    "xor": torch.logical_xor,
    "product": lambda a, b: (a.int() * b.int()).bool(),
    "sum": lambda a, b: (a.float() + b.float()) > 1,
    "if": lambda a, b: torch.where(a, b, a),
    "minimum": lambda a, b: torch.minimum(a.int(), b.int()) != 0,
}


def bools(leaves: list[str], size: int = 4) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.sampled_from(leaves).map(lambda name: (name,)),
        lambda inner: (
            st.tuples(st.sampled_from(sorted(UNARY)), inner) | st.tuples(st.sampled_from(sorted(BINARY)), inner, inner)
        ),
        max_leaves=size,
    )


def evaluate(program: Any, *masks: Tensor) -> Tensor:
    name, *operands = program
    if not operands:
        found: Tensor = (LEAVES if len(masks) == 2 else NUMBERS)[name](*masks)
        return found
    return {**UNARY, **BINARY}[name](*(evaluate(p, *masks) for p in operands))


# Attentions: how a program becomes part of the scores


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.5


ADDENDS: dict[str, Any] = {
    "where": lambda a, fill: torch.where(a, 0.0, fill),
    "masked_fill": lambda a, fill: torch.zeros(a.shape).masked_fill(~a, fill),
    "one minus": lambda a, fill: (1.0 - a.float()) * max(fill, LOW),
    "built in place": lambda a, fill: torch.full(a.shape, fill).masked_fill_(a, 0.0),
}
ATTENTIONS: dict[str, Any] = {
    "sdpa, bool": lambda q, k, v, a, b, add, fill: F.scaled_dot_product_attention(q, k, v, attn_mask=a),
    "sdpa, added": lambda q, k, v, a, b, add, fill: F.scaled_dot_product_attention(q, k, v, attn_mask=add(a, fill)),
    "added": lambda q, k, v, a, b, add, fill: torch.softmax(_scores(q, k) + add(a, fill), -1) @ v,
    "filled": lambda q, k, v, a, b, add, fill: torch.softmax(_scores(q, k).masked_fill(~a, fill), -1) @ v,
    "chosen": lambda q, k, v, a, b, add, fill: torch.softmax(torch.where(a, _scores(q, k), fill), -1) @ v,
    "added twice": lambda q, k, v, a, b, add, fill: torch.softmax(_scores(q, k) + add(a, fill) + add(b, LOW), -1) @ v,
    "filled and added": lambda q, k, v, a, b, add, fill: (
        torch.softmax(_scores(q, k).masked_fill(~b, LOW) + add(a, fill), -1) @ v
    ),
    "added and filled": lambda q, k, v, a, b, add, fill: (
        torch.softmax((_scores(q, k) + add(b, -torch.inf)).masked_fill(~a, fill), -1) @ v
    ),
    "sdpa, added twice": lambda q, k, v, a, b, add, fill: F.scaled_dot_product_attention(
        q, k, v, attn_mask=add(a, fill) + add(b, -torch.inf)
    ),
}


def model_of(attention: str, programs: Any, addend: str, fill: float) -> Any:
    """An attention as a function of (q, k, v, attention_mask, other_mask)."""

    def model(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, other_mask: Tensor) -> Tensor:
        a, b = (evaluate(program, attention_mask, other_mask) for program in programs)
        result: Tensor = ATTENTIONS[attention](q, k, v, a, b, ADDENDS[addend], fill)
        return result

    return model


def graph_of(model: Any, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The ATen graph of a function; much faster than torch.export."""
    traced: fx.GraphModule = make_fx(model, tracing_mode="fake", pre_dispatch=True)(*inputs)
    traced.graph.eliminate_dead_code()  # an operator that torch refused is in the graph, with no result
    traced.recompile()
    return traced


def _plain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The kernel's op by its reference, which runs under vmap."""
    return reference.attention(query, key, value, checked_terms(query, key, value, **options))


def everywhere(module: fx.GraphModule, fixed: tuple[Tensor, ...], every: tuple[Tensor, ...]) -> Tensor:
    """The output of a rewritten graph for each element of the first dim of `every`."""
    plain = fx.Graph()
    plain.output(plain.graph_copy(module.graph, {}))
    for node in plain.find_nodes(op="call_function", target=torch.ops.neuron_attn.flash_fwd.default):
        node.target = _plain
    run = fx.Interpreter(fx.GraphModule(module, plain)).run
    result: Tensor = torch.vmap(lambda *given: pytree_first(run(*fixed, *given)))(*every)
    return result


def pytree_first(value: Any) -> Tensor:
    found: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return found


def all_values(count: int, values: int = 2) -> Tensor:
    """Int64 [values ** count, count]: every way to fill `count` cells."""
    return torch.tensor(list(itertools.product(range(values), repeat=count)))


def assert_same_everywhere(model: Any, every: tuple[Tensor, ...]) -> RewrittenModule:
    """Rewrite a function of (q, k, v, *inputs), and compare for each element of the first dim of `every`."""
    torch.manual_seed(0)
    fixed = tuple(3 * torch.randn(BATCH, 1, LENGTH, 8) for _ in range(3))
    rewritten = rewrite(graph_of(model, (*fixed, *(values[-1].clone() for values in every))), config=EXACT)
    old = torch.stack([model(*fixed, *given) for given in zip(*every, strict=True)])
    new = everywhere(rewritten, fixed, every)
    difference = ((old - new).where(~old.isnan(), 0)).abs().amax((1, 2, 3, 4))
    worst = int(difference.argmax())
    assert difference[worst] <= TOLERANCES[torch.float32] * old.nan_to_num().abs().max(), (
        f"{rewritten.report}\nis wrong for {[values[worst].tolist() for values in every]}"
    )
    return rewritten


@settings(max_examples=int(os.environ.get("MASK_PROGRAMS", "100")), deadline=None)
@given(
    attention=st.sampled_from(sorted(ATTENTIONS)),
    programs=st.tuples(bools(sorted(LEAVES)), bools(["keys", "causal", "other keys", "true", "queries"], 2)),
    addend=st.sampled_from(sorted(ADDENDS)),
    fill=st.sampled_from(FILLS),
    dtype=st.sampled_from([torch.int64, torch.bool, torch.float32]),
)
def test_every_claim_holds_for_all_inputs(
    attention: str, programs: Any, addend: str, fill: float, dtype: torch.dtype
) -> None:
    if dtype == torch.bool and any(name in str(programs) for name in NEED_NUMBERS):
        dtype = torch.int64
    cells = all_values(BATCH * LENGTH).reshape(-1, BATCH, LENGTH)
    # The other mask takes every value too, though not every pair of both.
    every = cells.to(dtype), cells[torch.randperm(len(cells))].to(dtype)
    assert_same_everywhere(model_of(attention, programs, addend, fill), every)


# Integers with more values: positions, lengths, segments

NUMBERS: dict[str, Any] = {
    "up to a position": lambda p, c, n: (key() <= c[:, None])[None, None],
    "before a position": lambda p, c, n: (key() < c[:, None])[None, None],
    "window at a position": lambda p, c, n: ((key() <= c[:, None]) & (key() > c[:, None] - 2))[None, None],
    "from a position on": lambda p, c, n: (c[:, None] <= key())[None, None],
    "position of a batch": lambda p, c, n: key()[None, None] <= p[:, None, :, None],
    "position of keys": lambda p, c, n: p[:, None, None, :] <= row()[None, None],
    "two positions": lambda p, c, n: p[:, None, None, :] <= p[:, None, :, None],
    "lengths": lambda p, c, n: torch.arange(LENGTH) < n[:, None, None, None],
    "lengths and rows": lambda p, c, n: torch.arange(LENGTH) < n[:, None, None, None] + row(),
    "twice the length": lambda p, c, n: 2 * torch.arange(LENGTH) < n[:, None, None, None],
    "left of the length": lambda p, c, n: torch.arange(LENGTH) >= LENGTH - n[:, None, None, None],
    "segments": lambda p, c, n: p[:, None, None, :] == p[:, None, :, None],
    "one segment": lambda p, c, n: (p == 1)[:, None, None, :],
    "a real segment": lambda p, c, n: p[:, None, None, :] != 0,
    "a first length": lambda p, c, n: (key() < n[0])[None, None],
    "next position": lambda p, c, n: (key() <= torch.cat([c[1:], c[:1]])[:, None])[None, None],
    "later positions": lambda p, c, n: (key() <= F.pad(c[1:], (0, 1), value=3)[:, None])[None, None],
    "the larger": lambda p, c, n: (key() <= torch.maximum(c[:, None], row()))[None, None],
    "clamped": lambda p, c, n: (key() <= c.clamp(min=1)[:, None])[None, None],
    "packed": lambda p, c, n: _same_part(_breaks(p)),
    "packed by positions": lambda p, c, n: _same_part(_breaks(p)) & _pairs(p, torch.le),
    "packed windows": lambda p, c, n: _same_part(_breaks(p)) & _pairs(p, lambda k, q: k > q - 2),
    "packed without the first": lambda p, c, n: _same_part(F.pad((p.diff(dim=1) != 1).cumsum(1), (1, 0))),
    "packed backwards": lambda p, c, n: _same_part(_breaks(p, -1)) & _pairs(p, torch.ge),
    "packed, positions of another batch": lambda p, c, n: _same_part(_breaks(p)) & _pairs(p.flip(0), torch.le),
    "packed, positions shifted": lambda p, c, n: _same_part(_breaks(p)) & _pairs(p.roll(1, 1), torch.le),
    "packed, other positions": lambda p, c, n: _same_part(_breaks(p)) & _pairs(c[None] + 0 * p, torch.le),
    "parts in order": lambda p, c, n: _pairs(_breaks(p), torch.le),
    "parts behind": lambda p, c, n: _pairs(_breaks(p), torch.gt),
    "the part and the one before": lambda p, c, n: _pairs(_breaks(p), lambda k, q: (k <= q) & (k + 1 >= q)),
    "part of a number": lambda p, c, n: _breaks(p)[:, None, None, :] <= c[:, None],
    "parts of the first": lambda p, c, n: _same_part(_breaks(p)[:1]),
    "parts across the batch": lambda p, c, n: _same_part((p != 1).cumsum(0)),
    "sums that fall": lambda p, c, n: _pairs((p - 1).cumsum(1), torch.le),
    "segments of a sum": lambda p, c, n: _same_part(p.cumsum(1)),
    "chunks from a position on": lambda p, c, n: (key() // 2 == c[:, None] // 2)[None, None],
    "chunks that move": lambda p, c, n: _at(key(), n) // 3 == _at(row(), n) // 3,
    "chunks not before": lambda p, c, n: _at(key(), n) // 2 >= _at(row(), n) // 2,
    "chunks of keys and numbers": lambda p, c, n: (key() + row() - 3) // 2 < n[:, None, None, None],
    "remainders": lambda p, c, n: (key() % 2 == c[:, None] % 2)[None, None],
    "a remainder as the end": lambda p, c, n: (key() <= c[:, None] % 3)[None, None],
    "a product of numbers": lambda p, c, n: key()[None, None] < p[:, None, :, None] * n[:, None, None, None],
    "the positions' maximum": lambda p, c, n: key()[None, None] <= p.amax(1)[:, None, None, None] - row(),
    "rolled positions": lambda p, c, n: (key() <= c.roll(1)[:, None])[None, None],
    "causal": lambda p, c, n: (key() <= row())[None, None],
    "prefix or causal": lambda p, c, n: (key() < n[:, None, None, None]) | (key() <= row()),
}


def _at(at: Tensor, lengths: Tensor) -> Tensor:
    return at[None, None] - lengths[:, None, None, None]


@settings(max_examples=int(os.environ.get("MASK_PROGRAMS", "60")), deadline=None)
@given(
    attention=st.sampled_from(["sdpa, bool", "added", "filled", "added twice"]),
    programs=st.tuples(bools(sorted(NUMBERS), 3), bools(["causal", "lengths", "up to a position"], 1)),
    addend=st.sampled_from(sorted(ADDENDS)),
    fill=st.sampled_from(FILLS),
)
def test_every_claim_about_numbers_holds(attention: str, programs: Any, addend: str, fill: float) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, cache_position: Tensor, lengths: Tensor) -> Tensor:
        a, b = (evaluate(program, position_ids, cache_position, lengths) for program in programs)
        result: Tensor = ATTENTIONS[attention](q, k, v, a, b, ADDENDS[addend], fill)
        return result

    rows = all_values(LENGTH, 4)
    shuffled = [torch.randperm(len(rows)) for _ in range(4)]
    positions = torch.stack([rows[shuffled[0]], rows[shuffled[1]]], 1)
    assert_same_everywhere(model, (positions, rows[shuffled[2]], rows[shuffled[3]][:, :BATCH] + 1))


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("up to a position", "key <= cache_position_1[query]"),
        ("window at a position", "key >= cache_position_1[query] - 1 & key <= cache_position_1[query]"),
        ("position of a batch", "key <= position_ids_1[batch, query]"),
        ("lengths", "key <= lengths_1[batch] - 1"),
        ("left of the length", "key >= - lengths_1[batch] + 4"),
        ("lengths and rows", "key <= lengths_1[batch] + query - 1"),
        ("a real segment", "key_padding(position_ids_1)"),
        ("later positions", "key <= pad[query]"),
        (
            "chunks from a position on",
            "key >= 2 * (cache_position_1[query] // 2) & key <= 2 * (cache_position_1[query] // 2) + 1",
        ),
        ("a product of numbers", "key <= mul[batch, 0, query, 0] - 1"),
        (
            "packed",
            "key >= first(cumsum >= cumsum[batch, query]) & key <= first(cumsum >= cumsum[batch, query] + 1) - 1",
        ),
        ("packed by positions", "causal(offset=0) & key >= first(cumsum >= cumsum[batch, query])"),
        ("packed backwards", "causal(offset=0) & key >= first(cumsum >= cumsum[batch, query])"),
        ("part of a number", "key <= first(cumsum >= cache_position_1[query] + 1) - 1"),
        ("packed, positions of another batch", "none"),
        ("packed, positions shifted", "none"),
        ("packed, other positions", "none"),
        ("parts across the batch", "none"),
        ("sums that fall", "none"),
        ("segments of a sum", "none"),
        ("remainders", "none"),
        ("segments", "none"),
        ("two positions", "none"),
        ("twice the length", "key_padding(lt)"),
    ],
)
def test_bounds_at_run_time_are_named(name: str, mask: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, cache_position: Tensor, lengths: Tensor) -> Tensor:
        visible = evaluate((name,), position_ids, cache_position, lengths)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    values = torch.randint(0, 4, (8, BATCH, LENGTH))
    rewritten = assert_same_everywhere(model, (values, values[:, 0], values[:, 0, :BATCH] + 1))
    assert set(str(rewritten.report.sites[0].mask).split(" & ")) == set(mask.split(" & "))
    assert not any("holds only 0 and 1" in reason for reason in rewritten.report.sites[0].reasons)


@pytest.mark.parametrize("attention", ["sdpa, bool", "added"])
def test_one_bit_more_or_less_is_never_causal(attention: str) -> None:
    """Every mask that differs from the causal one in a single element, written as index arithmetic."""
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(BATCH, 1, LENGTH, 8) for _ in range(3))

    def with_a_bit(i: int, j: int) -> Any:
        def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flipped = (key() <= row()) ^ ((row() == i) & (key() == j))
            result: Tensor = ATTENTIONS[attention](q, k, v, flipped, None, ADDENDS["where"], LOW)
            return result

        return model

    for i, j in itertools.product(range(LENGTH), repeat=2):
        model = with_a_bit(i, j)
        rewritten = rewrite(graph_of(model, (q, k, v)), config=EXACT)
        assert "causal(offset=0)" not in str(rewritten.report.sites[0].mask)
        assert (model(q, k, v) - rewritten(q, k, v)).abs().max() <= 1e-5 * v.abs().max()
