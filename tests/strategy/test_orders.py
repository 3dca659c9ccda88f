"""Operands in other orders: the same numbers, and transposes that are gone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from neuron_attn_rewrite import RewriteConfig, RewrittenModule, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.graph.nodes import PERMUTES, op_name
from neuron_attn_rewrite.kernels import reference, vendor
from neuron_attn_rewrite.kernels.nki.prepare import ACCEPTED
from neuron_attn_rewrite.kernels.orders import AS_GIVEN, ORDERS, PLAIN, Orders, plain_shape, turned
from neuron_attn_rewrite.kernels.vendor.adapter import How
from neuron_attn_rewrite.ops.arguments import checked_terms
from neuron_attn_rewrite.ops.simulated import simulated
from tests import stand_ins
from tests.helpers import ALWAYS, Function, check, kernel_calls, relative_error
from tests.models import FAMILIES

FLASH = torch.ops.neuron_attn.flash_fwd
FAMILY = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize(("a", "b", "c"), list(itertools.product(ORDERS, repeat=3)))
def test_turning_twice_is_turning_once(a: str, b: str, c: str) -> None:
    plain = torch.randn(2, 3, 5, 7)
    given = turned(plain, PLAIN, a)
    assert torch.equal(turned(turned(given, a, b), b, c), turned(given, a, c))
    assert plain_shape(turned(given, a, b), b) == (2, 3, 5, 7) and turned(given, a, a) is given
    assert Orders.read(str(Orders(a, b, c, a))) == Orders(a, b, c, a)


def inputs(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, q_len: int = 40, kv_len: int = 56, v_dim: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    query, key = 2 * torch.randn(batch, heads, q_len, 8), 2 * torch.randn(batch, kv_heads, kv_len, 8)
    return query, key, torch.randn(batch, kv_heads, kv_len, v_dim)


def lying(operands: tuple[Tensor, Tensor, Tensor], orders: Orders) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t.contiguous() for t in AS_GIVEN.to(orders, *operands))
    return q, k, v


@pytest.mark.parametrize("orders", [Orders(*names) for names in itertools.product(ORDERS, repeat=4)][::4])
def test_the_op_computes_the_same_in_every_order(orders: Orders) -> None:
    operands = inputs()
    options: dict[str, Any] = {"scale": 0.3, "band_upper": 16, "sink": torch.randn(4)}
    expected = turned(FLASH(*operands, **options), PLAIN, orders.result)
    given = [t.detach().clone().requires_grad_() for t in lying(operands, orders)]
    actual = FLASH(*given, **options, orders=str(orders))
    assert actual.is_contiguous() and torch.equal(actual, expected)
    fakes = [t.to("meta") for t in given]
    empty = FLASH(*fakes, **{**options, "sink": fakes[0].new_empty(4)}, orders=str(orders))
    assert (empty.shape, empty.stride()) == (actual.shape, actual.stride())
    grad = torch.randn_like(actual)
    plain = [t.detach().clone().requires_grad_() for t in operands]
    FLASH(*plain, **options).backward(turned(grad, orders.result, PLAIN))
    actual.backward(grad)
    for name, a, b in zip(("query", "key", "value"), given, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(turned(a.grad, getattr(orders, name), PLAIN), b.grad)


@pytest.mark.parametrize("text", ["BHSD", "BHSD,BHSD,BHSD", "BHSD,BHSD,BHSD,SBHD", ""])
def test_no_such_order(text: str) -> None:
    with pytest.raises(InputError, match="orders must be four of BHSD, BSHD, BHDS"):
        FLASH(*inputs(), scale=1.0, orders=text)


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "orders"),
    [
        ({}, "BSHD,BSHD,BSHD,BSHD"),
        ({"kv_len": 300}, "BHSD,BSHD,BHSD,BSHD"),
        ({"q_len": 150, "kv_heads": 1}, "BSHD,BHSD,BSHD,BHSD"),
        ({"q_len": 3}, "BSHD,BSHD,BSHD,BSHD"),
        ({"q_len": 150}, "BHDS,BSHD,BHDS,BHDS"),
    ],
)
def test_our_kernel_in_other_orders(sizes: dict[str, int], orders: str, dtype: torch.dtype, lnc: int) -> None:
    operands = tuple(t.to(dtype) for t in inputs(**sizes))
    bounds = torch.tensor([[0, 0], [3, 9]]).repeat(operands[0].shape[2], 1)[None, : operands[0].shape[2]]
    options: dict[str, Any] = {"scale": 0.3, "bounds": bounds, "empty_rows": "mean"}
    terms = checked_terms(*operands, **options)
    expected = reference.attention(*operands, terms)
    found = Orders.read(orders)
    with simulated("gen3"):
        actual = FLASH(*lying(operands, found), **options, lnc=lnc, orders=orders)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert relative_error(turned(actual, found.result, PLAIN), expected) < tolerance


@pytest.mark.parametrize("name", vendor.ADAPTERS)
def test_adapters_in_other_orders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = stand_ins.install(monkeypatch)
    adapter = vendor.ADAPTERS[name].resolve()
    assert adapter is not None
    few = name == "attention_tkg"
    operands = inputs(1, 2, 2, q_len=3 if few else 512, kv_len=512, v_dim=8)
    options: dict[str, Any] = {"scale": 1.0} if few else {"scale": 1.0, "band_upper": 0}
    options |= {"band_lower": -40} if name == "sliding_window_flash_fwd" else {}
    terms = checked_terms(*operands, **options)
    expected = reference.attention(*operands, terms)
    liked = Orders(*(orders[-1] for orders in astuple(adapter.accepts)))
    for orders in (*(Orders(o, o, o, o) for o in ORDERS), liked):
        given = lying(operands, orders)
        out = adapter.attend(*given, terms, How(1, orders=orders))
        assert out.is_contiguous()
        torch.testing.assert_close(turned(out, orders.result, PLAIN), expected, rtol=0, atol=1e-4)
    if not few:
        # What lies as the kernel takes it is handed on as it is.
        passed = kernels[name].calls[-1][1]
        taken = {"attention_segmented_cte": ("q", "k_cache", "v_cache")}.get(name, ("q", "k", "v"))
        assert [passed[n].data_ptr() for n in taken] == [t.data_ptr() for t in given]


def test_the_flags_of_attention_cte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with everything else that the adapter does to its operands."""
    kernel = stand_ins.install(monkeypatch)["attention_cte"]
    adapter = vendor.ADAPTERS["attention_cte"].resolve()
    assert adapter is not None
    operands = inputs(q_len=40, kv_len=56)
    for options in (
        {"scale": 0.3, "band_upper": 16, "sink": torch.randn(4)},
        {"scale": 0.3, "key_padding": torch.rand(2, 56) > 0.3, "bias": torch.randn(1, 4, 40, 56)},
        {"scale": 0.3, "band_lower": -3, "band_upper": 9},
    ):
        terms = checked_terms(*operands, **options)
        expected = reference.attention(*operands, terms)
        for orders in (Orders(*names) for names in itertools.product((PLAIN, "BHDS"), repeat=4)):
            out = adapter.attend(*lying(operands, orders), terms, How(1, orders=orders))
            torch.testing.assert_close(turned(out, orders.result, PLAIN), expected, rtol=0, atol=1e-4)
            passed = kernel.calls[-1][1]
            flags = (orders.query == PLAIN, orders.key == PLAIN, orders.result != PLAIN)
            assert (passed["tp_q"], passed["tp_k"], passed["tp_out"]) == flags


