"""Masks are evaluated for some rows at a time: no tensor of the size of the whole mask is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.masks.prove import Prover
from neuron_attn_rewrite.patterns.find import find
from neuron_attn_rewrite.patterns.site import AttentionSite
from tests.helpers import ALWAYS
from tests.models import FAMILIES


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= result.numel():
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_no_table_of_the_whole_mask_is_held(monkeypatch: pytest.MonkeyPatch, name: str, implementation: str) -> None:
    """Read in blocks of rows: the same verdict, and nothing near the size of the mask."""
    length, block = 512, 2**13
    monkeypatch.setattr("neuron_attn_rewrite.masks.read.BLOCK", block)
    family = next(f for f in FAMILIES if f.name == name)
    ids = torch.zeros(1, length, dtype=torch.int64)
    module = capture(
        family.build(implementation), (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ).module
    prover = Prover(module, ALWAYS)
    for site in find(module, prover.evaluator):
        assert isinstance(site, AttentionSite)
        with Largest() as largest:
            proof = prover.prove(site)
        claim = "sliding_window(16)" if name == "mistral" else "causal(offset=0)"
        assert isinstance(proof, Proof)
        assert str(proof.mask) == f"{claim} & key_padding(attention_mask)"
        assert largest.elements <= 2 * block
