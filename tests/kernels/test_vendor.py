"""The SDK's kernels: what an adapter passes, checked by stand-ins that compute what the documentation says."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.errors import InputError, KernelError, RewriteWarning
from neuron_attn_rewrite.kernels import reference, vendor
from neuron_attn_rewrite.kernels.schedule import make_schedule
from neuron_attn_rewrite.kernels.vendor import nkilib
from neuron_attn_rewrite.kernels.vendor.adapter import How
from neuron_attn_rewrite.kernels.vendor.layouts import Mask
from neuron_attn_rewrite.ops import flash_fwd as flash_fwd_ops
from neuron_attn_rewrite.ops import launch
from neuron_attn_rewrite.ops.arguments import checked_terms
from neuron_attn_rewrite.ops.prior import FlashPrior
from neuron_attn_rewrite.simulator import active, run
from tests import stand_ins
from tests.helpers import Function, kernel_calls
from tests.ops.test_cached import Batch, Cache, fields

CHECKOUT = os.environ.get("NKI_LIBRARY", "")
SHAPE = {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 512, "kv_len": 512, "dim": 32, "v_dim": 32}


def operands(**sizes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s = SHAPE | sizes
    query = 2 * torch.randn(s["batch"], s["heads"], s["q_len"], s["dim"])
    key = 2 * torch.randn(s["batch"], s["kv_heads"], s["kv_len"], s["dim"])
    return query, key, torch.randn(s["batch"], s["kv_heads"], s["kv_len"], s["v_dim"])


def check(name: str, lnc: int, sizes: dict[str, int], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    query, key, value = operands(**sizes)
    terms = checked_terms(query, key, value, **options)
    adapter = vendor.find(name)
    assert adapter is not None
    actual = adapter.attend(query, key, value, terms, How(lnc))
    expected = reference.attention(query, key, value, terms)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


ROWS = torch.tensor([[i // 100 * 100, i + 1] for i in range(300)])[None]
PADDING = torch.arange(300) < torch.tensor([[300], [170]])
CTE: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({}, {"scale": 0.3}),
    ({"q_len": 100, "kv_len": 300}, {"scale": 0.3}),
    ({"q_len": 300, "kv_len": 300}, {"scale": 0.3, "band_upper": 0}),
    ({"q_len": 100, "kv_len": 300}, {"scale": 0.3, "band_upper": 0}),
    ({"q_len": 300, "kv_len": 100}, {"scale": 0.3, "band_upper": 0}),
    ({"q_len": 300, "kv_len": 300}, {"scale": 0.3, "band_upper": 0, "band_lower": -16}),
    ({"q_len": 100, "kv_len": 300}, {"scale": 0.3, "band_upper": 200}),
    ({"q_len": 100, "kv_len": 300}, {"scale": 0.3, "band_upper": 130}),
    ({"q_len": 100, "kv_len": 300}, {"scale": 0.3, "band_upper": 200, "band_lower": 180}),
    ({"q_len": 1, "kv_len": 300}, {"scale": 0.3, "band_upper": 299}),
    ({"q_len": 300, "kv_len": 300}, {"scale": 0.3, "band_lower": -20, "band_upper": 20}),
    ({"q_len": 300, "kv_len": 300}, {"scale": 0.3, "bounds": ROWS}),
    ({"q_len": 300, "kv_len": 300}, {"scale": 0.3, "band_upper": 0, "bounds": ROWS + torch.tensor([0, 50])}),
    ({"q_len": 300, "kv_len": 300}, {"scale": 0.3, "band_upper": 0, "key_padding": PADDING}),
    ({"q_len": 64, "kv_len": 300}, {"scale": 0.3, "key_padding": PADDING, "sink": torch.randn(4)}),
    ({"q_len": 300, "kv_len": 300}, {"scale": 0.3, "band_upper": 0, "band_lower": -40, "sink": torch.randn(4)}),
    ({"v_dim": 16}, {"scale": 0.3, "band_upper": 0}),
    ({"v_dim": 48}, {"scale": 0.3, "band_upper": 0}),
]
BIASED: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"q_len": 300, "kv_len": 300}, {"scale": 0.3, "bias": torch.randn(1, 4, 300, 300)}),
    ({"q_len": 300, "kv_len": 200}, {"scale": 0.3, "band_upper": 0, "bias": torch.randn(2, 1, 1, 200)}),
    (
        {"q_len": 256, "kv_len": 256},
        {"scale": 0.3, "bias": torch.zeros(1, 1, 256, 256).masked_fill(torch.rand(256, 256) > 0.5, -torch.inf)},
    ),
    ({"q_len": 300, "kv_len": 300}, {"scale": 0.3, "bias": torch.randn(1, 4, 300, 300), "bounds": ROWS}),
]


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("case", range(len(CTE + BIASED)))
def test_attention_cte(case: int, lnc: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch)["attention_cte"]
    check("attention_cte", lnc, *(CTE + BIASED)[case])
    assert [grid for grid, _ in kernel.calls] == [lnc]


@pytest.mark.parametrize("case", range(len(CTE)))
def test_attention_cte_of_2_29(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch, stand_ins.attention_cte_2_29)
    check("attention_cte", 2, *CTE[case])


def test_attention_cte_takes_grouped_heads_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch)["attention_cte"]
    check("attention_cte", 2, {}, {"scale": 0.3, "band_upper": 0})
    ((_, arguments),) = kernel.calls
    assert (arguments["q"].shape, arguments["k"].shape) == ((8, 512, 32), (4, 512, 32))
    assert arguments["causal_mask"] is True and "bound_min" not in arguments and "k_prior" not in arguments


def of_a_rank(rank: int, degree: int, q_len: int, heads: int = 4) -> tuple[dict[str, int], dict[str, Any]]:
    """What one rank of strided context parallel attention computes."""
    ends = torch.arange(q_len) * degree + rank + 1
    bounds = torch.stack([torch.zeros_like(ends), ends], 1)[None]
    return {"q_len": q_len, "kv_len": q_len * degree, "heads": heads}, {"scale": 0.3, "bounds": bounds}


@pytest.mark.parametrize(("rank", "degree"), [(0, 2), (3, 4), (2, 4)])
@pytest.mark.parametrize("more", [{}, {"sink": torch.randn(4)}, {"key_padding": torch.arange(400)[None] % 7 < 5}])
def test_strided_rows_of_a_rank(rank: int, degree: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch, stand_ins.attention_cte_2_29)["attention_cte"]
    sizes, options = of_a_rank(rank, degree, 400 // degree)
    torch.manual_seed(0)
    query, key, value = operands(**sizes)
    terms = checked_terms(query, key, value, **options, **more)
    adapter = vendor.find("attention_cte")
    assert adapter is not None
    for strategy in (FlashAttentionStrategy.STRIDED_CONTEXT_PARALLEL_KERNEL, FlashAttentionStrategy.SHARDED_KERNEL):
        actual = adapter.attend(query, key, value, terms, How(2, strategy.name))
        expected = reference.attention(query, key, value, terms)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    (_, strided), (_, bounded) = kernel.calls
    assert (strided["global_cp_deg"], int(strided["cp_offset"])) == (degree, rank) and "bound_min" not in strided
    assert "global_cp_deg" not in bounded


SEGMENTED: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"q_len": 128, "kv_len": 384}, {"band_upper": 256}),
    ({"q_len": 256, "kv_len": 256}, {"band_upper": 0}),
    ({"q_len": 128, "kv_len": 300}, {"band_upper": 128}),
    ({"q_len": 128, "kv_len": 2304, "heads": 2, "kv_heads": 1}, {"band_upper": 2176}),
    ({"q_len": 256, "kv_len": 512}, {"band_upper": 256, "band_lower": 129}),
    ({"q_len": 256, "kv_len": 256}, {"band_upper": 0, "band_lower": -127, "sink": torch.randn(4)}),
    ({"q_len": 128, "kv_len": 256, "heads": 4, "kv_heads": 4}, {"band_upper": 128, "sink": torch.randn(4)}),
]


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("case", range(len(SEGMENTED)))
def test_attention_segmented_cte(case: int, lnc: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch)["attention_segmented_cte"]
    sizes, options = SEGMENTED[case]
    check("attention_segmented_cte", lnc, {"dim": 128, "v_dim": 128} | sizes, {"scale": 0.1} | options)
    assert [grid for grid, _ in kernel.calls] == [lnc]


def test_blocks_are_numbered_as_the_keys_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch)["attention_segmented_cte"]
    check(
        "attention_segmented_cte",
        1,
        {"q_len": 128, "kv_len": 384, "dim": 128, "v_dim": 128},
        {"scale": 1.0, "band_upper": 256},
    )
    ((_, arguments),) = kernel.calls
    assert arguments["block_tables"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize(
    ("earlier", "size"),
    [(0, 8192), (128, 512), (1024, 1024), (1536, 2048), (6144, 8192), (8192, 8192), (8704, 4096), (130048, 8192)],
)
def test_segments_are_neither_many_nor_mostly_empty(earlier: int, size: int) -> None:
    assert nkilib.segment(Mask("prior", None, earlier)) == size
    assert nkilib.segment(Mask("prior", 128, earlier)) == 8192


DECODE_PADDING = torch.arange(300) < torch.tensor([[300], [170]])
DECODE_PADDING[:, -1] = True
TKG: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"q_len": 1, "kv_len": 512}, {"scale": 0.3}),
    ({"q_len": 1, "kv_len": 300}, {"scale": 0.3, "band_upper": 299, "key_padding": DECODE_PADDING}),
    ({"q_len": 5, "kv_len": 300}, {"scale": 0.3, "band_upper": 295}),
    ({"q_len": 5, "kv_len": 300}, {"scale": 0.3, "band_upper": 295, "band_lower": 200}),
    ({"q_len": 3, "kv_len": 256, "kv_heads": 1}, {"scale": 0.3, "band_upper": 253, "sink": torch.randn(4)}),
]


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("case", range(len(TKG)))
def test_attention_tkg(case: int, lnc: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch)["attention_tkg"]
    check("attention_tkg", lnc, *TKG[case])
    assert [grid for grid, _ in kernel.calls] == [lnc]


@pytest.mark.parametrize(("lnc", "grid"), [(1, None), (2, (stand_ins.Cores(2),))])
@pytest.mark.parametrize("options", [{"scale": 0.3}, {"scale": 0.3, "band_upper": 0}])
def test_attention_isa_kernel(lnc: int, grid: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch)["attention_isa_kernel"]
    check("attention_isa_kernel", lnc, {}, options)
    assert [grid for grid, _ in kernel.calls] == [grid]


@pytest.mark.parametrize(("lnc", "grid"), [(1, (2, 2)), (2, (2, stand_ins.Cores(2, 1)))])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.3},
        {"scale": 0.3, "band_upper": 0},
        {"scale": 0.3, "band_upper": 0, "band_lower": -16},
        {"scale": 0.3, "band_upper": 0, "bias": torch.randn(1, 1, 512, 512)},
    ],
)
def test_neuronxcc_flash_fwd(lnc: int, grid: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch)["neuronxcc_flash_fwd"]
    check("neuronxcc_flash_fwd", lnc, {}, options)
    assert [grid for grid, _ in kernel.calls] == [grid]
    assert kernel.calls[0][1]["config"].seq_tile_size == 512


@pytest.mark.parametrize("window", [2, 17, 300])
def test_sliding_window_flash_fwd(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch)["sliding_window_flash_fwd"]
    check("sliding_window_flash_fwd", 1, {}, {"scale": 0.3, "band_upper": 0, "band_lower": 1 - window})
    assert [grid for grid, _ in kernel.calls] == [(2, 4)]


GRADIENTS: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({}, {"scale": 0.3}),
    ({"q_len": 128}, {"scale": -0.2}),
    ({}, {"scale": 0.3, "band_upper": 0}),
    ({}, {"scale": 0.3, "band_upper": 0, "band_lower": -16}),
    ({}, {"scale": 0.0}),
    ({}, {"scale": 0.3, "band_upper": 0, "band_lower": -16, "sink": torch.tensor([0.0, 2.0, -1.0, 4.0])}),
]


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("name", vendor.BACKWARD)
def test_gradients(name: str, lnc: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch)[name]
    for sizes, options in GRADIENTS if name == "attention_bwd" else GRADIENTS[:-1]:
        torch.manual_seed(0)
        query, key, value = operands(**{"batch": 1} | sizes)
        grad = torch.randn_like(query)
        terms = checked_terms(query, key, value, **options)
        adapter = vendor.BACKWARD[name].resolve()
        assert adapter is not None
        actual = adapter.call(grad, query, key, value, terms, lnc)
        expected = reference.attention_backward(grad, query, key, value, terms)
        for a, e in zip(actual, expected, strict=True):
            assert a.shape == e.shape
            torch.testing.assert_close(a, e, rtol=0, atol=5e-5 * float(e.abs().max()) if e.numel() else 0)
    grids = {"attention_bwd": lnc, "flash_attn_bwd": (1, 2) if lnc == 1 else (1, stand_ins.Cores(2, 1))}
    assert {grid for grid, _ in kernel.calls} == {grids[name]}


@pytest.mark.parametrize(
    ("platform", "sizes", "options", "kernel"),
    [
        ("trn2", {}, {"band_upper": 0}, "attention_bwd"),
        ("trn1", {}, {"band_upper": 0}, "flash_attn_bwd"),
        ("trn2", {"kv_len": 640}, {}, None),
        ("trn2", {}, {"bounds": torch.tensor([[[0, 9]] * 512])}, None),
        ("trn2", {}, {"band_upper": -1}, None),
    ],
)
def test_gradients_on_a_device(
    platform: str,
    sizes: dict[str, int],
    options: dict[str, Any],
    kernel: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(launch.PLATFORM, platform)
    query, key, value = (t.bfloat16() for t in operands(**{"batch": 1} | sizes))
    grad, options = torch.randn_like(query), {"scale": 0.3} | options
    expected = flash_fwd_ops.backward_decomposed(grad, query, key, value, **options)
    terms = checked_terms(query, key, value, **options)
    assert launch.backward(grad, query, key, value, terms, 1) is None
    kernels = stand_ins.install(monkeypatch)
    actual = flash_fwd_ops.backward_on_device(grad, query, key, value, **options)
    assert [name for name in vendor.BACKWARD if kernels[name].calls] == ([kernel] if kernel else [])
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        torch.testing.assert_close(a, e, rtol=0, atol=2e-2 * float(e.abs().max()) if e.numel() else 0)


PRIOR: list[tuple[str, dict[str, int], list[int], dict[str, Any]]] = [
    ("attention_cte", {"q_len": 100, "capacity": 300}, [170], {}),
    ("attention_cte", {"q_len": 64, "capacity": 512}, [0], {"sink": torch.linspace(-1, 2, 4)}),
    ("attention_cte", {"q_len": 130, "capacity": 200}, [200], {"window": 70}),
    ("attention_cte", {"q_len": 5, "capacity": 200, "v_head_dim": 8}, [50], {"window": 400}),
    ("attention_tkg", {"q_len": 1, "capacity": 300}, [170, 0], {}),
    ("attention_tkg", {"q_len": 7, "capacity": 256}, [256, 3], {"window": 20}),
    (
        "attention_tkg",
        {"q_len": 4, "capacity": 100},
        [60],
        {"prior_mask": torch.arange(100)[None] > 5, "new_mask": torch.tensor([[True] * 4, [True, False, True, True]])},
    ),
]


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize(("kernel", "sizes", "lengths", "options"), PRIOR)
def test_two_sources(
    kernel: str,
    sizes: dict[str, int],
    lengths: list[int],
    options: dict[str, Any],
    lnc: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = stand_ins.install(monkeypatch)[kernel]
    torch.manual_seed(0)
    tensors = Cache(**sizes).tensors(lengths)
    adapter = vendor.find(kernel)
    assert adapter is not None
    call = FlashPrior(*tensors, scale=0.3, lnc=lnc, kernel_name=kernel, **options)
    actual, expected = call.by(adapter), call.decomposed()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert len(recorded.calls) == 1
    with pytest.raises(InputError, match="one of flash_prior, attention_cte, attention_tkg, not 'flash'"):
        torch.ops.neuron_attn.flash_prior(*tensors, scale=0.3, kernel_name="flash")


@pytest.mark.parametrize(("kernel", "rows"), [("attention_cte", 256), ("attention_tkg", 4)])
def test_two_sources_of_a_model(kernel: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call reads the cache as it lies, by the kernel of the SDK that is asked for."""
    stand_ins.install(monkeypatch)

    def attention(q: torch.Tensor, *cached: torch.Tensor) -> torch.Tensor:
        k, v = (torch.cat(pair, 2) for pair in (cached[:2], cached[2:]))
        mask = torch.arange(k.shape[2]) <= torch.arange(rows)[:, None] + 384
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    q, *cached = (torch.randn(1, 4, n, 64).bfloat16() for n in (rows, 384, rows, 384, rows))
    module = rewrite(Function(attention), (q, *cached), config=RewriteConfig(policy="always", kernels=(kernel,)))
    (call,) = module.graph.find_nodes(op="call_function", target=torch.ops.neuron_attn.flash_prior.default)
    assert module.report.sites[0].kernel == call.kwargs["kernel_name"] == kernel
    assert not module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


