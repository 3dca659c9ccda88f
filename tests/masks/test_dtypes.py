"""Masks in every dtype: random programs against brute force over all inputs, and near misses by name.

A mask is summed, scaled, negated, cast and filled in the dtype that was drawn. bool sums are an or, small integers
wrap, 16-bit numbers round, and float32 ends at `finfo.max`: a proof that takes them for real numbers is wrong here.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuron_attn_rewrite import RewriteConfig, rewrite
from tests.masks.test_soundness import BATCH, LENGTH, all_values, assert_same_everywhere, key, row

LOW = torch.finfo(torch.float32).min
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
]
LITERALS = (1, -1, 2, 3, 100, 200, -100, -300, -10000, 70000, 0.5, -1e9, LOW, -torch.inf)
LEAVES: dict[str, Any] = {
    "keys": lambda m, n: m[:, None, None, :] != 0,
    "other keys": lambda m, n: n[:, None, None, :] != 0,
    "hidden keys": lambda m, n: m[:, None, None, :] == 0,
    "causal": lambda m, n: (key() <= row())[None, None],
    "future": lambda m, n: (key() > row())[None, None],
    "shifted": lambda m, n: torch.cat([torch.zeros_like(m[:, :1]), m[:, :-1]], 1)[:, None, None, :] != 0,
    "distance": lambda m, n: (row() - key())[None, None],
    "row": lambda m, n: row().expand(LENGTH, LENGTH)[None, None],
}


def attempted(function: Any, *args: Any) -> Tensor:
    """The result, or the first operand where torch refuses a literal or a dtype."""
    try:
        found: Tensor = function(*args)
        return found
    except RuntimeError:
        fallback: Tensor = args[0]
        return fallback


UNARY: dict[str, Any] = {
    "negated": lambda a, x: -a,
    "times": lambda a, x: a * x,
    "plus": lambda a, x: a + x,
    "from": lambda a, x: torch.rsub(a, x, alpha=2) if a.dtype != torch.bool else x - a.int(),
    "filled": lambda a, x: a.masked_fill(a != 0, x),
    "chosen": lambda a, x: torch.where(a != 0, a, x),
    "below": lambda a, x: a < x,
    "not below": lambda a, x: a >= x,
    "at least": lambda a, x: a.clamp(min=x),
    "summed": lambda a, x: a.cumsum(-1, dtype=a.dtype),
    "divided": lambda a, x: torch.div(a, x, rounding_mode="floor") if x != -torch.inf else a,
    "flipped": lambda a, x: a.roll(1, -1),
}
BINARY: dict[str, Any] = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: torch.sub(a, b, alpha=2),
    "times": lambda a, b: a * b,
    "and": lambda a, b: a & b if not (a.is_floating_point() or b.is_floating_point()) else a,
    "larger": torch.maximum,
    "less": lambda a, b: a < b,
    "if": lambda a, b: torch.where(a != 0, a, b),
}
PROGRAMS = st.recursive(
    st.tuples(st.sampled_from(sorted(LEAVES)), st.sampled_from(DTYPES)),
    lambda inner: (
        st.tuples(st.sampled_from(sorted(UNARY)), inner, st.sampled_from(LITERALS))
        | st.tuples(st.sampled_from(sorted(BINARY)), inner, inner)
        | st.tuples(st.just("cast"), inner, st.sampled_from(DTYPES))
    ),
    max_leaves=3,
)


def evaluate(program: Any, m: Tensor, n: Tensor) -> Tensor:
    name, first, *rest = program
    if isinstance(first, torch.dtype):
        leaf: Tensor = LEAVES[name](m, n)
        return leaf.to(first)
    a = evaluate(first, m, n)
    if name == "cast":
        return a.to(rest[0])
    if isinstance(rest[0], tuple):
        return attempted(BINARY[name], a, evaluate(rest[0], m, n))
    return attempted(UNARY[name], a, rest[0])


USES: dict[str, Any] = {
    "added": lambda s, mask: (s + mask).softmax(-1),
    "added as float": lambda s, mask: (s + mask.float()).softmax(-1),
    "added and scaled": lambda s, mask: ((s + mask) * 2).softmax(-1),
    "added twice": lambda s, mask: (s + mask.float() * LOW + (1.0 - mask.float()) * -3.0).softmax(-1),
    "hidden": lambda s, mask: s.masked_fill(mask != 0, -torch.inf).softmax(-1),
    "shown": lambda s, mask: torch.where(mask == 0, LOW, s).softmax(-1),
    "filled and scaled": lambda s, mask: (s.masked_fill(mask.bool(), LOW) * 2).softmax(-1),
    "NaN is read": lambda s, mask: s.masked_fill(mask != 0, -torch.inf).softmax(-1).nan_to_num(0.25),
}

REFUSED = ("without overflow", "not implemented for", "with a bool tensor is not supported")
"""What torch says of a literal or a dtype that it takes on fake tensors only. The program is none then."""


@settings(max_examples=int(os.environ.get("MASK_PROGRAMS", "6")), deadline=None)
@given(
    program=PROGRAMS,
    use=st.sampled_from(sorted(USES)),
    dtype=st.sampled_from([torch.int64, torch.bool, torch.uint8, torch.float32]),
)
def test_every_claim_holds_in_every_dtype(program: Any, use: str, dtype: torch.dtype) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, other_mask: Tensor) -> Tensor:
        mask = evaluate(program, attention_mask, other_mask)
        result: Tensor = USES[use](q @ k.mT * 0.5, mask).to(v.dtype) @ v
        return result

    cells = all_values(BATCH * LENGTH).reshape(-1, BATCH, LENGTH)
    try:
        assert_same_everywhere(model, (cells.to(dtype), cells[torch.randperm(len(cells))].to(dtype)))
    except RuntimeError as error:
        assume(not any(words in str(error) for words in REFUSED))
        raise


class Attention(nn.Module):
    """softmax(q k + mask(a, b)) v, or a function of the result."""

    def __init__(self, mask: Any, after: Any = None) -> None:
        super().__init__()
        self.mask, self.after = mask, after
        self.table = nn.Parameter(torch.full((KEYS, KEYS), LOW).triu(1), requires_grad=False)
        self.learned = nn.Parameter(torch.randn(KEYS, KEYS))
        self.register_buffer("lowered", torch.tensor([[0.0], [LOW]]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = (q @ k.mT * 0.3 + self.mask(self, a, b)).softmax(-1) @ v
        return result if self.after is None else self.after(result)


KEYS = 8


def worst(model: nn.Module, dtype: torch.dtype = torch.bool, **config: Any) -> tuple[float, int, str]:
    """The largest error over inputs with rows that see no key, the number of kernels, and the mask."""
    torch.manual_seed(0)
    qkv = tuple(2 * torch.randn(2, 2, KEYS, 8) for _ in range(3))
    ones = torch.ones(2, KEYS).to(dtype)
    with torch.no_grad():
        rewritten = rewrite(model, (*qkv, ones, ones), config=RewriteConfig(policy="always", verify=False, **config))
        error = 0.0
        for share in (1.0, 0.7, 0.4, 0.0):
            a, b = ((torch.rand(2, KEYS) < share).to(dtype) for _ in range(2))
            old, new = model(*qkv, a, b), rewritten(*qkv, a, b)
            error = max(error, float((old - new).where(~old.isnan(), 0).abs().max()))
    report = rewritten.report
    return error, len(report.replaced), str(report.sites[0].mask)


def by_key(mask: Tensor) -> Tensor:
    return mask[:, None, None, :]


EXACT: dict[str, Any] = {
    "bool filled with -inf": lambda m, a, b: by_key(a).masked_fill(by_key(~a), -torch.inf),
    "bool where -inf": lambda m, a, b: torch.where(by_key(a), by_key(b), by_key(a).masked_fill(by_key(a), -torch.inf)),
    "bool sum": lambda m, a, b: by_key(a) + by_key(b),
    "bool product": lambda m, a, b: by_key(a) * by_key(b),
    "int8 sum": lambda m, a, b: by_key((~a).to(torch.int8) * -100 + (~b).to(torch.int8) * -100),
    "int16 sum": lambda m, a, b: by_key((~a).to(torch.int16) * -20000 + (~b).to(torch.int16) * -20000),
    "uint8 negated": lambda m, a, b: -by_key(a.to(torch.uint8)),
    "uint8 scaled twice": lambda m, a, b: (by_key(a.to(torch.uint8)) * 16) * 16.0,
    "int8 against a literal": lambda m, a, b: by_key(a.to(torch.int8) * 100 < 200).float() * -5.0,
    "a factor of finfo.min": lambda m, a, b: (by_key((~a).float()) * LOW) * 2,
    "a frozen parameter": lambda m, a, b: m.table + by_key((~a).float()) * LOW,
    "an integer literal": lambda m, a, b: ((1 - a.int()) * -10000)[:, :, None][:, None] + m.table,
    "a logarithm": lambda m, a, b: by_key(a.float()).log() + (a[:, None, :, None] * b[:, None, None]).float().log(),
    "a product of masks": lambda m, a, b: ((~a).float()[:, :, None] @ (~b).float()[:, None])[:, None] * -10000.0,
    "an embedding": lambda m, a, b: nn.functional.embedding((~a).long(), m.lowered)[..., 0][:, None, None] + m.table,
    "shifted": lambda m, a, b: by_key(torch.cat([a[:, :1], a[:, :-1]], 1)).float() * -7.0,
}


@pytest.mark.parametrize("name", EXACT)
def test_a_mask_does_what_its_dtype_does(name: str) -> None:
    error, replaced, _ = worst(Attention(EXACT[name]))
    assert error < 3e-5 and replaced == 1


def test_padding_shifted_by_one_key_reads_inside_of_its_vector() -> None:
    def shifted(m: Any, a: Tensor, b: Tensor) -> Tensor:
        return by_key(torch.cat([torch.zeros_like(a[:, :1]), a[:, :-1]], 1)).logical_not().float() * LOW

    error, _, _ = worst(Attention(shifted))
    assert error < 3e-5


def test_learned_bias_and_padding_stay_a_claim() -> None:
    """A parameter of ordinary numbers hides nothing, so the padding is key padding."""
    error, replaced, mask = worst(Attention(lambda m, a, b: m.learned + by_key((~a).float()) * LOW))
    assert error < 3e-5 and replaced == 1 and mask == "key_padding(a)"


NAN_READERS: dict[str, Any] = {
    "nan_to_num": lambda x: x.nan_to_num(nan=1.0),
    "where isnan": lambda x: torch.where(x.isnan(), 3.0, x),
    "not equal to itself": lambda x: torch.where(x == x, x, 2.0),
    "nanmean": lambda x: x.nanmean(-1),
    "argmax over the rows": lambda x: x.argmax(2).float(),
    "bits": lambda x: (x.view(torch.int32) & 0x7F800000 == 0x7F800000).float(),
    "exponent": lambda x: torch.frexp(x).exponent.float(),
    "sorted rows": lambda x: x.sort(2).values,
    "the most frequent": lambda x: x.mode(2).values,
    "the sign of another number": lambda x: torch.copysign(torch.ones(()), x),
    "eight bits": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127),
    "a written buffer": lambda x: torch.zeros_like(x).copy_(x).nan_to_num(2.0),
    "behind other operators": lambda x: (x.transpose(1, 2).relu() * 2).isfinite().float(),
}


@pytest.mark.parametrize("name", NAN_READERS)
def test_nan_that_the_model_reads_is_kept(name: str) -> None:
    def mask(m: Any, a: Tensor, b: Tensor) -> Tensor:
        return torch.zeros(a.shape).masked_fill(~a, -torch.inf)[:, None, None]

    error, replaced, _ = worst(Attention(mask, NAN_READERS[name]))
    assert error < 3e-5 and replaced == 0
    _, replaced, claimed = worst(Attention(mask, lambda x: x.relu() * 2))
    assert replaced == 1 and claimed == "key_padding(a)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_input_of_16_bits_is_left_alone(dtype: torch.dtype) -> None:
    """The model rounds scores of -1e4 to steps of 8 and more. No kernel does."""

    class Half(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            result: Tensor = (q @ k.mT * 0.3 + mask).float().softmax(-1).to(v.dtype) @ v
            return result

    qkv = tuple(torch.randn(2, 2, KEYS, 8, dtype=dtype) for _ in range(3))
    inputs = (*qkv, torch.zeros(2, 1, 1, KEYS, dtype=dtype))
    report = rewrite(Half(), inputs, config=RewriteConfig(policy="always")).report
    assert not report.replaced
    wide = tuple(x.float() for x in inputs)
    assert len(rewrite(Half(), wide, config=RewriteConfig(policy="always")).report.replaced) == 1
