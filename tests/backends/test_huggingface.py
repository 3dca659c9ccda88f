"""Hugging Face: the attention implementation, and `rewrite` on what people wrap models in."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from neuron_attn_rewrite import (
    CaptureError,
    InputError,
    RewriteConfig,
    RewriteError,
    RewriteWarning,
    collect_reports,
    explain,
    rewrite,
)
from neuron_attn_rewrite.backends import huggingface
from neuron_attn_rewrite.backends.huggingface import Registration, register_with_transformers
from tests.helpers import ALWAYS, relative_error
from tests.models import FAMILIES, Family


def family(name: str, **options: Any) -> Family:
    found = next(f for f in FAMILIES if f.name == name)
    return replace(found, options={**found.options, **options})


@pytest.fixture
def registration() -> Registration:
    return register_with_transformers(ALWAYS)


def compare(model: Family, padding: str) -> None:
    """Against eager, at the positions that are not padding."""
    eager, ours, call = model.build("eager"), model.build("neuron_nki"), model.call(padding)
    with torch.no_grad():
        old, new = eager(**call)[0], ours(**call)[0]
    mask = call.get("attention_mask")
    shown = mask.bool() if mask is not None and mask.shape == old.shape[:2] else ...
    assert relative_error(new[shown], old[shown]) < 2e-5


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("llama", "causal(offset=0)"),
        ("mistral", "sliding_window(16)"),
        ("gemma2", "sliding_window(16)"),
        ("vit", "none"),
        ("bert", "none"),
    ],
)
def test_implementation(registration: Registration, name: str, mask: str) -> None:
    if name == "bert" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 has no attention interface in BERT")
    model, padding = family(name), "left"
    compare(model, padding)
    report = registration.report
    assert len(report.replaced) == len(report.sites) == 2, str(report)
    first = str(report.sites[0].mask)
    assert first.startswith(mask) or (name, first) == ("bert", "key_padding(attention_mask)")
    if name not in ("vit", "bert"):
        assert first == f"{mask} & key_padding(attention_mask)"
        assert report.sites[0].bias is None


def test_causality_needs_the_mask_function(registration: Registration) -> None:
    """What happens without it, so that the comparison above is known to see it."""
    model = family("llama")
    call = model.call("left")
    from transformers import AttentionMaskInterface

    masks = AttentionMaskInterface._global_mapping
    registered = masks.pop("neuron_nki")
    try:
        with torch.no_grad():
            wrong = model.build("neuron_nki")(**call)[0]
            right = model.build("eager")(**call)[0]
        assert relative_error(wrong[1, 21:], right[1, 21:]) > 1e-2
    finally:
        masks["neuron_nki"] = registered


def test_generate_with_a_cache(registration: Registration) -> None:
    """Prefill and every step: new keys at the end, so that causality is aligned to the right."""
    model = family("llama", use_cache=True)
    prompt = torch.randint(3, 128, (2, 9))
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    old = model.build("eager").generate(prompt, **options)
    new = model.build("neuron_nki").generate(prompt, **options)
    assert torch.equal(old, new)
    lengths = {(site.q_len, site.kv_len) for site in registration.report.replaced}
    assert {(9, 9), (1, 10), (1, 13)} <= lengths


def test_legality_and_reasons_are_those_of_rewrite(registration: Registration) -> None:
    registration.config = RewriteConfig(policy="sdk", sdk="2.26", lnc=1)
    compare(family("llama"), "left")
    kept = registration.report.kept
    assert len(kept) == 2 and {site.reasons[-1].code for site in kept} == {"sdk-rule"}
    registration.reset()
    assert not registration.report.sites


def test_training_with_dropout_is_native(registration: Registration) -> None:
    model = family("llama", attention_dropout=0.5).build("neuron_nki").train()
    model(**family("llama").call("left"))[0].sum().backward()
    assert {site.reasons[-1] for site in registration.report.kept} == {"dropout is active"}


def test_what_can_not_be_told_is_dense(registration: Registration) -> None:
    """A mask of the caller's own, with holes: one bool for each query and key."""
    model = family("llama")
    shown = (torch.rand(2, 1, 64, 64) < 0.7) | torch.eye(64, dtype=torch.bool)
    eager, ours = model.build("sdpa"), model.build("neuron_nki")
    ids = model.call("none")["input_ids"]
    with torch.no_grad():
        assert relative_error(ours(ids, shown)[0], eager(ids, shown)[0]) < 2e-5
    assert all(site.bias == (2, 1, 64, 64) for site in registration.report.replaced)