# In models


def transposes(graph: fx.Graph) -> int:
    """Of tensors with heads: rotary embeddings have some of their own."""
    return sum(op_name(node) in PERMUTES and node.meta["val"].dim() == 4 for node in graph.nodes)


@pytest.mark.parametrize(
    ("name", "implementation", "saved", "left"),
    [
        # What rotates query and key by position stays between them and their transposes.
        ("llama", "eager", 6, 4),
        ("llama", "sdpa", 4, 4),
        ("bert", "eager", 10, 0),
        ("bert", "sdpa", 8, 0),
    ],
)
def test_transposes_of_a_model_are_gone(name: str, implementation: str, saved: int, left: int) -> None:
    family = FAMILY[name]
    model, call = family.build(implementation), family.call("ones")
    rewritten = rewrite(model, (), call, config=ALWAYS)
    assert sum(site.transposes_saved for site in rewritten.report.sites) == saved
    assert transposes(rewritten.graph) == left
    assert f"{saved} transposes fewer" in str(rewritten.report)
    fresh = family.call("ones")
    with torch.no_grad():
        old, new = (m(**fresh)[0] for m in (model, rewritten))
    assert relative_error(new, old) < TOLERANCES[torch.float32]


def orders_of(rewritten: RewrittenModule) -> str | None:
    (call,) = kernel_calls(rewritten)
    given: str | None = call.kwargs.get("orders")  # type: ignore[assignment]
    return given


