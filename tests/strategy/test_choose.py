"""Which kernel a problem gets: each clause and each row of the tables, on both sides of its border."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.config.rules import Case, Rule
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.errors import ConfigError, DeviceError
from neuron_attn_rewrite.hardware import HARDWARE
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.masks.spec import Band, Chunked, EmptyRows, Intervals, KeyPadding, Limited, MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem, Prior
from neuron_attn_rewrite.strategy import cost, profile
from neuron_attn_rewrite.strategy.choose import NATIVE, choose, notes
from neuron_attn_rewrite.strategy.clauses import DTYPES, Setting
from neuron_attn_rewrite.strategy.legality import BACKWARD, KERNELS, bridged, illegal
from neuron_attn_rewrite.strategy.tables import TABLES, first, table

FULL = MaskSpec()
CAUSAL = MaskSpec((Band(upper=0),))
WINDOW = MaskSpec((Band(lower=-255, upper=0),))
SDK = RewriteConfig(policy="sdk")


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


# The decision tables of NxD Inference's own unit tests, test/unit/modules/attention/test_attention_base.py: releases,
# target, attn_kernel_enabled, LNC, q_len, masked, window, strategy.
ALL = ("2.26.1", "2.27", "2.28", "2.29", "2.32")
PUBLISHED = [
    (ALL, "trn2", None, 2, 128, True, False, "NONE"),
    (ALL, "trn2", None, 2, 3968, True, False, "NONE"),
    (ALL, "trn2", True, 2, 256, True, False, "SHARDED_KERNEL"),
    (ALL, "trn2", None, 2, 256, True, False, "SHARDED_KERNEL"),
    (ALL, "trn2", True, 2, 3968, True, False, "NONE"),
    (ALL, "trn2", None, 2, 4096, True, False, "SHARDED_KERNEL"),
    (ALL, "trn2", True, 2, 4096, True, False, "SHARDED_KERNEL"),
    (ALL, "trn1", None, 1, 4096, True, False, "UNSHARDED_KERNEL"),
    (ALL, "trn1", True, 1, 4096, True, False, "UNSHARDED_KERNEL"),
    (ALL, "trn1", None, 1, 1024, True, False, "NONE"),
    (ALL, "trn1", True, 1, 1024, True, False, "UNSHARDED_KERNEL"),
    (ALL, "trn1", None, 1, 256, True, False, "NONE"),
    (ALL, "trn1", True, 1, 256, True, False, "NONE"),
    (ALL, "trn2", None, 2, 128, False, False, "SHARDED_KERNEL"),
    (ALL, "trn2", None, 2, 3968, False, False, "SHARDED_KERNEL"),
    (ALL, "trn2", True, 2, 256, False, False, "SHARDED_KERNEL"),
    (ALL, "trn2", None, 2, 256, False, False, "SHARDED_KERNEL"),
    (ALL, "trn2", True, 2, 3968, False, False, "SHARDED_KERNEL"),
    (ALL, "trn2", None, 2, 4096, False, False, "SHARDED_KERNEL"),
    (ALL, "trn1", None, 1, 4096, False, False, "UNSHARDED_KERNEL"),
    (ALL, "trn1", True, 1, 1024, False, False, "UNSHARDED_KERNEL"),
    (ALL, "trn1", None, 1, 1024, False, False, "NONE"),
    (ALL, "trn1", None, 1, 256, True, True, "NONE"),
    (("2.26.1",), "trn2", None, 2, 256, True, True, "NONE"),
    (("2.26.1",), "trn2", None, 2, 2048, True, True, "SLIDING_WINDOW_KERNEL"),
    (("2.27", "2.28"), "trn1", None, 1, 2048, True, True, "SLIDING_WINDOW_KERNEL"),
    (("2.27", "2.28", "2.29", "2.31"), "trn2", None, 2, 256, True, True, "SHARDED_KERNEL"),
    (("2.27", "2.28", "2.29", "2.31"), "trn2", None, 2, 2048, True, True, "SHARDED_KERNEL"),
    *((ALL, "trn2", False, 2, n, masked, False, "NONE") for n in (128, 256, 3968, 4096) for masked in (True, False)),
    *((ALL, "trn1", False, 1, n, masked, False, "NONE") for n in (256, 1024, 4096) for masked in (True, False)),
]
# lnc, cp_degree, q_len (head_dim 256), strided, window, strategy; None where it raises.
PUBLISHED_CP = [
    (1, 4, 512, False, False, "NONE"),
    (2, 4, 512, True, False, "STRIDED_CONTEXT_PARALLEL_KERNEL"),
    (2, 4, 512, False, False, "CONTEXT_PARALLEL_KERNEL"),
    (2, 4, 256, False, False, "NONE"),
    (2, 4, 128, False, False, "NONE"),
    (1, 4, 512, True, False, None),
    (2, 4, 128, True, False, None),
    (2, 4, 512, False, True, "CONTEXT_PARALLEL_KERNEL"),
    (2, 4, 512, True, True, None),
]


@pytest.mark.parametrize(("sdks", "target", "enabled", "lnc", "q_len", "masked", "window", "expected"), PUBLISHED)
def test_the_published_table(
    sdks: tuple[str, ...],
    target: str,
    enabled: bool | None,
    lnc: int,
    q_len: int,
    masked: bool,
    window: bool,
    expected: str,
) -> None:
    for sdk in sdks:
        rule = first(table(sdk), Case(q_len, 128, masked, window, lnc, target, enabled))
        assert rule and rule.strategy.name == expected and not rule.error, sdk


@pytest.mark.parametrize(("lnc", "degree", "q_len", "strided", "window", "expected"), PUBLISHED_CP)
def test_the_published_table_of_context_parallel(
    lnc: int, degree: int, q_len: int, strided: bool, window: bool, expected: str | None
) -> None:
    for sdk in ALL:
        rule = first(table(sdk), Case(q_len, 256, True, window, lnc, "trn2", None, degree, strided))
        assert rule and rule.strategy.name == (expected or "NONE") and bool(rule.error) == (expected is None)


@pytest.mark.parametrize(
    ("length", "mask", "target", "expected"),
    [
        (511, WINDOW, "trn2", "NONE"),
        (512, WINDOW, "trn2", "SLIDING_WINDOW"),
        (8192, WINDOW, "trn2", "SLIDING_WINDOW"),
        (512, MaskSpec((Band(-8, 8),)), "trn2", "NONE"),
        (1023, CAUSAL, "trn2", "NONE"),
        (1024, CAUSAL, "trn2", "SHARDED"),
        (4095, CAUSAL, "trn2", "SHARDED"),
        (4096, CAUSAL, "trn2", "UNSHARDED"),
        (1023, FULL, "trn1", "NONE"),
        (1024, FULL, "trn1", "UNSHARDED"),
    ],
)
def test_the_ladder_of_2_26(length: int, mask: MaskSpec, target: str, expected: str) -> None:
    decision = choose(problem(length, mask), RewriteConfig(target=target, sdk="2.26", policy="sdk"))
    assert decision.strategy.name.removesuffix("_KERNEL") == expected
    assert decision.kernel == (NATIVE if expected == "NONE" else "flash_fwd")
    assert str(length) in decision.reasons[-1] and "2.26" in decision.reasons[-1]


@pytest.mark.parametrize("sdk", TABLES)
def test_every_row_of_a_table_can_be_reached(sdk: str) -> None:
    cases = [
        Case(q_len, 256, masked, window, lnc, target, enabled, degree, strided)
        for q_len in (128, 256, 300, 512, 1024, 4096)
        for masked, window in ((False, False), (True, False), (True, True))
        for lnc, target in ((1, "trn1"), (2, "trn2"))
        for enabled in (None, True, False)
        for degree, strided in ((1, False), (4, False), (4, True))
    ]
    assert {first(table(sdk), case) for case in cases} == set(table(sdk))


def test_a_bias_is_a_mask_to_the_table() -> None:
    assert choose(problem(128, FULL), SDK).kernel == "flash_fwd"
    assert choose(problem(128, FULL, bias_shape=(1, 1, 128, 128)), SDK).kernel == NATIVE


def test_a_table_of_the_caller() -> None:
    rows = ({"strategy": "NONE", "max_q_len": 99}, {"strategy": "SHARDED_KERNEL", "lnc": 2, "source": "mine"})
    config = RewriteConfig(policy="sdk", table=rows)
    assert choose(problem(99), config).kernel == NATIVE
    decision = choose(problem(100), config)
    assert decision.strategy.name == "SHARDED_KERNEL" and "(mine)" in decision.reasons[0]
    assert "no row" in choose(problem(100), RewriteConfig(policy="sdk", table=rows, lnc=1)).reasons[0]
    for row in ({"strategy": "SHARDED"}, {"strategy": "NONE", "length": 3}, {}):
        with pytest.raises(ConfigError, match="a table row"):
            RewriteConfig(table=(row,))
    assert Rule.read({"strategy": "NONE", "targets": ["trn1"]}).targets == ("trn1",)


PADDED = MaskSpec((KeyPadding("m"),))
BACK = MaskSpec((Band(upper=1024),))
LIMITED = MaskSpec((Limited("key >= first[batch, query]"),))
ROWS = MaskSpec((Intervals(((0, 5),) * 2048),))
ONE = {"q_len": 1, "mask": FULL}
D128 = {"head_dim": 128, "v_head_dim": 128}
APART = {"q_len": 64, "kv_len": 1088, "prior": Prior(1024), "mask": BACK}
OLD = {"sdk": "2.28", "target": "trn1", "cores": 1}
# Kernel, setting, what it can compute, the nearest it can't, and a word of the clause.
BORDERS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ("flash_fwd", {}, {"batch": 1}, {"batch": 0}, "no size may be 0"),
    ("flash_fwd", {}, {"num_heads": 8}, {"num_heads": 7}, "num_heads 7 must be a multiple of num_kv_heads 2"),
    ("flash_fwd", {}, {"head_dim": 256}, {"head_dim": 257}, "head_dim 257"),
    ("flash_fwd", {}, {"v_head_dim": 256}, {"v_head_dim": 257}, "v_head_dim 257"),
    ("flash_fwd", {}, {"dtype": torch.float16}, {"dtype": torch.float64}, "float64"),
    ("flash_fwd", {}, {"scale": -1.0}, {"scale": float("inf")}, "scale inf"),
    ("flash_fwd", {}, {"softcap": 1e-3}, {"softcap": 0.0}, "softcap 0.0"),
    ("flash_fwd", {}, {"empty_rows": EmptyRows.MEAN}, {"empty_rows": EmptyRows.OTHER}, 'empty_rows="any"'),
    ("flash_fwd", {"target": "trn1", "cores": 1}, {"mask": PADDED}, {"mask": CAUSAL}, "trn1 lacks"),
    ("flash_fwd", {"target": "trn1", "cores": 1}, {"q_len": 1, "mask": MaskSpec((Band(upper=2047),))}, {}, ""),
    ("flash_fwd", {}, {"prior": None}, {"prior": Prior(1024)}, "keys in one tensor"),
    ("flash_prior", {}, APART, {}, "keys in two tensors"),
    ("flash_prior", {}, APART, APART | {"batch": 0}, "no size may be 0"),
    ("flash_prior", {}, APART, APART | {"num_heads": 7}, "num_heads 7 must be a multiple of num_kv_heads 2"),
    ("flash_prior", {}, APART | {"head_dim": 256}, APART | {"head_dim": 257}, "head_dim 257"),
    ("flash_prior", {}, APART | {"v_head_dim": 256}, APART | {"v_head_dim": 257}, "v_head_dim 257"),
    ("flash_prior", {}, APART | {"dtype": torch.float16}, APART | {"dtype": torch.float64}, "float64"),
    ("flash_prior", {}, APART | {"scale": -1.0}, APART | {"scale": float("inf")}, "scale inf"),
    ("flash_prior", {}, APART | {"softcap": 1e-3}, APART | {"softcap": 0.0}, "softcap 0.0"),
    ("flash_prior", {}, APART | {"empty_rows": EmptyRows.ZERO}, APART | {"empty_rows": EmptyRows.MEAN}, "mean"),
    ("flash_prior", {"target": "trn1", "cores": 1}, {}, APART, "trn1 lacks"),
    ("attention_cte", {"target": "trn3"}, {}, {}, ""),
    ("attention_cte", {"target": "trn1"}, {}, {"mask": FULL}, "runs on trn2, trn3, not on trn1"),
    ("attention_cte", {"sdk": "2.26"}, {}, {"mask": FULL}, "SDK 2.27 to 2.32, not with 2.26"),
    ("attention_cte", {}, {"batch": 1}, {"batch": 0}, "no size may be 0"),
    ("attention_cte", {}, {"num_heads": 8}, {"num_heads": 7}, "num_heads 7"),
    ("attention_cte", {}, {"batch": 64}, {"batch": 65}, "at most 512"),
    ("attention_cte", {"sdk": "2.28"}, {"batch": 4}, {"batch": 5}, "at most 32"),
    ("attention_cte", {}, {"kv_len": 131072}, {"kv_len": 131073}, "kv_len 131073"),
    ("attention_cte", {"sdk": "2.28"}, {"kv_len": 36864}, {"kv_len": 36865}, "at most 36864"),
    ("attention_cte", {}, {"head_dim": 128}, {"head_dim": 129}, "head_dim 129"),
    ("attention_cte", {}, {"v_head_dim": 128}, {"v_head_dim": 129}, "v_head_dim 129"),
    ("attention_cte", {}, {"head_dim": 127, "mask": PADDED}, {"head_dim": 128, "mask": PADDED}, "padding adds 1"),
    ("attention_cte", {}, {"dtype": torch.bfloat16}, {"dtype": torch.float32}, "products in bfloat16"),
    (
        "attention_cte",
        {"loose": frozenset({torch.float16})},
        {"dtype": torch.float16},
        {"dtype": torch.float16, "mask": PADDED},
        "range of bfloat16",
    ),
    ("attention_cte", {}, {"scale": -1.0}, {"scale": float("nan")}, "scale nan"),
    ("attention_cte", {}, {}, {"softcap": 50.0}, "no softcap"),
    ("attention_cte", {}, {"empty_rows": EmptyRows.ANY}, {"empty_rows": EmptyRows.ZERO}, "undefined"),
    ("attention_cte", {"sdk": "2.29"}, {"mask": ROWS}, {}, ""),
    ("attention_cte", {}, APART, APART | {"prior": Prior(1024, is_shared=False)}, "one length for the whole batch"),
    ("attention_cte", {}, APART, APART | {"prior": Prior(1024, is_masked=True)}, "without padding"),
    ("attention_cte", {}, APART | {"batch": 2, "prior": Prior(1024, 256)}, {}, ""),
    ("attention_cte", {}, APART | {"mask": LIMITED, "batch": 2}, {}, ""),
    ("attention_tkg", {}, APART | {"q_len": 7}, APART | {"q_len": 8}, "q_len 8"),
    ("attention_segmented_cte", {"sdk": "2.32"}, D128, D128 | {"prior": Prior(1024)}, "keys in one tensor"),
    ("attention_cte", {"sdk": "2.28"}, {"mask": WINDOW}, {"mask": ROWS}, "before SDK 2.29"),
    ("attention_cte", {"sdk": "2.31"}, {"mask": LIMITED}, {}, ""),
    (
        "attention_cte",
        {"sdk": "2.30"},
        {"mask": LIMITED, "batch": 1},
        {"mask": LIMITED, "batch": 2},
        "each of the batch",
    ),
    ("attention_cte", {"sdk": "2.31"}, {"bias_shape": (1, 1, 2048, 2048)}, {}, ""),
    ("attention_cte", {"sdk": "2.30"}, {}, {"bias_shape": (1, 1, 2048, 2048)}, "before SDK 2.31"),
    (
        "attention_cte",
        {"sdk": "2.31"},
        {"kv_len": 3072, "mask": BACK},
        {"kv_len": 3072, "mask": BACK, "bias_shape": (1, 1, 2048, 3072)},
        "behind a prefix",
    ),
    ("attention_tkg", {"target": "trn1"}, {}, ONE, "not on trn1"),
    ("attention_tkg", {"sdk": "2.27"}, {}, ONE, "not with 2.27"),
    ("attention_tkg", {}, ONE, ONE | {"batch": 0}, "no size may be 0"),
    ("attention_tkg", {}, ONE, ONE | {"num_heads": 7}, "num_heads 7"),
    ("attention_tkg", {}, ONE, ONE | {"v_head_dim": 32}, "v_head_dim 32"),
    ("attention_tkg", {}, ONE, ONE | {"dtype": torch.float32}, "products in bfloat16"),
    ("attention_tkg", {}, ONE, ONE | {"scale": float("inf")}, "scale inf"),
    ("attention_tkg", {}, ONE, ONE | {"softcap": 1.0}, "softcap"),
    ("attention_tkg", {}, ONE, ONE | {"bias_shape": (1, 1, 1, 2048)}, "bias"),
    ("attention_tkg", {}, ONE | {"empty_rows": EmptyRows.ANY}, ONE | {"empty_rows": EmptyRows.ZERO}, "undefined"),
    ("attention_tkg", {}, ONE | {"q_len": 7}, ONE | {"q_len": 8}, "q_len 8 must be at most 7"),
    ("attention_tkg", {}, ONE | {"batch": 128}, ONE | {"batch": 129}, "16 MiB"),
    ("attention_tkg", {}, ONE | {"sink": True, "num_kv_heads": 1}, ONE | {"sink": True}, "sinks of one kv head"),
    ("attention_segmented_cte", {"target": "trn1", "sdk": "2.32"}, {}, D128, "not on trn1"),
    ("attention_segmented_cte", {"sdk": "2.30"}, {}, D128, "not with 2.30"),
    *(
        ("attention_segmented_cte", {"sdk": "2.32"} | where, D128 | good, D128 | bad, words)
        for where, good, bad, words in (
            ({}, {}, {"batch": 0}, "no size may be 0"),
            ({}, {}, {"num_heads": 7}, "num_heads 7"),
            ({}, {}, {"v_head_dim": 64}, "v_head_dim 64"),
            ({}, {}, {"dtype": torch.float32}, "products in bfloat16"),
            ({}, {}, {"scale": float("inf")}, "scale inf"),
            ({}, {}, {"softcap": 50.0}, "softcap"),
            ({}, {}, {"head_dim": 64, "v_head_dim": 64}, "head_dim 64 must be 128"),
            ({"loose": DTYPES}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, "of bfloat16, and here is"),
            ({}, {}, {"bias_shape": (1, 1, 2048, 2048)}, "bias"),
            ({}, {}, {"mask": CAUSAL & PADDED}, "no key padding"),
            ({}, {"kv_len": 3072, "mask": BACK}, {"kv_len": 3072, "mask": FULL}, "with a key for each query"),
            ({}, {"kv_len": 2100}, {"kv_len": 1920}, "with a key for each query"),
            ({}, {"q_len": 1920}, {"q_len": 2000}, "q_len 2000, the keys before"),
            ({}, {"kv_len": 3072, "mask": BACK}, {"kv_len": 3072, "mask": MaskSpec((Band(upper=1000),))}, "multiples"),
            ({}, {"mask": WINDOW}, {"mask": MaskSpec((Band(-200, 0),))}, "and the window must be multiples of 128"),
            (
                {},
                {"length": 8192, "mask": CAUSAL},
                {"length": 8320, "mask": CAUSAL},
                "q_len 8320 and the window",
            ),
            ({}, {"length": 7936, "mask": WINDOW}, {"length": 8064, "mask": WINDOW}, "q_len 8064 and the window"),
            (
                {},
                {"kv_len": 131200, "mask": MaskSpec((Band(upper=129024),))},
                {"kv_len": 131200, "mask": MaskSpec((Band(upper=129152),))},
                "all keys 131072",
            ),
            ({}, {"batch": 16}, {"batch": 17}, "batch 17 times num_heads 8 must be at most 128"),
        )
    ),
    ("attention_isa_kernel", OLD, {}, {}, ""),
    ("attention_isa_kernel", OLD | {"target": "trn3"}, {}, {"mask": FULL}, "not on trn3"),
    ("attention_isa_kernel", OLD | {"sdk": "2.29"}, {}, {"mask": FULL}, "not with 2.29"),
    ("attention_isa_kernel", OLD, {}, {"batch": 0}, "no size may be 0"),
    ("attention_isa_kernel", OLD, {}, {"num_heads": 7}, "num_heads 7"),
    ("attention_isa_kernel", OLD, {"head_dim": 128, "v_head_dim": 128}, {"head_dim": 129, "v_head_dim": 129}, "129"),
    ("attention_isa_kernel", OLD, {}, {"v_head_dim": 32}, "v_head_dim 32 must be head_dim 64"),
    ("attention_isa_kernel", OLD, {}, {"dtype": torch.float32}, "products in bfloat16"),
    ("attention_isa_kernel", OLD, {"scale": -2.0}, {"scale": float("inf")}, "scale inf"),
    ("attention_isa_kernel", OLD, {}, {"softcap": 50.0}, "softcap"),
    ("attention_isa_kernel", OLD, {}, {"bias_shape": (1, 1, 2048, 2048)}, "no bias"),
    ("attention_isa_kernel", OLD, {}, {"sink": True}, "no sink"),
    ("attention_isa_kernel", OLD, {}, {"mask": CAUSAL & PADDED}, "no key padding"),
    ("attention_isa_kernel", OLD, {"empty_rows": EmptyRows.ANY}, {"empty_rows": EmptyRows.MEAN}, "undefined"),
    ("attention_isa_kernel", OLD, {"q_len": 512, "kv_len": 512}, {"q_len": 511, "kv_len": 511}, "at least 512"),
    ("attention_isa_kernel", OLD, {"num_heads": 128}, {"num_heads": 130}, "num_heads 130 must be at most 128"),
    (
        "attention_isa_kernel",
        OLD | {"target": "trn2", "cores": 2},
        {"num_heads": 2},
        {"num_heads": 3, "num_kv_heads": 3},
        "even on two cores",
    ),
    ("attention_isa_kernel", OLD, {"mask": FULL, "kv_len": 600}, {"kv_len": 600}, "as many queries as keys"),
    ("attention_isa_kernel", OLD, {"mask": CAUSAL}, {"mask": WINDOW}, "none or causal"),
    ("neuronxcc_flash_fwd", OLD, {}, {}, ""),
    ("neuronxcc_flash_fwd", OLD | {"target": "trn3"}, {}, {"mask": FULL}, "not on trn3"),
    ("neuronxcc_flash_fwd", OLD | {"sdk": "2.29"}, {}, {"mask": FULL}, "not with 2.29"),
    ("neuronxcc_flash_fwd", OLD, {}, {"batch": 0}, "no size may be 0"),
    ("neuronxcc_flash_fwd", OLD, {}, {"num_heads": 7}, "num_heads 7"),
    ("neuronxcc_flash_fwd", OLD, {"head_dim": 128, "v_head_dim": 128}, {"head_dim": 129, "v_head_dim": 129}, "129"),
    ("neuronxcc_flash_fwd", OLD, {}, {"dtype": torch.float16}, "products in bfloat16"),
    ("neuronxcc_flash_fwd", OLD, {"scale": -1.0}, {"scale": float("inf")}, "scale inf"),
    ("neuronxcc_flash_fwd", OLD, {"scale": 1e-3}, {"scale": 0.0}, "must not be 0"),
    ("neuronxcc_flash_fwd", OLD, {}, {"softcap": 50.0}, "softcap"),
    ("neuronxcc_flash_fwd", OLD, {}, {"sink": True}, "no sink"),
    ("neuronxcc_flash_fwd", OLD, {}, {"mask": CAUSAL & PADDED}, "no key padding"),
    ("neuronxcc_flash_fwd", OLD, {"empty_rows": EmptyRows.ANY}, {"empty_rows": EmptyRows.MEAN}, "undefined"),
    ("neuronxcc_flash_fwd", OLD, {"kv_len": 2560}, {"kv_len": 2304}, "kv_len 2304 must be a multiple of 512"),
    ("neuronxcc_flash_fwd", OLD, {"q_len": 128}, {"q_len": 64}, "q_len 64 of 128"),
    (
        "neuronxcc_flash_fwd",
        OLD | {"target": "trn2", "cores": 2},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1},
        "num_kv_heads 1 must be even",
    ),
    ("neuronxcc_flash_fwd", OLD, {"mask": WINDOW}, {"mask": MaskSpec((Band(-8, 8),))}, "causal window"),
    (
        "neuronxcc_flash_fwd",
        OLD,
        {"bias_shape": (1, 1, 2048, 2048)},
        {"bias_shape": (1, 8, 2048, 2048)},
        "must be [1, 1, q_len, kv_len]",
    ),
    (
        "neuronxcc_flash_fwd",
        OLD,
        {"bias_shape": (1, 1, 2048, 2048)},
        {"bias_shape": (1, 1, 2048, 2048), "mask": WINDOW},
        "not meet a window",
    ),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": CAUSAL}, "causal window of at least 2 keys"),
    ("sliding_window_flash_fwd", OLD, {"mask": MaskSpec((Band(-1, 0),))}, {"mask": MaskSpec((Band(0, 0),))}, "2 keys"),
    ("sliding_window_flash_fwd", OLD | {"target": "trn3"}, {}, {"mask": WINDOW}, "not on trn3"),
    ("sliding_window_flash_fwd", OLD | {"sdk": "2.29"}, {}, {"mask": WINDOW}, "not with 2.29"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "batch": 0}, "size"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "num_heads": 7}, "num_heads 7"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "v_head_dim": 32}, "v_head_dim 32"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "dtype": torch.float32}, "bfloat16"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "scale": float("inf")}, "scale inf"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "scale": 0.0}, "must not be 0"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "softcap": 1.0}, "softcap"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "bias_shape": (1, 1, 2048, 2048)}, "bias"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "sink": True}, "sink"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW & PADDED}, "padding"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "empty_rows": EmptyRows.ZERO}, "undefined"),
    ("sliding_window_flash_fwd", OLD, {"mask": WINDOW}, {"mask": WINDOW, "kv_len": 2560}, "the same multiple of 512"),
    ("prefix_caching_attention_fwd_isa_kernel", OLD, {}, {"mask": BACK, "kv_len": 3072}, "undocumented: how many"),
    ("attention_tkg_fwd_isa_kernel", OLD, {}, ONE, "undocumented: which lengths"),
    ("attention_bwd", {"target": "trn1"}, {}, {}, "not on trn1"),
    ("attention_bwd", {"sdk": "2.28"}, {}, {}, "not with 2.28"),
    ("attention_bwd", {}, {"sink": True}, {}, ""),
    ("attention_bwd", {}, {"mask": FULL, "kv_len": 384}, {"mask": FULL, "kv_len": 640}, "kv_len 640"),
    ("attention_bwd", {}, {"mask": FULL, "q_len": 128}, {"mask": FULL, "q_len": 64}, "q_len 64"),
    ("attention_bwd", {}, {"batch": 64}, {"batch": 65}, "at most 512"),
    ("flash_attn_bwd", OLD | {"target": "trn3"}, {}, {}, "not on trn3"),
    ("flash_attn_bwd", OLD | {"sdk": "2.29"}, {}, {}, "not with 2.29"),
    ("flash_attn_bwd", OLD, {}, {"sink": True}, "no sink"),
    ("flash_attn_bwd", OLD, {"mask": FULL, "kv_len": 512}, {"mask": FULL, "kv_len": 384}, "kv_len 384"),
    ("flash_attn_bwd", OLD | {"target": "trn2", "cores": 2}, {}, {"num_kv_heads": 1}, "num_kv_heads 1"),
    *(
        (kernel, where, good, bad, words)
        for kernel, where in (("attention_bwd", {}), ("flash_attn_bwd", OLD))
        for good, bad, words in (
            ({}, {"batch": 0}, "no size may be 0"),
            ({}, {"num_heads": 7}, "num_heads 7"),
            ({"head_dim": 128, "v_head_dim": 128}, {"v_head_dim": 32}, "v_head_dim 32"),
            ({}, {"dtype": torch.float32}, "products in bfloat16"),
            ({"scale": 0.0}, {"scale": float("inf")}, "scale inf"),
            ({}, {"softcap": 50.0}, "softcap"),
            ({}, {"bias_shape": (1, 1, 2048, 2048)}, "no bias"),
            ({}, {"mask": CAUSAL & PADDED}, "no key padding"),
            ({"empty_rows": EmptyRows.ANY}, {"empty_rows": EmptyRows.ZERO}, "undefined"),
            ({"mask": WINDOW}, {"kv_len": 2560}, "as many queries as keys"),
            ({"mask": FULL}, {"mask": ROWS}, "must be none, or causal"),
        )
    ),
]


@pytest.mark.parametrize(("kernel", "setting", "good", "bad", "words"), BORDERS)
def test_each_clause_of_each_kernel(
    kernel: str, setting: dict[str, Any], good: dict[str, Any], bad: dict[str, Any], words: str
) -> None:
    where = Setting(**setting)
    if good or not words:
        assert illegal(kernel, problem(**good), where) is None
    if words:
        reason = illegal(kernel, problem(**bad), where)
        assert reason is not None and reason.startswith(f"{kernel}: ") and words in reason


# Kernel, targets, first and last release of the SDK, and a problem that it can compute.
SHIPPED: list[tuple[str, set[str], str, str, dict[str, Any]]] = [
    ("flash_prior", {"trn2", "trn3"}, "2.26.1", "2.32", APART),
    ("attention_cte", {"trn2", "trn3"}, "2.27", "2.32", {}),
    ("attention_tkg", {"trn2", "trn3"}, "2.28", "2.32", ONE),
    ("attention_segmented_cte", {"trn2", "trn3"}, "2.31", "2.32", D128),
    ("attention_isa_kernel", {"trn1", "inf2", "trn2"}, "2.26", "2.28", {}),
    ("neuronxcc_flash_fwd", {"trn1", "inf2", "trn2"}, "2.26", "2.28", {}),
    ("sliding_window_flash_fwd", {"trn1", "inf2", "trn2"}, "2.26", "2.28", {"mask": WINDOW}),
    ("attention_bwd", {"trn2", "trn3"}, "2.29", "2.32", {}),
    ("flash_attn_bwd", {"trn1", "inf2", "trn2"}, "2.26", "2.28", {}),
]
OF_PLACES = {"kernel-target", "kernel-sdk"}
"""Codes of the clauses that ask for a target or a release alone; ours asks the first of a mask."""


@pytest.mark.parametrize(("kernel", "targets", "since", "until", "example"), SHIPPED)
def test_where_each_kernel_runs(
    kernel: str, targets: set[str], since: str, until: str, example: dict[str, Any]
) -> None:
    places = [(target, sdk) for target in HARDWARE for sdk in (*ALL, "2.30", "2.31")]
    found = {p for p in places if illegal(kernel, problem(**example), Setting(p[0], 1, p[1])) is None}
    assert found == {(target, sdk) for target, sdk in places if target in targets and since <= sdk <= until}


@pytest.mark.parametrize("kernel", [*KERNELS, *BACKWARD])
def test_each_clause_is_tested_on_both_sides(kernel: str) -> None:
    """By a problem that breaks it and no clause before, in a place where the one beside it breaks none."""
    clauses = (KERNELS | BACKWARD)[kernel].clauses
    broken, bordered = set(), set()
    for name, setting, good, bad, words in BORDERS:
        if name == kernel and words and "keys in" not in words:
            where, p = Setting(**setting), problem(**bad)
            clause = next(c for c in clauses if not c.holds(p, where))
            broken.add(clause)
            if illegal(kernel, problem(**good), where) is None:
                bordered.add(clause)
    assert broken == set(clauses)
    left = {clause.code for clause in clauses if clause not in bordered}
    known = OF_PLACES if kernel in {name for name, *_ in SHIPPED} else {"kernel-undocumented"}
    assert left <= known


def test_a_kernel_without_an_adapter_is_never_chosen() -> None:
    for name in set(KERNELS) - {"flash_fwd", "flash_prior", *vendor.ADAPTERS}:
        decision = choose(problem(), RewriteConfig(policy="always", kernels=(name,)))
        assert decision.kernel == NATIVE and f"{name}: undocumented" in decision.reasons[0]


@pytest.mark.parametrize("name", ["trn1", "inf2"])
def test_inf2_is_as_trn1(name: str) -> None:
    here, there = (
        choose(problem(2048), RewriteConfig(target=t, sdk="2.28", kernels=tuple(KERNELS))) for t in (name, "trn1")
    )
    assert (here.kernel, here.strategy, here.lnc) == (there.kernel, there.strategy, there.lnc)
    assert HARDWARE[name] == HARDWARE["trn1"]


def test_an_installed_kernel_is_asked_what_it_takes() -> None:
    p = problem(mask=ROWS)
    assert illegal("attention_cte", p, Setting(sdk="2.28", parameters=frozenset({"bound_min"}))) is None
    assert illegal("attention_cte", p, Setting(sdk="2.31", parameters=frozenset())) is not None


@pytest.mark.parametrize(
    ("kernel", "changes", "words"),
    [
        ("attention_cte", {"scale": 1.0}, []),
        ("attention_cte", {}, ["scale"]),
        ("attention_cte", {"scale": 1.0, "mask": PADDED}, ["one more feature"]),
        ("attention_cte", {"scale": 1.0, "v_head_dim": 32}, ["padded to the larger"]),
        ("attention_cte", {"scale": 1.0, "kv_len": 3072, "mask": BACK}, ["a prefix"]),
        ("attention_cte", {"scale": 1.0, "mask": MaskSpec((Chunked(512),))}, ["one interval"]),
        ("attention_cte", {"scale": 1.0} | APART, []),
        ("attention_cte", {"scale": 1.0, "length": 100, "mask": MaskSpec((Chunked(50),))}, ["one interval", "128"]),
        ("attention_cte", {"scale": 1.0, "bias_shape": (1, 1, 2048, 2048)}, ["each head"]),
        ("attention_tkg", {"scale": 1.0, "q_len": 1, "mask": FULL}, ["0 and 1", "apart"]),
        ("attention_tkg", {"q_len": 1, "kv_len": 300, "mask": FULL}, ["scale", "0 and 1", "apart", "a core"]),
        ("attention_segmented_cte", D128, ["scale", "as they lie"]),
        ("attention_isa_kernel", {"scale": 1.0, "num_kv_heads": 8}, []),
        ("attention_isa_kernel", {}, ["scale", "repeated"]),
        ("sliding_window_flash_fwd", {"mask": WINDOW}, ["repeated"]),
    ],
)
def test_bridges(kernel: str, changes: dict[str, Any], words: list[str]) -> None:
    reasons = bridged(kernel, problem(**changes), Setting())
    assert len(reasons) == len(words)
    for word, reason in zip(words, reasons, strict=True):
        assert word in reason


@pytest.mark.parametrize(
    ("options", "mask", "expected", "cores"),
    [
        ({}, CAUSAL, "SHARDED", 2),
        ({"lnc": 1}, CAUSAL, "UNSHARDED", 1),
        ({"target": "inf2"}, FULL, "UNSHARDED", 1),
        ({"sdk": "2.26"}, WINDOW, "SLIDING_WINDOW", 2),
        ({"sdk": "2.28"}, WINDOW, "SHARDED", 2),
        ({"sdk": "2.26"}, CAUSAL, "SHARDED", 2),
    ],
)
def test_always(options: dict[str, Any], mask: MaskSpec, expected: str, cores: int) -> None:
    decision = choose(problem(100, mask), RewriteConfig(policy="always", **options))
    assert (decision.strategy.name.removesuffix("_KERNEL"), decision.lnc) == (expected, cores)
    assert "NONE" in decision.reasons[0] and "always" in decision.reasons[1]


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
        (
            "SLIDING_WINDOW_KERNEL",
            {},
            CAUSAL,
            "causal window over keys in one tensor, and the mask is causal(offset=0)",
        ),
        ("SLIDING_WINDOW_KERNEL", {}, MaskSpec((KeyPadding("m"),)), "needs a causal window"),
        ("CONTEXT_PARALLEL_KERNEL", {}, CAUSAL, "needs cp_degree > 1"),
        ("STRIDED_CONTEXT_PARALLEL_KERNEL", {}, CAUSAL, "needs cp_degree > 1"),
    ],
)
def test_forced(strategy: str, options: dict[str, Any], mask: MaskSpec, reason: str | None) -> None:
    forced = FlashAttentionStrategy[strategy]
    decision = choose(problem(64, mask), RewriteConfig(strategy=forced, **options))
    assert decision.strategy is (FlashAttentionStrategy.NONE if reason else forced)
    assert (reason or "is forced") in decision.reasons[0]
    illegal = choose(problem(64, mask, head_dim=300), RewriteConfig(strategy=forced, **options))
    assert illegal.kernel == NATIVE and "head_dim 300" in illegal.reasons[0]


def strided(rank: int, degree: int, q_len: int) -> MaskSpec:
    return MaskSpec((Intervals(tuple((0, i * degree + rank + 1) for i in range(q_len))),))


@pytest.mark.parametrize(
    ("mask", "options", "expected"),
    [
        (MaskSpec((Band(upper=2 * 512),)), {"cp_degree": 4, "cp_rank": 2}, "CONTEXT_PARALLEL_KERNEL"),
        (MaskSpec((Band(upper=2 * 512),)), {"cp_degree": 4, "cp_rank": 1}, None),
        (MaskSpec((Band(upper=2 * 512),)), {"cp_degree": 8, "cp_rank": 2}, None),
        (
            strided(2, 4, 512),
            {"cp_degree": 4, "cp_rank": 2, "strided_context_parallel": True},
            "STRIDED_CONTEXT_PARALLEL_KERNEL",
        ),
        (strided(1, 4, 512), {"cp_degree": 4, "cp_rank": 2, "strided_context_parallel": True}, None),
        (strided(2, 4, 512), {"cp_degree": 4, "cp_rank": 2}, None),
        (
            strided(2, 4, 512) & MaskSpec((Limited("key <= position"),)),
            {"cp_degree": 4, "cp_rank": 2, "strided_context_parallel": True},
            None,
        ),
    ],
)
def test_context_parallel_takes_the_rows_of_its_rank_alone(
    mask: MaskSpec, options: dict[str, Any], expected: str | None
) -> None:
    part = problem(512, mask, kv_len=2048)
    decision = choose(part, RewriteConfig(policy="sdk", **options))
    assert decision.strategy.name == (expected or "NONE")
    if not expected:
        assert "needs cp_degree > 1 and this rank's rows" in decision.reasons[0]
    # Where the mask is another, the kernel computes it all the same, as what it is.
    assert choose(part, RewriteConfig(policy="always", strategy=FlashAttentionStrategy.SHARDED_KERNEL)).lnc == 2


def test_kernels_that_may_be_used() -> None:
    both = RewriteConfig(policy="always", kernels=("flash_fwd", "attention_cte"))
    assert choose(problem(), both).kernel == "attention_cte"
    decision = choose(problem(softcap=50.0), both)
    assert decision.kernel == "flash_fwd" and "attention_cte: it has no softcap" in decision.reasons[-1]
    only = RewriteConfig(policy="always", kernels=("attention_cte",))
    assert choose(problem(softcap=50.0), only).kernel == NATIVE
    old = RewriteConfig(policy="always", sdk="2.28", target="trn1", kernels=("attention_isa_kernel",))
    assert choose(problem(), old).kernel == "attention_isa_kernel"
    # Earlier keys are copied as a prefix and all looked at; or they stay, of a window no others are loaded, and the
    # running output goes through memory.
    for behind, kernel in (
        (problem(mask=BACK, kv_len=3072, **D128), "attention_cte"),
        (problem(128, MaskSpec((Band(upper=16256),)), kv_len=16384, **D128), "attention_segmented_cte"),
        (problem(mask=MaskSpec((Band(1, 1024),)), kv_len=3072, **D128), "attention_segmented_cte"),
    ):
        for sdk in ("2.30", "2.32"):
            config = RewriteConfig(policy="always", sdk=sdk, kernels=("attention_segmented_cte", "attention_cte"))
            assert choose(behind, config).kernel == (kernel if sdk == "2.32" else "attention_cte")
    # What a band hides that is not causal is skipped by ours alone; what bounds hide by neither.
    assert choose(problem(8192, MaskSpec((Band(-64, 64),))), both).kernel == "flash_fwd"
    packed = MaskSpec((Intervals(tuple((i // 512 * 512, i // 512 * 512 + 512) for i in range(8192))),))
    assert choose(problem(8192, packed), both).kernel == "attention_cte"


def test_sites_of_their_own() -> None:
    config = RewriteConfig(
        policy="always",
        kernels=("flash_fwd", "attention_cte"),
        sites={
            "model.layers.0.*": FlashAttentionStrategy.NONE,
            "*.1.self_attn": FlashAttentionStrategy.UNSHARDED_KERNEL,
            "*.2.self_attn": "flash_fwd",
            "*.3.self_attn": "attention_cte",
        },
    )
    names = [f"model.layers.{i}.self_attn" for i in range(5)]
    kernels = [choose(problem(), config, name).kernel for name in names]
    assert kernels == [NATIVE, "attention_cte", "flash_fwd", "attention_cte", "attention_cte"]
    assert choose(problem(), config, names[1]).lnc == 1
    assert "is set for this site" in choose(problem(), config, names[2]).reasons[0]
    refused = choose(problem(softcap=1.0), config, names[3])
    assert refused.kernel == NATIVE and "softcap" in refused.reasons[0]


def test_short_attention_does_not_pay_and_long_does() -> None:
    short, long = choose(problem(128), RewriteConfig()), choose(problem(2048, num_heads=16), RewriteConfig())
    assert short.kernel == NATIVE and "q_len 128: the kernel's fixed cost dominates" in short.reasons[0]
    assert long.kernel == "flash_fwd" and "traffic of the score matrix dominates" in long.reasons[0]


@pytest.mark.parametrize("target", ["trn1", "inf2", "trn2", "trn3"])
def test_time_grows_with_work_and_falls_with_cores(target: str) -> None:
    def times(p: AttentionProblem, cores: int = 1) -> tuple[float, float]:
        return tuple(  # type: ignore[return-value]
            t.micros for t in (cost.kernel_time("attention_cte", p, target, cores), cost.native_time(p, target, cores))
        )

    base = times(problem(2048))
    for larger in (problem(2560), problem(2048, batch=2), problem(2048, FULL, kv_len=3072)):
        assert all(a > b for a, b in zip(times(larger), base, strict=True))
    assert all(a > b for a, b in zip(base, times(problem(2048), cores=2), strict=True))
    assert times(problem(2048, WINDOW))[0] < base[0] < times(problem(2048, FULL))[0]


def test_a_measured_profile_replaces_the_model(tmp_path: Path) -> None:
    p = problem(128)
    entries = [
        {"problem": profile.key(p), "target": "trn2", "cores": 2, "kernel": kernel, "micros": micros}
        for kernel, micros in (("flash_fwd", 10.0), ("native", 20.0))
    ]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"entries": entries}))
    config = RewriteConfig(profile=str(path))
    decision = choose(p, config)
    assert decision.kernel == "flash_fwd" and "measured at 2 times" in decision.reasons[0]
    assert choose(problem(129), config).kernel == NATIVE
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is no profile"):
        choose(p, RewriteConfig(profile=str(path)))
    with pytest.raises(ConfigError, match="is not a file"):
        choose(p, RewriteConfig(profile=str(tmp_path / "none")))
    with pytest.raises(DeviceError, match="No Neuron device here"):
        profile.measure([], str(path), target="trn2", cores=2)


@pytest.mark.parametrize(
    ("changes", "target", "words"),
    [
        ({}, "trn2", []),
        ({"head_dim": 256}, "trn2", ["head_dim above 128"]),
        ({"sink": True}, "trn1", ["sink"]),
        ({"mask": WINDOW}, "trn1", ["sliding_window"]),
        ({"softcap": 50.0}, "trn2", ["drops the softcap"]),
        ({"bias_shape": (1, 1, 1, 2048)}, "trn2", ["drops the bias"]),
        ({"mask": CAUSAL & PADDED}, "trn2", ["padding"]),
        ({"mask": MaskSpec((Band(-8, 8),))}, "trn2", ["computes a causal mask"]),
        ({"mask": FULL}, "trn2", []),
    ],
)
def test_what_nxd_inference_gets_wrong(changes: dict[str, Any], target: str, words: list[str]) -> None:
    found = notes(problem(**changes), RewriteConfig(target=target))
    assert len(found) == len(words)
    for word, note in zip(words, found, strict=True):
        assert word in note
