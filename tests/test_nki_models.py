"""Whole tiny models through the NKI kernels on the simulator, against the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_attn_rewrite import rewrite
from neuron_attn_rewrite.config import TOLERANCES
from neuron_attn_rewrite.kernels.simulated import simulated
from tests.helpers import ALWAYS, kernel_calls
from tests.models import DECODER, FAMILIES, Family

GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    "GptOssConfig",
    {**DECODER, "head_dim": 16, "sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    2,
)
CASES = {f.name: f for f in (*FAMILIES, GPT_OSS) if f.name in ("llama", "gemma2", "t5", "bert", "gpt_oss")}


@pytest.mark.parametrize("target", ["gen3", "gen4"])
@pytest.mark.parametrize("name", CASES)
def test_a_model_through_its_kernels(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = CASES[name]
    model = family.build("eager")
    rewritten = rewrite(model, (), family.call("left"), config=ALWAYS)
    assert len(kernel_calls(rewritten)) == family.attentions, str(rewritten.report)
    call: dict[str, Any] = family.call("right")
    mask = call.get("decoder_attention_mask", call["attention_mask"]).bool()
    with torch.no_grad():
        old, plain = model(**call), rewritten(**call)
        with simulated(target):
            new = rewritten(**call)
    for key, value in old.items():
        if isinstance(value, Tensor):
            a, b, c = (t[key][mask] if t[key].shape[:2] == mask.shape else t[key] for t in (old, new, plain))
            assert (a - b).abs().max() <= TOLERANCES[a.dtype] * a.abs().max(), key
            assert not torch.equal(b, c)