def heads(x: Tensor) -> Tensor:
    return x.view(2, 10, 4, 8).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(2, 10, 32)


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str | None, int]] = {
    "all four": (
        lambda x, y: joined(scaled_dot_product_attention(heads(x), heads(y), heads(x + y))),
        "BSHD,BSHD,BSHD,BSHD",
        0,
    ),
    "a key that is also read as it is": (
        lambda x, y: (joined(scaled_dot_product_attention(heads(x), k := heads(y), heads(x + y))), k * 2),
        "BSHD,BHSD,BSHD,BSHD",
        1,
    ),
    "an output that is also read as it is": (
        lambda x, y: (joined(o := scaled_dot_product_attention(heads(x), heads(y), heads(x + y))), o.relu()),
        "BSHD,BSHD,BSHD,BHSD",
        1,
    ),
    "something is done before the transpose": (
        lambda x, y: joined(scaled_dot_product_attention(heads(x), heads(y).sin(), heads(x + y)).relu()),
        "BSHD,BHSD,BSHD,BHSD",
        2,
    ),
    "scales of rows and of heads": (
        lambda x, y: joined(
            (((heads(x) @ heads(y).mT) * x[:, None, :, :1]).softmax(-1) * y[0, :4, None, :1]) @ heads(x + y)
        ),
        "BSHD,BSHD,BSHD,BSHD",
        0,
    ),
    "a cast": (
        lambda x, y: joined(scaled_dot_product_attention(heads(x), heads(y), heads(x + y)).to(torch.float64)),
        "BSHD,BSHD,BSHD,BHSD",
        1,
    ),
    "as the op has it": (
        lambda x, y: scaled_dot_product_attention(x.view(2, 4, 10, 8), y.view(2, 4, 10, 8), (x + y).view(2, 4, 10, 8)),
        None,
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_which_transposes_vanish(case: str) -> None:
    function, orders, left = CASES[case]
    rewritten = check(Function(function), lambda: (2 * torch.randn(2, 10, 32), 2 * torch.randn(2, 10, 32)), replaced=1)
    assert (orders_of(rewritten), transposes(rewritten.graph)) == (orders, left), rewritten.graph


def test_undefined_rows_are_found_in_the_order_of_the_result() -> None:
    """Rows past a sequence's length are not compared, also where the call replaces the transpose behind the output."""

    class Padded(torch.nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            seen = torch.ones(10, 10, dtype=torch.bool).tril() & attention_mask[:, None, None].bool()
            q = heads(x)
            return scaled_dot_product_attention(q, q, q, seen).transpose(1, 2).reshape(2, 10, 32)

    padding = (torch.arange(10) < torch.tensor([[10], [6]])).long()
    rewritten = rewrite(
        Padded(), (torch.randn(2, 10, 32), padding), config=RewriteConfig(policy="always", padding="right")
    )
    assert len(rewritten.report.replaced) == 1 and transposes(rewritten.graph) == 0, str(rewritten.report)


def test_a_kernel_that_wants_the_keys_transposed_gets_them_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)

    def attend(x: Tensor, key: Tensor) -> Tensor:
        return (heads(x) @ key).softmax(-1) @ heads(x)

    config = RewriteConfig(policy="always", kernels=("attention_cte",), tolerances={torch.float32: 0.016})
    rewritten = check(
        Function(attend), lambda: (torch.randn(2, 10, 32), torch.randn(2, 4, 8, 10)), replaced=1, config=config
    )
    assert orders_of(rewritten) == "BHSD,BHDS,BHSD,BHSD"


def test_nothing_is_read_across_a_write() -> None:
    """The transposed cache is of the time before the write: what is written later must not be seen."""

    class Cache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(2, 10, 32))

        def forward(self, x: Tensor) -> Tensor:
            cache: Any = self.cache
            key = heads(cache).contiguous() + 0
            cache.copy_(x)
            out = scaled_dot_product_attention(heads(x), key, heads(cache))
            cache.mul_(2)
            return joined(out)

    model = Cache()
    rewritten = rewrite(model, (torch.randn(2, 10, 32),), config=ALWAYS)
    assert len(rewritten.report.replaced) == 1
    other = Cache()
    for _ in range(2):
        x = 2 * torch.randn(2, 10, 32)
        with torch.no_grad():
            assert relative_error(rewritten(x), other(x)) < 1e-5


def test_accepted() -> None:
    assert ACCEPTED.nearest(Orders("BHDS", "BSHD", "BHSD", "BHDS")) == Orders("BHSD", "BSHD", "BHSD", "BHSD")


@pytest.mark.parametrize(("name", "left"), [("llama", 4), ("bert", 0)])
def test_transposes_of_the_lowered_graph_are_gone(name: str, left: int) -> None:
    """In HLO, where a kernel is one custom call: those of heads, [batch, length, heads, dim] either way."""
    pytest.importorskip("torch_xla")
    from neuron_attn_rewrite.backends.trace import lowered_hlo, rewrite_for_trace

    family = FAMILY[name]
    model, call = family.build("sdpa"), family.call("ones")
    rewritten = rewrite_for_trace(model, call, ALWAYS)
    assert lowered_hlo(rewritten, tuple(call.values())).count("dimensions={0,2,1,3}") == left
