"""`neuron_attn::flash_fwd` against a plain float64 attention, on the CPU and as every other device computes it."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neuron_attn_rewrite.config.options import TOLERANCES
from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels import cpu
from neuron_attn_rewrite.ops import flash_fwd as flash_fwd_ops

flash_fwd = torch.ops.neuron_attn.flash_fwd.default
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"cpu": flash_fwd, "decomposed": flash_fwd_ops.forward_decomposed}
BACKWARDS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "cpu": torch.ops.neuron_attn.flash_bwd.default,
    "decomposed": flash_fwd_ops.backward_decomposed,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    heads: int = 6
    kv_heads: int = 2
    q_len: int = 129
    kv_len: int = 200
    head_dim: int = 16
    v_head_dim: int = 16


def expected(query: Tensor, key: Tensor, value: Tensor, *, scale: float, **o: Any) -> Tensor:
    """The meaning of the op, spelled out for each pair of row and key, in float64."""
    (batch, heads, q_len, _), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    query = query.double()
    key, value = (t.double().repeat_interleave(heads // kv_heads, 1) for t in (key, value))
    scores = scale * query @ key.transpose(2, 3)
    if o.get("softcap") is not None:
        scores = o["softcap"] * torch.tanh(scores / o["softcap"])
    if o.get("bias") is not None:
        scores = scores + o["bias"].double()
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
    hidden = torch.zeros(batch, 1, q_len, kv_len, dtype=torch.bool)
    if o.get("band_lower") is not None:
        hidden |= j - i < o["band_lower"]
    if o.get("band_upper") is not None:
        hidden |= j - i > o["band_upper"]
    if o.get("key_padding") is not None:
        hidden |= ~o["key_padding"][:, None, None]
    if o.get("bounds") is not None:
        hidden |= (j < o["bounds"][:, None, :, :1]) | (j >= o["bounds"][:, None, :, 1:])
    scores = scores.masked_fill(hidden, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)  # any number: the row is replaced below
    if o.get("sink") is not None:
        sink = o["sink"].double()[None, :, None, None].expand(batch, -1, q_len, 1)
        scores = torch.cat([scores, sink], -1)
    out = torch.softmax(scores, -1)[..., :kv_len] @ value
    instead = value.mean(2, keepdim=True) if o.get("empty_rows") == "mean" else torch.zeros(())
    return torch.where(empty, instead, out)


def operands(sizes: Sizes, dtype: torch.dtype, magnitude: float = 2.5) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(sizes.batch, sizes.heads, sizes.q_len, sizes.head_dim) * magnitude
    key = torch.randn(sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.head_dim) * magnitude
    value = torch.randn(sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.v_head_dim) * magnitude
    return query.to(dtype), key.to(dtype), value.to(dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-6)) if want.numel() else 0.0


def assert_equal(sizes: Sizes, dtype: torch.dtype, options: dict[str, Any], implementation: str = "cpu") -> None:
    query, key, value = operands(sizes, dtype)
    options = {"scale": sizes.head_dim**-0.5, **options}
    out = IMPLEMENTATIONS[implementation](query, key, value, **options)
    assert out.shape == (sizes.batch, sizes.heads, sizes.q_len, sizes.v_head_dim)
    assert out.dtype == dtype and out.is_contiguous()
    assert relative_error(out, expected(query, key, value, **options)) <= TOLERANCES[dtype]


def padding(sizes: Sizes, side: str) -> Tensor:
    """The batch elements see fewer and fewer keys."""
    j, kv_len = torch.arange(sizes.kv_len), sizes.kv_len
    lengths = torch.linspace(kv_len, 1, sizes.batch).long()[:, None]
    match side:
        case "right":
            return j < lengths
        case "left":
            return j >= kv_len - lengths
        case "holes":
            return torch.rand(sizes.batch, kv_len) < 0.7
        case _:  # the last element sees nothing
            return (j < lengths) & (torch.arange(sizes.batch) < sizes.batch - 1)[:, None]


def spans(sizes: Sizes, batch: int) -> Tensor:
    """Random intervals, some of them empty."""
    lo = torch.randint(0, sizes.kv_len, (batch, sizes.q_len, 1))
    return torch.cat([lo, lo + torch.randint(-3, sizes.kv_len, lo.shape)], -1)


def chunks(sizes: Sizes, size: int) -> Tensor:
    lo = torch.arange(sizes.q_len, dtype=torch.int32) // size * size
    return torch.stack([lo, lo + size], -1)[None]


def bias(sizes: Sizes, *kept: int, hide: bool = False) -> Tensor:
    full = (sizes.batch, sizes.heads, sizes.q_len, sizes.kv_len)
    out = torch.randn([n if d in kept else 1 for d, n in enumerate(full)]) * 3
    return out.masked_fill(torch.rand(out.shape) < 0.3, -torch.inf) if hide else out


Options = Callable[[Sizes], dict[str, Any]]
MASKS: dict[str, Options] = {
    "full": lambda s: {},
    "causal": lambda s: {"band_upper": 0},
    "causal, bottom right": lambda s: {"band_upper": s.kv_len - s.q_len},
    "causal, ahead": lambda s: {"band_upper": 5},
    "causal, behind": lambda s: {"band_upper": -3},
    "causal, behind, mean": lambda s: {"band_upper": -3, "empty_rows": "mean"},
    "window": lambda s: {"band_lower": -6, "band_upper": 0},
    "window, bottom right": lambda s: {"band_lower": s.kv_len - s.q_len - 40, "band_upper": s.kv_len - s.q_len},
    "window, right open": lambda s: {"band_lower": -6},
    "band": lambda s: {"band_lower": -9, "band_upper": 4},
    "band, past the end, mean": lambda s: {"band_lower": s.kv_len - 4, "empty_rows": "mean"},
    "nothing seen": lambda s: {"band_lower": 5, "band_upper": 4},
    "nothing seen, mean": lambda s: {"band_lower": 5, "band_upper": 4, "empty_rows": "mean"},
    "padding right": lambda s: {"key_padding": padding(s, "right")},
    "padding left": lambda s: {"key_padding": padding(s, "left")},
    "padding, holes": lambda s: {"key_padding": padding(s, "holes")},
    "padding, empty": lambda s: {"key_padding": padding(s, "empty")},
    "padding, empty, mean": lambda s: {"key_padding": padding(s, "empty"), "empty_rows": "mean"},
    "padding, one for all": lambda s: {"key_padding": padding(s, "holes")[:1]},
    "causal, padding left": lambda s: {"band_upper": 0, "key_padding": padding(s, "left")},
    "causal, padding left, mean": lambda s: {
        "band_upper": 0,
        "key_padding": padding(s, "left"),
        "empty_rows": "mean",
    },
    "window, padding, holes": lambda s: {"band_lower": -9, "band_upper": 0, "key_padding": padding(s, "holes")},
    "chunks": lambda s: {"bounds": chunks(s, 32)},
    "chunks, causal": lambda s: {"bounds": chunks(s, 32), "band_upper": 0},
    "spans": lambda s: {"bounds": spans(s, 1)},
    "spans, mean": lambda s: {"bounds": spans(s, 1), "empty_rows": "mean"},
    "spans, batch": lambda s: {"bounds": spans(s, s.batch).int(), "empty_rows": "mean"},
    "spans, band, padding": lambda s: {
        "bounds": spans(s, s.batch),
        "band_upper": 50,
        "key_padding": padding(s, "holes"),
        "empty_rows": "mean",
    },
}
TERMS: dict[str, Options] = {
    **{
        f"bias {kept}": lambda s, kept=kept: {"bias": bias(s, *kept)}
        for kept in [(), (0,), (1,), (2,), (3,), (2, 3), (1, 3), (0, 3), (1, 2, 3), (0, 1, 2, 3)]
    },
    "bias, transposed": lambda s: {"bias": bias(s, 1, 2, 3).transpose(2, 3).contiguous().transpose(2, 3)},
    "bias, hiding": lambda s: {"bias": bias(s, 0, 2, 3, hide=True)},
    "bias, hiding keys, mean": lambda s: {"bias": bias(s, 0, 3, hide=True), "empty_rows": "mean"},
    "bias, causal": lambda s: {"bias": bias(s, 1, 2, 3), "band_upper": 0},
    "bias, padding": lambda s: {"bias": bias(s, 1, 2, 3), "key_padding": padding(s, "holes")},
    "bias, hidden rows, mean": lambda s: {
        "bias": bias(s, 2).masked_fill(torch.arange(s.q_len)[:, None] % 2 == 0, -torch.inf),
        "empty_rows": "mean",
    },
    "softcap": lambda s: {"softcap": 5.0},
    "softcap, causal": lambda s: {"softcap": 30.0, "band_upper": s.kv_len - s.q_len},
    "softcap, window, empty": lambda s: {"softcap": 5.0, "band_lower": -9, "band_upper": -2, "empty_rows": "mean"},
    "softcap, bias, padding": lambda s: {"softcap": 5.0, "bias": bias(s, 1, 3), "key_padding": padding(s, "empty")},
    "sink": lambda s: {"sink": torch.randn(s.heads) * 4},
    "sink, window": lambda s: {"sink": torch.randn(s.heads) * 4, "band_lower": -9, "band_upper": 0},
    "sink, empty": lambda s: {"sink": torch.randn(s.heads) * 4, "band_upper": -3},
    "sink, empty, mean": lambda s: {"sink": torch.randn(s.heads), "band_upper": -3, "empty_rows": "mean"},
    "sink, softcap, bias": lambda s: {"sink": torch.randn(s.heads), "softcap": 5.0, "bias": bias(s, 1, 2, 3)},
}
ALL = {**MASKS, **TERMS}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of small calls wait for each other's threads on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_options(name: str, dtype: torch.dtype, implementation: str) -> None:
    options = ALL[name](Sizes())
    if "bias" in options and dtype == torch.bfloat16:
        options["bias"] = options["bias"].to(dtype)
    assert_equal(Sizes(), dtype, options, implementation)


@pytest.mark.parametrize(
    "name", ["full", "causal", "causal, bottom right", "window", "causal, padding left, mean", "bias (1, 3)", "softcap"]
)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(heads=4, kv_heads=4),
        Sizes(heads=8, kv_heads=1),
        Sizes(batch=1, heads=9, kv_heads=3),
        Sizes(head_dim=24, v_head_dim=16),
        Sizes(head_dim=16, v_head_dim=40),
        Sizes(head_dim=256, v_head_dim=256, q_len=40),
        Sizes(q_len=1, kv_len=1),
        Sizes(q_len=1, kv_len=1000),
        Sizes(q_len=7, kv_len=129),
        Sizes(q_len=129, kv_len=7),
        Sizes(q_len=1000, kv_len=1000, heads=2),
        Sizes(batch=3, heads=8, kv_heads=4, q_len=600, kv_len=700, head_dim=64, v_head_dim=64),
    ],
    ids=str,
)
def test_sizes(name: str, sizes: Sizes) -> None:
    for dtype in DTYPES:
        assert_equal(sizes, dtype, ALL[name](sizes))


@pytest.mark.parametrize("name", ["full", "causal", "nothing seen, mean"])
@pytest.mark.parametrize("sizes", [Sizes(q_len=0), Sizes(batch=0), Sizes(kv_len=0), Sizes(v_head_dim=0)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_elements(name: str, sizes: Sizes, implementation: str) -> None:
    query, key, value = operands(sizes, torch.float32)
    out = IMPLEMENTATIONS[implementation](query, key, value, scale=1.0, **ALL[name](sizes))
    assert torch.equal(out, torch.zeros(sizes.batch, sizes.heads, sizes.q_len, sizes.v_head_dim))


@pytest.mark.parametrize("scale", [-2.0, -0.5, 0.0])
@pytest.mark.parametrize("name", ["full", "causal"])
def test_a_scale_that_is_not_positive(name: str, scale: float) -> None:
    sizes = Sizes()
    qkv, options = operands(sizes, torch.float32), {"scale": scale, **ALL[name](sizes)}
    for implementation in IMPLEMENTATIONS.values():
        assert relative_error(implementation(*qkv, **options), expected(*qkv, **options)) <= TOLERANCES[torch.float32]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_combination(data: st.DataObject) -> None:
    """Small tiles, so that there are many of them."""

    def pick(name: str, *choices: Any) -> Any:
        return data.draw(st.sampled_from(choices), label=name)

    torch.manual_seed(data.draw(st.integers(0, 2**20), label="seed"))
    kv_heads = pick("kv_heads", 1, 2, 3)
    lengths = st.integers(1, 40)
    sizes = Sizes(
        batch=pick("batch", 1, 2, 3),
        heads=kv_heads * pick("group", 1, 2, 3),
        kv_heads=kv_heads,
        q_len=data.draw(lengths, label="q_len"),
        kv_len=data.draw(lengths, label="kv_len"),
        head_dim=pick("head_dim", 4, 8),
        v_head_dim=pick("v_head_dim", 4, 6, 8),
    )
    side = st.none() | st.integers(-45, 45)
    options: dict[str, Any] = {
        "band_lower": data.draw(side, label="band_lower"),
        "band_upper": data.draw(side, label="band_upper"),
        "empty_rows": pick("empty_rows", "zero", "mean"),
        "softcap": pick("softcap", None, 3.0),
    }
    if side_padded := pick("key_padding", None, "left", "right", "holes", "empty"):
        options["key_padding"] = padding(sizes, side_padded)
    if batch := pick("bounds", 0, 1, sizes.batch):
        options["bounds"] = spans(sizes, batch)
    if pick("bias", False, True):
        options["bias"] = bias(sizes, *(d for d in range(4) if pick(f"bias dim {d}", False, True)), hide=True)
    if pick("sink", False, True):
        options["sink"] = torch.randn(sizes.heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE_ROWS", pick("TILE_ROWS", 4, 16))
        patch.setattr(cpu, "TILE_SCORES", pick("TILE_SCORES", 64, 2**20))
        patch.setattr(cpu, "WORTH_A_CALL", pick("WORTH_A_CALL", 0, 2**40))
        patch.setattr(cpu, "FEW_ROWS", pick("FEW_ROWS", 1, 16))
        patch.setattr(cpu, "GROUPED_HEADS", pick("GROUPED_HEADS", False, cpu.GROUPED_HEADS))
        assert_equal(sizes, pick("dtype", torch.float32, torch.float64), options)
        assert_gradients(sizes, torch.float64, options, "cpu")


@pytest.mark.parametrize("name", ["full", "causal", "window", "causal, padding left", "softcap", "bias (1, 2, 3)"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_strides(name: str, implementation: str) -> None:
    sizes = Sizes()
    query, key, value = operands(sizes, torch.float32)
    options = {"scale": 0.25, **ALL[name](sizes)}
    want = expected(query, key, value, **options)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        strided = [layout(t) for t in (query, key, value)]
        assert not any(t.is_contiguous() for t in strided)
        assert relative_error(IMPLEMENTATIONS[implementation](*strided, **options), want) <= TOLERANCES[torch.float32]


def test_operands_of_stride_zero() -> None:
    query, key, value = operands(Sizes(), torch.float32)
    key, value = key[:1, :1, :1].expand_as(key), value[:1, :, :1].expand_as(value)
    for options in ({}, {"band_upper": 3}, {"softcap": 2.0}):
        out = flash_fwd(query, key, value, scale=0.25, **options)
        assert relative_error(out, expected(query, key, value, scale=0.25, **options)) <= TOLERANCES[torch.float32]


def _hidden_key(options: dict[str, Any], sizes: Sizes) -> Tensor:
    """Bool [batch, 1, q_len, kv_len]: the keys that band, bounds and key padding hide."""
    j, i = torch.arange(sizes.kv_len), torch.arange(sizes.q_len)[:, None]
    hidden = torch.zeros(sizes.batch, 1, sizes.q_len, sizes.kv_len, dtype=torch.bool)
    hidden |= j > i + options.get("band_upper", sizes.kv_len)
    if "key_padding" in options:
        hidden |= ~options["key_padding"][:, None, None]
    if "bounds" in options:
        hidden |= (j >= options["bounds"][:, None, :, 1:]) | (j < options["bounds"][:, None, :, :1])
    return hidden


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("empty_rows", ["zero", "mean"])
@pytest.mark.parametrize("length", [40, 600])
def test_what_a_mask_hides_may_be_no_number(length: int, empty_rows: str, softcap: float | None, number: float) -> None:
    """A key or a bias behind band, bounds or padding changes nothing, whatever it holds."""
    sizes = Sizes(q_len=length, kv_len=length)
    query, key, value = operands(sizes, torch.float32)
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[0, :3] = padding[1, 7] = False
    ends = torch.arange(length).clamp(max=length - 9)
    masks: tuple[dict[str, Any], ...] = (
        {"band_upper": -1},
        {"key_padding": padding},
        {"key_padding": padding, "band_upper": 0},
        {"bounds": torch.stack([ends // 2, ends], -1)[None]},
    )
    for mask in masks:
        options = {"scale": 0.25, "softcap": softcap, "empty_rows": empty_rows, **mask}
        hidden = _hidden_key(mask, sizes)
        bias = torch.randn(hidden.shape)
        want = flash_fwd(query, key, value, bias=bias, **options)
        new = flash_fwd(query, key, value, bias=bias.masked_fill(hidden, number), **options)
        assert relative_error(new, want) <= TOLERANCES[torch.float32]
        never = hidden.all(2)  # for all rows
        want = flash_fwd(query, key, value, **options)
        new = flash_fwd(query, key.masked_fill(never[..., None], number), value, **options)
        assert never.any() and relative_error(new, want) <= TOLERANCES[torch.float32]


STEPS: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "all": ([[0, 40], [0, 40]], {}),
    "the first keys": ([[0, 9], [0, 9]], {}),
    "some keys": ([[5, 9], [5, 9]], {}),
    "beyond both ends": ([[-7, 90], [-7, 90]], {}),
    "no keys": ([[9, 9], [9, 9]], {}),
    "no keys, mean": ([[9, 3], [9, 3]], {"empty_rows": "mean"}),
    "one element sees more": ([[5, 9], [5, 10]], {}),
    "one element sees none": ([[5, 9], [9, 5]], {"empty_rows": "mean"}),
    "a sink": ([[5, 9], [5, 9]], {"sink": torch.randn(6)}),
    "a softcap": ([[5, 9], [5, 9]], {"softcap": 2.0}),
    "a band": ([[5, 9], [5, 9]], {"band_upper": 6}),
    "the other side of a band": ([[5, 9], [5, 9]], {"band_lower": 6}),
    "a bias": ([[5, 9], [5, 9]], {"bias": torch.randn(1, 6, 1, 40)}),
}
"""Of each batch element, the keys that the one row sees by its bounds. And other terms."""
HIDDEN: dict[str, list[tuple[int, int]]] = {
    "nothing": [],
    "the first key": [(0, 5), (1, 5)],
    "the last key": [(0, 8), (1, 8)],
    "a key between, of one element": [(1, 7)],
    "all keys of one element": [(1, i) for i in range(40)],
    "only keys that the bounds hide": [(0, 4), (1, 9), (1, 39)],
}
"""The batch element and the number of each key that the padding hides."""


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_generation(step: str, hidden: str, rows: int) -> None:
    """Few rows, of which all or not all see the same keys. A key that is hidden from all may be no number."""
    bounds, options = STEPS[step]
    sizes = Sizes(q_len=rows, kv_len=40)
    query, key, value = operands(sizes, torch.float32)
    padding = torch.ones(2, 40, dtype=torch.bool)
    for place in HIDDEN[hidden]:
        padding[place] = False
    masks = {"key_padding": padding, "bounds": torch.tensor(bounds)[:, None].repeat(1, rows, 1)}
    options = {"scale": 0.25, **masks, **options}
    want = expected(query, key, value, **options)
    never = _hidden_key(options, sizes).all(2)[..., None]
    key = key.masked_fill(never, float("nan"))
    assert relative_error(flash_fwd(query, key, value, **options), want) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("strategy", ["SHARDED_KERNEL", "SLIDING_WINDOW_KERNEL"])
def test_hints_change_no_number(strategy: str) -> None:
    qkv = operands(Sizes(), torch.float32)
    assert torch.equal(flash_fwd(*qkv, scale=0.25, strategy=strategy, lnc=2), flash_fwd(*qkv, scale=0.25))


def assert_gradients(sizes: Sizes, dtype: torch.dtype, options: dict[str, Any], implementation: str) -> None:
    options = {"scale": sizes.head_dim**-0.5, **options}
    query, key, value = operands(sizes, dtype, 1.0)
    inputs = {"query": query, "key": key, "value": value}
    inputs |= {name: options[name] for name in ("bias", "sink") if name in options}
    exact = {name: t.double().clone().requires_grad_() for name, t in inputs.items()}
    out = expected(**{**options, **exact})
    grad = torch.randn(out.shape).to(dtype)
    wanted = torch.autograd.grad(out, list(exact.values()), grad.double(), allow_unused=True)
    grads = BACKWARDS[implementation](grad, query, key, value, **options, bias_grad=True)
    got = dict(zip(("query", "key", "value", "bias", "sink"), grads, strict=True))
    # All gradients on one scale: one that is zero but for rounding has no largest magnitude of its own.
    largest = max(float(w.abs().max()) for w in wanted if w is not None)
    for (name, tensor), want in zip(inputs.items(), wanted, strict=True):
        assert got[name].shape == tensor.shape and got[name].dtype == tensor.dtype
        if want is not None:
            error = float((got[name].double() - want).abs().max()) / max(largest, 1e-6)
            assert error <= 2 * max(TOLERANCES[dtype], TOLERANCES[tensor.dtype]), (name, error)


@pytest.mark.parametrize("implementation", BACKWARDS)
@pytest.mark.parametrize("name", ALL)
def test_gradients(name: str, implementation: str) -> None:
    sizes = Sizes(q_len=40, kv_len=48, v_head_dim=24)
    assert_gradients(sizes, torch.float32, ALL[name](sizes), implementation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_small_dtypes(dtype: torch.dtype) -> None:
    for name in ("causal", "bias (1, 2, 3)", "sink, window", "softcap"):
        assert_gradients(Sizes(q_len=40, kv_len=48), dtype, ALL[name](Sizes(q_len=40, kv_len=48)), "cpu")


def test_gradcheck() -> None:
    sizes = Sizes(batch=2, heads=4, kv_heads=2, q_len=5, kv_len=6, head_dim=3, v_head_dim=2)
    qkv = [t.double().requires_grad_() for t in operands(sizes, torch.float32, 1.0)]
    extra = [bias(sizes, 1, 3).double().requires_grad_(), torch.randn(4).double().requires_grad_()]

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
        options = {"key_padding": padding(sizes, "right"), "softcap": 2.0, "empty_rows": "mean"}
        return flash_fwd(query, key, value, scale=0.7, bias=bias, sink=sink, band_upper=-1, **options)

    assert torch.autograd.gradcheck(run, [*qkv, *extra])


@pytest.mark.parametrize("wanted", ["query", "key", "value", "bias", "sink"])
def test_only_the_gradients_asked_for(wanted: str) -> None:
    sizes = Sizes(q_len=20, kv_len=20)
    inputs = dict(zip(("query", "key", "value"), operands(sizes, torch.float32), strict=True))
    inputs |= {"bias": bias(sizes, 1, 2, 3), "sink": torch.randn(6)}
    inputs[wanted].requires_grad_()
    out = flash_fwd(*list(inputs.values())[:3], scale=0.25, bias=inputs["bias"], sink=inputs["sink"])
    out.sum().backward()
    assert [name for name, t in inputs.items() if t.grad is not None] == [wanted]
    assert not flash_fwd(*(t.detach() for t in list(inputs.values())[:3]), scale=0.25).requires_grad


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
        return torch.ops.neuron_attn.flash_fwd(query, key, value, bias=bias, sink=sink, scale=0.25, **self.options) + 1


def attention_inputs(**sizes: int) -> tuple[Tensor, ...]:
    s = Sizes(**{"q_len": 20, "kv_len": 30, **sizes})
    return (*operands(s, torch.float32), bias(s, 1, 3), torch.randn(s.heads))


def test_opcheck() -> None:
    *qkv, extra, sink = (t.requires_grad_() for t in attention_inputs())
    pad = padding(Sizes(kv_len=30), "right")
    for options in (
        {},
        {"bias": extra, "sink": sink, "band_lower": -5, "band_upper": 3, "key_padding": pad, "softcap": 3.0},
        {"bounds": spans(Sizes(q_len=20, kv_len=30), 1), "empty_rows": "mean"},
    ):
        torch.library.opcheck(flash_fwd, tuple(qkv), {"scale": 0.25, **options})
        torch.library.opcheck(flash_fwd, tuple(t.detach() for t in qkv), {"scale": 0.25, **options})


def test_capture() -> None:
    """Every way to a graph keeps one node of the op, and its numbers."""
    model, example, fresh = Attention(band_upper=10, softcap=5.0), attention_inputs(), attention_inputs()
    want = model(*fresh)
    exported = torch.export.export(model, example, strict=False)
    assert flash_fwd in [n.target for n in exported.graph.nodes]
    traced = torch.fx.symbolic_trace(model)
    scripted = torch.jit.trace(model, example)
    assert "neuron_attn::flash_fwd" in str(scripted.graph)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run in (exported.module(), copy.deepcopy(exported.module()), traced, copy.deepcopy(traced), scripted, compiled):
        assert torch.equal(run(*fresh), want)


def test_symbolic_lengths() -> None:
    q, k = torch.export.Dim("q"), torch.export.Dim("k")
    shapes = ({2: q}, {2: k}, {2: k}, {3: k}, None)
    model = Attention(band_upper=3)
    exported = torch.export.export(model, attention_inputs(), dynamic_shapes=shapes, strict=False).module()
    longer = attention_inputs(q_len=33, kv_len=47)
    assert torch.equal(exported(*longer), model(*longer))


def test_training_when_compiled() -> None:
    grads = []
    for run in (Attention(band_upper=3), torch.compile(Attention(band_upper=3), backend="aot_eager")):
        torch.manual_seed(0)
        inputs = [t.requires_grad_() for t in attention_inputs()]
        run(*inputs).square().sum().backward()
        grads.append([t.grad for t in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_leaves_operands_alone() -> None:
    query, key, value = operands(Sizes(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_fwd(query, key, value, scale=0.25)
    assert torch.equal(out, flash_fwd(query, key, value, scale=0.25))


QUERY, KEY, VALUE = operands(Sizes(), torch.float32)
WRONG: dict[str, dict[str, Any]] = {
    "query: 3 dims": {"query": QUERY[0]},
    "query: int": {"query": QUERY.int()},
    "query: no head_dim": {"query": QUERY[..., :0], "key": KEY[..., :0]},
    "key: 3 dims": {"key": KEY[0]},
    "key: dtype": {"key": KEY.double()},
    "key: batch": {"key": KEY[:1]},
    "key: heads": {"key": torch.cat([KEY, KEY], 1)},
    "key: head_dim": {"key": KEY[..., 1:]},
    "value: dtype": {"value": VALUE.half()},
    "value: length": {"value": VALUE[:, :, 1:]},
    "value: heads": {"value": VALUE[:, :1]},
    "value: device": {"value": VALUE.to("meta")},
    "key_padding: dtype": {"key_padding": torch.ones(2, 200)},
    "key_padding: shape": {"key_padding": torch.ones(2, 129, dtype=torch.bool)},
    "key_padding: one key": {"key_padding": torch.ones(2, 1, dtype=torch.bool)},
    "bounds: dtype": {"bounds": torch.zeros(1, 129, 2)},
    "bounds: shape": {"bounds": torch.zeros(129, 2, dtype=torch.int32)},
    "bias: dtype": {"bias": torch.zeros(1, 1, 129, 200, dtype=torch.bool)},
    "bias: 3 dims": {"bias": torch.zeros(1, 129, 200)},
    "bias: shape": {"bias": torch.zeros(1, 2, 129, 200)},
    "sink: shape": {"sink": torch.zeros(1)},
    "sink: dtype": {"sink": torch.zeros(6, dtype=torch.int32)},
    "scale": {"scale": float("nan")},
    "softcap": {"softcap": 0.0},
    "empty_rows": {"empty_rows": "nan"},
    "strategy": {"strategy": "NONE"},
    "lnc": {"lnc": 3},
}


@pytest.mark.parametrize("case", WRONG)
def test_input_errors(case: str) -> None:
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "scale": 0.25, **WRONG[case]}
    name = case.split(":")[0]
    with pytest.raises(InputError, match=f"flash_fwd: {name} must"):
        flash_fwd(**arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(InputError, match=f"flash_fwd: {name} must"):
        flash_fwd(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})


def test_input_error_from_export() -> None:
    query, key, value, extra, sink = attention_inputs()
    with pytest.raises(InputError, match="sink"):
        torch.export.export(Attention(), (query, key, value, extra, sink[:2]), strict=False)


MEMORY = """
import resource, torch
from neuron_attn_rewrite.ops import definitions
query, key, value = torch.randn(3, 1, 1, 16384, 8).unbind(0)
run = torch.ops.neuron_attn.flash_fwd.default
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
run(query[:, :, :64], key[:, :, :64], value[:, :, :64], scale=1.0)
before = peak()
run(query, key, value, scale=1.0, band_upper=0)
run(query, key, value, scale=1.0, band_upper=-1, empty_rows="mean")
run(query, key, value, scale=1.0, band_upper=1, sink=torch.zeros(1))
run(query, key, value, scale=1.0, band_upper=0, softcap=2.0)
run(query.requires_grad_(), key, value, scale=1.0, band_lower=-2000, band_upper=0).sum().backward()
print(peak() - before)
"""


def test_memory_is_linear() -> None:
    """All scores of 16384 rows would be 1 GB in float32, 256 MB as bool."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


