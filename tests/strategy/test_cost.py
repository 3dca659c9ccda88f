"""The cost model: its constants are those that the fit gives, and its pages are made from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import fit_cost, strategies
from benchmarks.measurements import KERNEL
from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.masks.spec import Band, Intervals, MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy import cost
from neuron_attn_rewrite.strategy.choose import NATIVE, choose, choose_among, time_of
from neuron_attn_rewrite.strategy.legality import KERNELS
from tests.helpers import Function

DOCS = Path(__file__).parents[2] / "docs"


def test_the_constants_are_what_the_fit_gives() -> None:
    assert asdict(cost.fit()) == pytest.approx(asdict(fit_cost.fit()), rel=1e-3)


def test_held_out_points_lie_within_the_spread() -> None:
    training, checking = fit_cost.held_out(KERNEL)
    assert not set(training) & set(checking) and len(checking) * 3 >= len(KERNEL) - 2
    fitted = cost.fit()
    factors = [fit_cost.kernel_factor(p, fitted) for p in checking]
    widest = fitted.kernel_spread * 1.001  # it is rounded
    inside = [f for f in factors if 1 / widest <= f <= widest]
    assert len(inside) >= 0.9 * len(factors)


def test_the_pages_are_up_to_date() -> None:
    assert (DOCS / "cost_model.md").read_text(encoding="utf-8") == fit_cost.page(cost.fit())
    page = (DOCS / "strategies.md").read_text(encoding="utf-8")
    model = strategies.MODELS[0]
    assert f"## {model.name}" in page and "\n".join(strategies._section(model)) in page
    assert all(f"## {model.name}" in page for model in strategies.MODELS)


def attention(**changes: Any) -> AttentionProblem:
    sizes = {"batch": 1, "num_heads": 8, "num_kv_heads": 2, "q_len": 2048, "kv_len": 2048, "head_dim": 64}
    other = {"v_head_dim": 64, "dtype": torch.bfloat16, "scale": 1.0, "mask": MaskSpec((Band(upper=0),))}
    return AttentionProblem(**{**sizes, **other, **changes})


QUERY, KEYS = 8 * 2048 * 64 * 2, 2 * 2048 * 64 * 2


@pytest.mark.parametrize(
    ("kernel", "changes", "moved"),
    [
        ("attention_cte", {}, 0),
        ("attention_cte", {"scale": 0.125}, 2 * QUERY),
        ("attention_cte", {"v_head_dim": 128}, QUERY * 3 + KEYS * 3),
        ("attention_cte", {"kv_len": 4096, "mask": MaskSpec((Band(upper=2048),))}, 2 * 2 * 2 * KEYS),
        ("attention_cte", {"bias_shape": (1, 1, 2048, 2048)}, 2048**2 * (2 + 4 * 8 + 4 * 8)),
        ("attention_isa_kernel", {}, 2 * (KEYS + 4 * KEYS)),
        ("attention_isa_kernel", {"num_kv_heads": 8}, 0),
        ("attention_tkg", {"q_len": 1, "mask": MaskSpec()}, 2 * 8 * 2048 + 2 * 2 * KEYS),
        ("attention_segmented_cte", {}, 2 * QUERY + 2 * 2 * QUERY),
        ("attention_segmented_cte", {"kv_len": 3072, "mask": MaskSpec((Band(1, 1024),))}, 2 * QUERY + 2 * QUERY),
        ("attention_segmented_cte", {"kv_len": 18432, "mask": MaskSpec((Band(upper=16384),))}, (2 + 4 * 3) * QUERY),
        ("flash_fwd", {"scale": 0.125}, 0),
        ("flash_fwd", {"bias_shape": (1, 8, 1, 2048)}, 8 * 2048 * 2),
        ("flash_fwd", {"bias_shape": (1, 1, 2048, 2048)}, 8 * 2048**2 * 2),
    ],
)
def test_what_a_call_copies(kernel: str, changes: dict[str, Any], moved: int) -> None:
    problem = attention(**changes)
    assert sum(cost.copies(kernel, problem, "trn2", 2).values()) == moved
    bare, turned = (cost.kernel_time(kernel, problem, "trn2", 2, layout_bytes=size).micros for size in (0, QUERY))
    assert turned - bare == pytest.approx(QUERY / (2 * 368e3))


def test_the_reason_names_a_copy_that_dominates() -> None:
    decode = attention(q_len=1, batch=16, num_kv_heads=8, kv_len=8192, head_dim=128, v_head_dim=128, mask=MaskSpec())
    decision = choose(decode, RewriteConfig(kernels=("attention_tkg",)))
    assert decision.kernel == NATIVE
    assert "copying (earlier and new keys are copied apart) dominates" in decision.reasons[0]


BLOCKS = MaskSpec((Intervals(tuple((i // 512 * 512, i // 512 * 512 + 512) for i in range(2048))),))


@pytest.mark.parametrize(
    ("kernel", "mask", "kv_len", "tiles"),
    [
        ("attention_cte", MaskSpec(), 2048, 16 * 4),
        ("attention_cte", MaskSpec((Band(upper=0),)), 2048, 4 * (1 + 2 + 3 + 4)),
        ("attention_cte", MaskSpec((Band(-511, 0),)), 2048, 4 * 1 + 12 * 2),
        # A prefix is looked at as a whole, with and without a window, and nothing is left out by bounds.
        ("attention_cte", MaskSpec((Band(upper=1024),)), 3072, 16 * 2 + 40),
        ("attention_cte", MaskSpec((Band(-1023, 1024),)), 3072, 16 * 2 + 40),
        ("attention_cte", MaskSpec((Band(-64, 64),)), 2048, 16 * 4),
        ("attention_cte", BLOCKS, 2048, 16 * 4),
        ("flash_fwd", BLOCKS, 2048, 16 * 4),
        ("flash_fwd", MaskSpec((Band(-64, 64),)), 2048, 16 + 6),
        ("flash_fwd", MaskSpec((Band(-511, 0),)), 2048, 4 * 1 + 12 * 2),
        ("neuronxcc_flash_fwd", MaskSpec((Band(-511, 0),)), 4096, 16 * 4),
        ("attention_tkg", MaskSpec((Band(upper=0),)), 2048, 16 * 4),
    ],
)
def test_the_tiles_that_kernels_compute(kernel: str, mask: MaskSpec, kv_len: int, tiles: int) -> None:
    problem = attention(num_heads=1, num_kv_heads=1, mask=mask, kv_len=kv_len)
    assert cost.work(problem, 1, KERNELS[kernel]) == (16, tiles)


def test_the_rows_of_a_rank_spare_attention_cte_what_no_rank_sees() -> None:
    def rank(number: int) -> AttentionProblem:
        rows = MaskSpec((Intervals(tuple((0, i * 4 + number + 1) for i in range(512))),))
        return attention(num_heads=1, num_kv_heads=1, q_len=512, kv_len=2048, mask=rows)

    for kernel, tiles in (("attention_cte", 1 + 2 + 3 + 4), ("flash_fwd", 16)):
        assert {cost.work(rank(r), 1, KERNELS[kernel], ranks=4)[1] for r in range(4)} == {tiles}
    strided = RewriteConfig(cp_degree=4, cp_rank=2, strided_context_parallel=True)
    assert time_of("attention_cte", rank(2), strided).micros < time_of("attention_cte", rank(1), strided).micros


def test_heads_of_a_group_share_a_tile_where_they_fit() -> None:
    decode, few = attention(q_len=1), attention(q_len=64)
    assert cost.work(decode, 1, KERNELS["flash_fwd"])[0] == 2
    assert cost.work(few, 1, KERNELS["flash_fwd"])[0] == 8
    assert cost.work(decode, 1, KERNELS["attention_cte"])[0] == 8


def test_transposes_that_vanish_decide_between_kernels() -> None:
    """Heads beside each other in a row: ours reads them there, attention_cte has three operands turned."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        query, key, value = (t.view(1, 1024, 4, 64).transpose(1, 2) for t in x.chunk(3, -1))
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2).reshape(1, 1024, 256)

    words = {}
    for kernel in ("flash_fwd", "attention_cte"):
        config = RewriteConfig(verify=False, kernels=(kernel,), policy="always", sdk="2.31")
        site = rewrite(Function(attend), (torch.randn(1, 1024, 768).bfloat16(),), config=config).report.sites[0]
        words[kernel] = site.transposes_saved
    assert words["flash_fwd"] > words["attention_cte"]
    turned = []

    def look(_: int, kernel: str) -> int:
        turned.append(kernel)
        return 10**9 if kernel == "attention_cte" else 0

    problem = attention(num_kv_heads=8)
    both = RewriteConfig(policy="always", kernels=("flash_fwd", "attention_cte"))
    assert choose_among([problem], both)[1].kernel == "attention_cte"
    assert choose_among([problem], both, layout_bytes=look)[1].kernel == "flash_fwd" and "attention_cte" in turned