def test_a_capture_sees_plain_attention(registration: Registration) -> None:
    model = family("llama").build("neuron_nki")
    report = explain(model, config=ALWAYS, **family("llama").call("left"))
    assert [str(site.mask) for site in report.sites] == ["causal(offset=0) & key_padding(attention_mask)"] * 2
    assert not registration.report.sites


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(huggingface, "import_module", missing)
    with pytest.raises(RewriteError, match=r"needs transformers >= 4\.57: pip install"):
        register_with_transformers()


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "paged|sdpa", "", " ", 3])
def test_names_of_others_are_refused(name: Any) -> None:
    before = transformers.AttentionInterface().get("sdpa")
    if isinstance(name, str) and "|" in name and name not in transformers.AttentionInterface():
        pytest.skip("this transformers has no such implementation")
    with pytest.raises(InputError, match="register_with_transformers: name"):
        register_with_transformers(name=name)
    assert transformers.AttentionInterface().get("sdpa") is before


def test_a_second_registration_with_another_configuration_warns() -> None:
    register_with_transformers(ALWAYS, name="twice")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_with_transformers(ALWAYS, name="twice")
    with pytest.warns(RewriteWarning, match="'twice' was registered with another configuration"):
        register_with_transformers(name="twice")


# What wraps a model


def test_quantised_linears(registration: Registration) -> None:
    """torch.export has no way to hold their packed weights: the implementation and torch.compile need none."""
    from torch.ao.quantization import quantize_dynamic

    model = family("llama")
    call = model.call("none")
    quantised, ours = (
        quantize_dynamic(model.build(how), {torch.nn.Linear}, dtype=torch.qint8) for how in ("sdpa", "neuron_nki")
    )
    with pytest.raises(CaptureError, match=r"LinearPackedParams[\s\S]*attn_implementation"):
        rewrite(quantised, (), call, config=ALWAYS)
    options = {"inner": "eager", "policy": "always"}
    with torch.no_grad(), collect_reports() as reports:
        old = quantised(**call)[0]
        assert relative_error(ours(**call)[0], old) < 1e-2  # activations are rounded to 8 bits
        compiled = torch.compile(quantised, backend="neuron_attn_rewrite", options=options)
        assert relative_error(compiled(**call)[0], old) < 1e-2
    assert len(registration.report.replaced) == 2
    assert reports.report.replaced


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    model = family("llama")
    adapted = peft.get_peft_model(
        model.build("sdpa"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    call = model.call("left")
    rewritten = rewrite(adapted, (), call, config=ALWAYS)
    assert len(rewritten.report.replaced) == 2
    with torch.no_grad():
        assert relative_error(rewritten(**call)[0], adapted(**call)[0]) < 2e-5
    assert any("lora_A" in name for name in rewritten.state_dict())


def test_a_pipeline_with_the_implementation(registration: Registration) -> None:
    """A pipeline pads to lengths of its own, so that it takes the implementation and not one graph."""
    from transformers import FeatureExtractionPipeline

    class Tokens:
        """Just enough of a tokenizer."""

        model_input_names = ("input_ids", "attention_mask")
        _processor_class = None

        def __call__(self, text: str, **options: Any) -> dict[str, Tensor]:
            ids = torch.tensor([[3 + ord(c) % 100 for c in text]])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def save_pretrained(self, *_: Any) -> None: ...

    model = family("llama")
    outputs = [
        FeatureExtractionPipeline(model=model.build(how), tokenizer=Tokens(), framework="pt")("some text")
        for how in ("sdpa", "neuron_nki")
    ]
    assert relative_error(torch.tensor(outputs[1]), torch.tensor(outputs[0])) < 2e-5
    assert {site.q_len for site in registration.report.replaced} == {9}


def test_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, patch_size=2, norm_num_groups=4
    ).eval()
    noise, step = torch.randn(2, 4, 8, 8), torch.tensor([7, 7])
    _check(unet, (noise, step, torch.randn(2, 6, 24)), 8)
    _check(dit, (noise, step, torch.tensor([1, 2])), 1, names=("hidden_states", "timestep", "class_labels"))


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    _check(vit, (torch.randn(2, 3, 32, 32),), 2)


def _check(model: Any, inputs: tuple[Tensor, ...], attentions: int, names: tuple[str, ...] = ()) -> None:
    given: dict[str, Any] = dict(zip(names, inputs, strict=True)) if names else {}
    args = () if names else inputs
    rewritten = rewrite(model, args, given, config=ALWAYS)
    assert len(rewritten.report.replaced) == len(rewritten.report.sites) == attentions, str(rewritten.report)
    with torch.no_grad():
        old, new = model(*args, **given), rewritten(*args, **given)
    old, new = (x if isinstance(x, Tensor) else x[0] for x in (old, new))
    assert relative_error(new, old) < 2e-5
