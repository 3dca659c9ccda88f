"""Which kernel a problem gets: each clause and each row of the tables, on both sides of its border."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from neuron_attn_rewrite.config import RewriteConfig
from neuron_attn_rewrite.errors import ConfigError
from neuron_attn_rewrite.masks.spec import Band, KeyPadding, MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem, EmptyRows
from neuron_attn_rewrite.strategy.choose import KERNELS, NATIVE, choose
from neuron_attn_rewrite.strategy.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.strategy.tables import TABLES

CAUSAL = MaskSpec((Band(upper=0),))
WINDOW = MaskSpec((Band(lower=-255, upper=0),))


def problem(length: int = 2048, mask: MaskSpec = CAUSAL, **changes: Any) -> AttentionProblem:
    base = AttentionProblem(
        batch=1,
        num_heads=8,
        num_kv_heads=2,
        q_len=length,
        kv_len=length,
        head_dim=64,
        v_head_dim=64,
        dtype=torch.bfloat16,
        scale=0.125,
        mask=mask,
    )
    return replace(base, **changes)


PUBLISHED = [
    # q_len, masked, target: strategy of NxD Inference 2.29 (its unit tests, test_attention_base.py:125-181)
    (128, False, "trn2", "SHARDED"),
    (3968, False, "trn2", "SHARDED"),
    (256, True, "trn2", "SHARDED"),
    (128, True, "trn2", "NONE"),
    (768, True, "trn2", "SHARDED"),
    (1000, True, "trn2", "NONE"),
    (1024, True, "trn2", "SHARDED"),
    (1280, True, "trn2", "NONE"),
    (1536, True, "trn2", "SHARDED"),
    (3968, True, "trn2", "NONE"),
    (4096, True, "trn2", "SHARDED"),
    (1024, True, "trn1", "NONE"),
    (4095, True, "trn1", "NONE"),
    (4096, True, "trn1", "UNSHARDED"),
    (4096, False, "inf2", "UNSHARDED"),
]


@pytest.mark.parametrize(("length", "masked", "target", "expected"), PUBLISHED)
def test_the_table_of_2_29(length: int, masked: bool, target: str, expected: str) -> None:
    decision = choose(problem(length, CAUSAL if masked else MaskSpec()), RewriteConfig(target=target))
    assert decision.strategy.name.removesuffix("_KERNEL") == expected
    assert decision.kernel == (NATIVE if expected == "NONE" else "flash_fwd")
    assert str(length) in decision.reasons[-1] and "2.29" in decision.reasons[-1]


@pytest.mark.parametrize(
    ("length", "mask", "target", "expected"),
    [
        (511, WINDOW, "trn2", "NONE"),
        (512, WINDOW, "trn2", "SLIDING_WINDOW"),
        (8192, WINDOW, "trn1", "SLIDING_WINDOW"),
        (512, MaskSpec((Band(-8, 8),)), "trn2", "NONE"),
        (1023, CAUSAL, "trn2", "NONE"),
        (1024, CAUSAL, "trn2", "SHARDED"),
        (1024, CAUSAL, "trn1", "UNSHARDED"),
        (4095, CAUSAL, "trn2", "SHARDED"),
        (4096, CAUSAL, "trn2", "UNSHARDED"),
    ],
)
def test_the_ladder_of_2_26(length: int, mask: MaskSpec, target: str, expected: str) -> None:
    decision = choose(problem(length, mask), RewriteConfig(target=target, sdk="2.26"))
    assert decision.strategy.name.removesuffix("_KERNEL") == expected


@pytest.mark.parametrize("sdk", TABLES)
def test_every_row_of_a_table_can_be_reached(sdk: str) -> None:
    hit = set()
    for length in (128, 256, 512, 1000, 1024, 3968, 4096):
        for mask in (MaskSpec(), CAUSAL, WINDOW):
            for cores in (1, 2):
                hit.add(next(r.when for r in TABLES[sdk] if r.holds(problem(length, mask), cores)))
    assert hit == {rule.when for rule in TABLES[sdk]}


def test_a_bias_is_a_mask_to_the_table() -> None:
    assert choose(problem(128, MaskSpec()), RewriteConfig()).kernel == "flash_fwd"
    assert choose(problem(128, MaskSpec(), bias_shape=(1, 1, 128, 128)), RewriteConfig()).kernel == NATIVE


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ({"batch": 1}, {"batch": 0}, "size"),
        ({"num_heads": 8}, {"num_heads": 7}, "num_heads 7 must be a multiple of num_kv_heads 2"),
        ({"head_dim": 256}, {"head_dim": 257}, "head_dim 257"),
        ({"v_head_dim": 256}, {"v_head_dim": 257}, "v_head_dim 257"),
        ({"dtype": torch.float16}, {"dtype": torch.float64}, "float64"),
        ({"scale": -1.0}, {"scale": float("inf")}, "scale inf"),
        ({"softcap": 1e-3}, {"softcap": 0.0}, "softcap 0.0"),
        ({"empty_rows": EmptyRows.MEAN}, {"empty_rows": EmptyRows.OTHER}, 'empty_rows="any"'),
    ],
)
def test_each_clause_of_flash_fwd(good: dict[str, Any], bad: dict[str, Any], words: str) -> None:
    config = RewriteConfig(policy="always")
    assert choose(problem(**good), config).kernel == "flash_fwd"
    decision = choose(problem(**bad), config)
    assert decision.kernel == NATIVE and decision.strategy is FlashAttentionStrategy.NONE
    (reason,) = decision.reasons
    assert reason.startswith("flash_fwd: ") and words in reason


def test_each_clause_is_tested() -> None:
    assert len(KERNELS["flash_fwd"]) == 8


@pytest.mark.parametrize(
    ("options", "mask", "expected", "cores"),
    [
        ({}, CAUSAL, "SHARDED", 2),
        ({"lnc": 1}, CAUSAL, "UNSHARDED", 1),
        ({"target": "inf2"}, CAUSAL, "UNSHARDED", 1),
        ({"sdk": "2.26"}, WINDOW, "SLIDING_WINDOW", 2),
        ({"sdk": "2.26"}, CAUSAL, "SHARDED", 2),
    ],
)
def test_always(options: dict[str, Any], mask: MaskSpec, expected: str, cores: int) -> None:
    decision = choose(problem(100, mask), RewriteConfig(policy="always", **options))
    assert (decision.strategy.name.removesuffix("_KERNEL"), decision.lnc) == (expected, cores)
    table, policy = decision.reasons
    assert "NONE" in table and "always" in policy


def test_always_keeps_the_choice_of_the_table() -> None:
    decision = choose(problem(4096), RewriteConfig(policy="always", sdk="2.26"))
    assert (decision.strategy.name, decision.lnc) == ("UNSHARDED_KERNEL", 1)
    assert len(decision.reasons) == 1


@pytest.mark.parametrize(
    ("strategy", "options", "mask", "reason"),
    [
        ("NONE", {}, CAUSAL, None),
        ("UNSHARDED_KERNEL", {}, CAUSAL, None),
        ("SHARDED_KERNEL", {}, CAUSAL, None),
        ("SHARDED_KERNEL", {"lnc": 1}, CAUSAL, "needs LNC 2"),
        ("SLIDING_WINDOW_KERNEL", {}, WINDOW, None),
        ("SLIDING_WINDOW_KERNEL", {}, CAUSAL, "needs a causal window, and the mask is causal(offset=0)"),
        ("SLIDING_WINDOW_KERNEL", {}, MaskSpec((KeyPadding("m"),)), "needs a causal window"),
        ("CONTEXT_PARALLEL_KERNEL", {}, CAUSAL, "needs several ranks"),
        ("STRIDED_CONTEXT_PARALLEL_KERNEL", {}, CAUSAL, "needs several ranks"),
    ],
)
def test_forced(strategy: str, options: dict[str, Any], mask: MaskSpec, reason: str | None) -> None:
    forced = FlashAttentionStrategy[strategy]
    decision = choose(problem(64, mask), RewriteConfig(strategy=forced, **options))
    assert decision.strategy is (FlashAttentionStrategy.NONE if reason else forced)
    assert (reason or "is forced") in decision.reasons[0]
    illegal = choose(problem(64, mask, head_dim=300), RewriteConfig(strategy=forced, **options))
    assert illegal.kernel == NATIVE and "head_dim 300" in illegal.reasons[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targt": "trn2"}, "did you mean 'target'"),
        ({"target": "trn9"}, "'trn1', 'inf2', 'trn2', 'trn3'"),
        ({"lnc": 3}, "None, 1, 2"),
        ({"lnc": True}, "None, 1, 2"),
        ({"lnc": 2, "target": "trn1"}, "no pairs of cores"),
        ({"policy": "profitable"}, "not there yet"),
        ({"sdk": "2.5"}, "'2.26', '2.29'"),
        ({"strategy": "SHARDED_KERNEL"}, "not a FlashAttentionStrategy"),
        ({"tolerances": {torch.float32: 0}}, "tolerances"),
        ({"verify": 1}, "True, False"),
    ],
)
def test_impossible_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewriteConfig(**options)
