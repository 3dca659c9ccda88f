"""What can be asked for: the choices agree with the tables that they stand for, and anything else is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neuron_attn_rewrite.config.options import KERNEL_NAMES, RewriteConfig, choices
from neuron_attn_rewrite.config.rules import SDKS
from neuron_attn_rewrite.errors import ConfigError
from neuron_attn_rewrite.hardware import HARDWARE
from neuron_attn_rewrite.strategy.legality import KERNELS


def test_choices_are_those_of_the_tables() -> None:
    assert tuple(KERNELS) == KERNEL_NAMES
    assert choices()["target"] == tuple(HARDWARE)
    assert choices()["sdk"] == SDKS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targt": "trn2"}, "did you mean 'target'"),
        ({"target": "trn9"}, "'trn1', 'inf2', 'trn2', 'trn3'"),
        ({"lnc": 3}, "None, 1, 2"),
        ({"lnc": True}, "None, 1, 2"),
        ({"lnc": 2, "target": "trn1"}, "no pairs of cores"),
        ({"policy": "fast"}, "'profitable', 'sdk', 'always'"),
        ({"sdk": "2.5"}, "'2.26', '2.26.1', '2.27'"),
        ({"strategy": "SHARDED_KERNEL"}, "give FlashAttentionStrategy or None"),
        ({"tolerances": {torch.float32: 0}}, "tolerances"),
        ({"verify": 1}, "True, False"),
        ({"kernels": ("flash",)}, "one of .flash_fwd., .flash_prior."),
        ({"kernels": "flash_fwd"}, "give a tuple"),
        ({"sites": {"*": "flash"}}, "a kernel among flash_fwd"),
        ({"cp_degree": 0}, "must lie in"),
        ({"cp_degree": 2, "cp_rank": 2}, "must lie in"),
        ({"strided_context_parallel": True}, "needs cp_degree > 1"),
        ({"attn_kernel_enabled": 1}, "None, True, False"),
    ],
)
def test_impossible_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewriteConfig(**options)