PAGED = "flash_paged_attention_with_schedule"


@pytest.mark.parametrize(("block_size", "kv_tile"), [(32, 512), (2, 512), (4, 1024), (128, 512)])
def test_paged(block_size: int, kv_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = stand_ins.install(monkeypatch)[PAGED]
    torch.manual_seed(0)
    batch = Batch((150, 70, 1), (700, 0, 40), block_size=block_size)
    tensors, tables = batch.tensors(), batch.tables()
    schedule = make_schedule(
        batch.query_lens, batch.context_lens, tables, block_size, kv_tile=kv_tile, q_len=tensors[0].shape[2], tiles=9
    )
    operands = (*tensors, *fields(schedule))
    adapter = vendor.find(PAGED)
    assert adapter is not None
    actual = adapter.call(*operands, reference.Terms(0.2), 1)
    expected = torch.ops.neuron_attn.flash_paged(*operands, scale=0.2, kernel_name=PAGED)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert [grid for grid, _ in kernel.calls] == [(1, tensors[1].shape[1])]
    for terms, words in ((reference.Terms(0.2, softcap=1.0), "no softcap"), (reference.Terms(0.2), "multiple of 512")):
        few = (*operands[:7], operands[7][:, : 256 // block_size], *operands[8:])
        with pytest.raises(InputError, match=words):
            adapter.call(*(operands if terms.softcap else few), terms, 1)


def test_paged_kernels_have_names() -> None:
    batch = Batch((150,), (0,))
    schedule = make_schedule((150,), (0,), batch.tables(), 32)
    with pytest.raises(InputError, match=f"one of flash_paged, {PAGED}, not 'flash'"):
        torch.ops.neuron_attn.flash_paged(*batch.tensors(), *fields(schedule), scale=0.2, kernel_name="flash")


@pytest.mark.parametrize(
    ("kernel", "q_len", "kv_len"), [("attention_cte", 64, 64), ("attention_segmented_cte", 128, 384)]
)
def test_a_rewritten_graph_names_the_kernel(kernel: str, q_len: int, kv_len: int) -> None:
    seen = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    def inputs() -> tuple[torch.Tensor, ...]:
        return tuple(t.bfloat16() for t in operands(q_len=q_len, kv_len=kv_len, dim=128, v_dim=128))

    config = RewriteConfig(policy="always", sdk="2.32", kernels=(kernel,))
    rewritten = rewrite(Function(attend), inputs(), config=config)
    (call,) = kernel_calls(rewritten)
    assert call.kwargs["kernel_name"] == rewritten.report.sites[0].kernel == kernel
    assert any("the scale goes into the query" in reason for reason in rewritten.report.sites[0].reasons)
    fresh = inputs()
    torch.testing.assert_close(rewritten(*fresh), attend(*fresh), rtol=0, atol=3e-2)


def test_a_pattern_that_matches_no_site_warns() -> None:
    inputs = operands(q_len=64, kv_len=64, kv_heads=4)
    attend = Function(torch.nn.functional.scaled_dot_product_attention)
    with pytest.warns(RewriteWarning, match=r"sites\['\*\.attn'\] matches no attention; they are"):
        rewrite(attend, inputs, config=RewriteConfig(sites={"*.attn": "flash_fwd"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RewriteWarning)
        rewrite(attend, inputs, config=RewriteConfig(sites={"*": "flash_fwd"}))


def test_nothing_is_found_without_an_sdk() -> None:
    assert vendor.installed() == ()
    with pytest.raises(KernelError, match=r"attention_cte.*not installed here.*RewriteConfig\(kernels="):
        vendor.require("attention_cte")


def test_a_kernel_is_known_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)
    assert set(vendor.installed()) == set(vendor.ADAPTERS)
    stand_ins.put(monkeypatch, "nkilib.core.attention.attention_cte", attention_cte=lambda q, k, v: v)
    assert vendor.find("attention_cte") is None


@pytest.mark.skipif(not CHECKOUT, reason="NKI_LIBRARY names no checkout of aws-neuron/nki-library")
@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("name", ["attention_cte", "attention_tkg"])
def test_the_kernel_itself_on_the_simulator(name: str, lnc: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(CHECKOUT) / "src" / "nkilib_src"))
    adapter = vendor.ADAPTERS[name]
    module, attribute = adapter.places[0].split(":")
    with active():
        kernel = getattr(importlib.import_module(module), attribute)

    def launch(kernel: Any, lnc: int) -> Any:
        # The library gives its cores unequal parts of a causal sequence, and exchanges rows that nobody wrote or reads.
        options = {"target": "gen3", "same_instructions": False, "uninitialized": "nan"}
        return lambda **arguments: run(kernel, lnc=lnc, **options, **arguments).outputs

    found = replace(adapter, kernel=kernel, launch=launch, parameters=frozenset({"bound_min"}))
    for sizes, options in CTE if name == "attention_cte" else TKG:
        torch.manual_seed(0)
        query, key, value = (t.bfloat16() for t in operands(**{"batch": 1, "heads": 2, "kv_heads": 1, **sizes}))
        heads = query.shape[1]
        options = {k: v[:1] if k == "key_padding" else v[:heads] if k == "sink" else v for k, v in options.items()}
        terms = checked_terms(query, key, value, **options)
        actual, expected = (
            found.attend(query, key, value, terms, How(lnc)),
            reference.attention(query, key, value, terms),
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2 * float(expected.float().abs().max()))
    if name == "attention_cte":
        sizes, options = of_a_rank(1, 2, 256, heads=2)
        query, key, value = (t.bfloat16() for t in operands(**{"batch": 1, "kv_heads": 1} | sizes))
        terms = checked_terms(query, key, value, **options)
        how = How(lnc, FlashAttentionStrategy.STRIDED_CONTEXT_PARALLEL_KERNEL.name)
        actual, expected = found.attend(query, key, value, terms, how), reference.attention(query, key, value, terms)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2 * float(expected.float().abs().max()))


@pytest.mark.skipif(not CHECKOUT, reason="NKI_LIBRARY names no checkout of aws-neuron/nki-library")
def test_gradients_by_the_kernels_themselves_on_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(CHECKOUT) / "src" / "nkilib_src"))

    def launch(kernel: Any, lnc: int) -> Any:
        options = {"target": "gen3", "same_instructions": False, "uninitialized": "nan"}
        return lambda **arguments: run(kernel, lnc=lnc, **options, **arguments).outputs

    def found(adapter: vendor.Adapter) -> vendor.Adapter:
        module, attribute = adapter.places[0].split(":")
        with active():
            return replace(adapter, kernel=getattr(importlib.import_module(module), attribute), launch=launch)

    adapter = found(vendor.BACKWARD["attention_bwd"])
    assert adapter.forward is not None
    adapter = replace(adapter, forward=found(adapter.forward))
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "q_len": 256, "kv_len": 256}
    for options in ({"scale": 0.3}, {"scale": 0.3, "band_upper": 0}):
        torch.manual_seed(0)
        query, key, value = (t.bfloat16() for t in operands(**sizes))
        grad, terms = torch.randn_like(query), checked_terms(query, key, value, **options)
        expected = reference.attention_backward(grad, query, key, value, terms)
        for actual, wanted in zip(adapter.call(grad, query, key, value, terms, 1)[:3], expected, strict=False):
            torch.testing.assert_close(actual.float(), wanted, rtol=0, atol=2e-2 * float(wanted.abs().max()))