XLA_OPTIONS = ("full", "causal, padding left, mean", "spans, mean", "bias (1, 3)", "sink, softcap, bias")
ON_XLA = """
import runpy, sys, torch_xla
module = runpy.run_path(sys.argv[1])
for name in module["XLA_OPTIONS"]:
    module["check_on_xla"](name)
"""


def check_on_xla(name: str) -> None:
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as metrics

    sizes, device = Sizes(q_len=20, kv_len=24), xm.xla_device()
    options = {"scale": 0.25, **ALL[name](sizes)}
    on_xla = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    here = [t.requires_grad_() for t in operands(sizes, torch.float32)]
    there = [t.detach().to(device).requires_grad_() for t in here]
    metrics.clear_all()
    out = flash_fwd(*there, **on_xla)
    out.sum().backward()
    xm.mark_step()
    counters = metrics.counter_names()
    assert not [c for c in counters if c.startswith(("neuron_attn::", "aten::"))], counters
    assert relative_error(out.detach().cpu(), expected(*here, **options).detach()) <= TOLERANCES[torch.float32]
    flash_fwd(*here, **options).sum().backward()
    for a, b in zip(there, here, strict=True):
        assert relative_error(a.grad.cpu(), b.grad.double()) <= 1e-4


def test_xla_decomposes() -> None:
    """On XLA devices the op becomes plain operators: no fallback to the CPU."""
    if importlib.util.find_spec("torch_xla") is None:
        pytest.skip("torch_xla is not installed")
    environment = {**os.environ, "PJRT_DEVICE": "CPU"}
    command = [sys.executable, "-c", ON_XLA, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
