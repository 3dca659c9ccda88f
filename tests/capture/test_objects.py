"""Objects among the outputs, caches above all, come out as what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite import rewrite, rewrite_for_trace
from neuron_attn_rewrite.capture.objects import leaves
from tests.helpers import ALWAYS, relative_error

TOLERANCE = 5e-5
"""Of a whole model in float32 whose weights are made large, relative to the largest value."""
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "mistral": {**TINY, "sliding_window": 8},
    "gemma3_text": {**TINY, "head_dim": 16, "sliding_window": 8},
    "gpt2": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "t5": {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
}


def default_model(name: str) -> nn.Module:
    """A small model whose config is the default one but for its sizes: it gives a cache."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **MODELS[name])
    for token in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        setattr(config, token, 0)
    auto = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model: nn.Module = auto.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model


def call_of(name: str, seed: int, padding: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 128, (2, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, {"attention_mask": mask} | ({"decoder_input_ids": ids[:, :9]} if name == "t5" else {})


@pytest.mark.parametrize("name", MODELS)
def test_default_language_models_give_their_cache(name: str) -> None:
    model = default_model(name)
    ids, given = call_of(name, 0, 0)
    rewritten = rewrite(model, (ids,), given, config=ALWAYS)
    assert not rewritten.report.kept and rewritten.report.capture_error is not None
    for seed, padding in ((1, 0), (2, 7)):
        ids, given = call_of(name, seed, padding)
        with torch.no_grad():
            new, old = rewritten(ids, **given), model(ids, **given)
        assert type(new) is type(old) and list(new) == list(old)
        cache, its = new.past_key_values, old.past_key_values
        assert type(cache) is type(its) and cache.get_seq_length() == its.get_seq_length()
        row = slice(1, None)  # without padding: rows of padding may give anything
        assert relative_error(new.logits[row], old.logits[row]) < TOLERANCE
        parts, its_parts = leaves(cache), leaves(its)
        assert len(parts) == len(its_parts) >= 4
        for a, b in zip(parts, its_parts, strict=True):
            assert a.shape == b.shape
            assert not a.numel() or relative_error(*(t[row] if t.dim() else t for t in (a, b))) < TOLERANCE


def test_the_model_goes_on_from_the_cache_of_the_rewritten_one() -> None:
    model = default_model("llama")
    ids, given = call_of("llama", 0, 0)
    rewritten = rewrite(model, (ids,), given, config=ALWAYS)
    with torch.no_grad():
        step = model(ids[:, :1], past_key_values=rewritten(ids, **given).past_key_values).logits
        wanted = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
        again = rewritten(ids, **given).past_key_values
    torch.testing.assert_close(step, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert again.get_seq_length() == ids.shape[1], "each call gives a cache of its own"


def test_a_trace_gets_the_tensors_of_a_cache() -> None:
    model = default_model("llama")
    ids, given = call_of("llama", 0, 0)
    out = rewrite_for_trace(model, {"input_ids": ids, **given}, config=ALWAYS)(ids, *given.values())
    assert set(out) == {"logits", "past_key_values"} and len(out["past_key_values"]) == 4
    assert all(isinstance(part, Tensor) for part in pytree.tree_leaves(out))


class Store:
    """Tensors in an object that no tracer knows."""

    def __init__(self, kept: Tensor) -> None:
        self.kept, self.notes, self.inner = kept, ["a", "b"], {"twice": (kept * 2, 7)}
        self.itself = self


class Storing(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"out": nn.functional.scaled_dot_product_attention(x, x, x), "store": Store(x + 1)}


def test_an_object_of_the_callers_own() -> None:
    x = torch.randn(1, 2, 8, 4)
    model = Storing()
    rewritten = rewrite(model, (x,), config=ALWAYS)
    x = torch.randn(1, 2, 8, 4)
    store = rewritten(x)["store"]
    assert type(store) is Store and store.notes == ["a", "b"] and store.inner["twice"][1] == 7
    assert torch.equal(store.kept, x + 1) and torch.equal(store.inner["twice"][0], (x + 1) * 2)
    store.notes.append("c")
    assert rewritten(x)["store"].notes == ["a", "b"]
    assert "forward" not in vars(model), "the model is as it was"
