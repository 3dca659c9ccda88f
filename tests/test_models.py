"""The families of `models.py`: every attention found, masks proven, numbers right under every padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from neuron_attn_rewrite import CaptureError, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from tests.helpers import ALWAYS, kernel_calls
from tests.models import FAMILIES, Family, variants

TRANSFORMERS_4_CANNOT_TRACE = ("bart", "eager", "none")
"""transformers 4 makes this decoder's mask one column too long while it is traced."""


def _valid(output: Tensor, call: dict[str, Tensor]) -> Tensor:
    """The positions of the output that are not padding."""
    mask = call.get("decoder_attention_mask", call.get("attention_mask"))
    return output[mask.bool()] if mask is not None and output.shape[:2] == mask.shape else output


def _assert_same(model: torch.nn.Module, rewritten: torch.nn.Module, call: dict[str, Tensor]) -> None:
    with torch.no_grad():
        old, new = model(**call), rewritten(**call)
    assert type(new) is type(old) and list(new) == list(old)
    for key in old:
        if isinstance(old[key], Tensor):
            a, b = _valid(old[key], call), _valid(new[key], call)
            assert (a - b).abs().max() <= TOLERANCES[a.dtype] * a.abs().max(), key


@pytest.mark.parametrize(("family", "implementation"), variants(), ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("captured_with", ["none", "ones"])
def test_every_attention_is_replaced(family: Family, implementation: str, captured_with: str) -> None:
    model = family.build(implementation)
    call = family.call(captured_with)
    try:
        rewritten = rewrite(model, (), call, config=ALWAYS)
    except CaptureError:
        import transformers

        assert transformers.__version__.startswith("4.")
        assert (family.name, implementation, captured_with) == TRANSFORMERS_4_CANNOT_TRACE
        return
    assert len(rewritten.report.replaced) == family.attentions == len(rewritten.report.sites), str(rewritten.report)
    assert len(kernel_calls(rewritten)) == family.attentions
    assert not rewritten.report.warnings
    paddings = ["none"] if captured_with == "none" else ["ones", "right", "left"]
    for padding in paddings:
        _assert_same(model, rewritten, family.call(padding))


@pytest.mark.parametrize(
    ("name", "implementation", "mask"),
    [
        ("llama", "sdpa", {"causal(offset=0) & key_padding(attention_mask)"}),
        ("llama", "eager", {"causal(offset=0) & key_padding(attention_mask)"}),
        ("mistral", "sdpa", {"sliding_window(16) & key_padding(attention_mask)"}),
        ("bert", "sdpa", {"key_padding(attention_mask)"}),
        ("bert", "eager", {"key_padding(attention_mask)"}),
        (
            "modernbert",
            "sdpa",
            {"key_padding(attention_mask)", "window(left=8, right=8) & key_padding(attention_mask)"},
        ),
        ("vit", "sdpa", {"none"}),
        ("t5", "eager", {"key_padding(attention_mask)", "causal(offset=0) & key_padding(decoder_attention_mask)"}),
    ],
)
def test_the_mask_is_named(name: str, implementation: str, mask: set[str]) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    rewritten = rewrite(family.build(implementation), (), family.call("ones"), config=ALWAYS)
    assert {str(site.mask) for site in rewritten.report.sites} == mask


def test_no_mask_and_no_repeated_keys_are_left() -> None:
    llama = next(f for f in FAMILIES if f.name == "llama")
    family = replace(llama, options={**llama.options, "hidden_size": 96})
    rewritten = rewrite(family.build("sdpa"), (), family.call("ones"), config=ALWAYS)
    length = family.call("ones")["input_ids"].shape[1]
    shapes = [tuple(n.meta["val"].shape) for n in rewritten.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert not [shape for shape in shapes if shape[-2:] == (length, length)]
    assert not [shape for shape in shapes if len(shape) == 5]
    assert all(site.num_kv_heads == 2 for site in rewritten.report.sites)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_half_precision(dtype: torch.dtype, implementation: str) -> None:
    family = next(f for f in FAMILIES if f.name == "llama")
    model = family.build(implementation).to(dtype)
    rewritten = rewrite(model, (), family.call("right"), config=ALWAYS)
    if (implementation, dtype) == ("eager", torch.float16):
        # A padded row keeps scores that -65504 does not absorb: its softmax is nothing that a kernel computes.
        assert not rewritten.report.replaced
        assert all("sees no key" in site.reasons[-1] for site in rewritten.report.kept)
        rewritten = rewrite(model, (), family.call("right"), config=replace(ALWAYS, empty_rows="any"))
    assert len(rewritten.report.replaced) == 2, str(rewritten.report)
    assert all(site.dtype == dtype for site in rewritten.report.sites)
