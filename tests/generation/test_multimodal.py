"""A generator of a multimodal model gives the tokens of `model.generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from neuron_attn_rewrite import Generator, InputError, RewriteConfig, RewriteWarning, rewrite_for_generation
from neuron_attn_rewrite.generation.part import text_part

START, IMAGE = 58, 60
"""Tokens: the begin of an image, and a piece of one."""
LENGTH, NEW, MAX_LENGTH, BATCH = 20, 4, 32, 2
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
SECTIONS = {"type": "mrope", "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Kind:
    """A multimodal architecture."""

    name: str
    config: Callable[[], Any]
    media: Callable[[int], dict[str, Tensor]]
    """Of so many images, each of four tokens."""
    tower: str
    attentions: int
    """Of the tower: each image of Qwen2-VL has its own."""


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3})
    return transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE
    )


def qwen() -> Any:
    sizes = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 4}
    return transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_scaling": SECTIONS, "rope_parameters": SECTIONS},
        vision_config={**sizes, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=START,
        vision_end_token_id=59,
    )


def gemma() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 8, "layer_types": kinds, "query_pre_attn_scalar": 8},
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=59,
    )


def pixels(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 32, 32)}


def patches(count: int, side: int = 4) -> dict[str, Tensor]:
    grid = torch.tensor([[1, side, side]] * count)
    return {"pixel_values": torch.randn(count * side * side, 96), "image_grid_thw": grid}


KINDS = (
    Kind("Llava", llava, pixels, "vision_tower", 3),
    Kind("Qwen2VL", qwen, patches, "visual", 4),
    Kind("Gemma3", gemma, pixels, "vision_tower", 2),
)


def inputs(kind: Kind, rows: int = BATCH, padded: bool = False, seed: int = 1) -> dict[str, Any]:
    """A prompt with an image in each row."""
    torch.manual_seed(seed)
    tokens = torch.randint(3, 50, (rows, LENGTH))
    tokens[:, 9], tokens[:, 10:14] = START, IMAGE
    mask = torch.ones_like(tokens)
    if padded:
        mask[-1, :5] = 0
    given = {"input_ids": tokens, "attention_mask": mask, **kind.media(rows)}
    if kind.name == "Gemma3":
        given["token_type_ids"] = (tokens == IMAGE).long()
    if kind.name == "Qwen2VL" and transformers.__version__ >= "5":
        given["mm_token_type_ids"] = (tokens == IMAGE).int()
    return given


@dataclass(frozen=True)
class Case:
    kind: Kind
    model: Any
    generator: Generator


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def case(request: pytest.FixtureRequest) -> Case:
    kind = request.param
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind.name}ForConditionalGeneration")(kind.config()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.5 * (weight.numel() / len(weight)) ** -0.5)  # so that a wrong mask shows
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    generator = rewrite_for_generation(
        model,
        batch_size=BATCH,
        max_length=MAX_LENGTH,
        prompt_lengths=24,
        example=inputs(kind, padded=True),
        config=RewriteConfig(policy="always"),
    )
    return Case(kind, model, generator)


def both(case: Case, given: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return case.model.generate(**given, **options), case.generator.generate(**given, **options)


def test_the_graphs_are_those_of_the_tower_and_the_text_part(case: Case) -> None:
    reports = case.generator.reports
    assert [*reports] == [case.kind.tower, "prefill[24]", "decode", "decode[24]"]
    assert len(reports[case.kind.tower].sites) == case.kind.attentions
    for name, report in reports.items():
        assert report.sites and all(site.kernel == "flash_fwd" for site in report.sites), name


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_after_an_image(case: Case, padded: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RewriteWarning)  # the tower has a graph
        expected, found = both(case, inputs(case.kind, padded=padded, seed=2))
    assert torch.equal(found, expected)


def test_tokens_of_text_alone(case: Case) -> None:
    given = {
        "input_ids": torch.randint(3, 50, (BATCH, 11)),
        "attention_mask": (torch.arange(11) >= torch.tensor([[0], [4]])).long(),
    }
    expected, found = both(case, given)
    assert torch.equal(found, expected)


def test_masks_of_other_dtypes(case: Case) -> None:
    given = inputs(case.kind, padded=True, seed=2)
    expected, found = both(case, {**given, "attention_mask": given["attention_mask"].bool()})
    assert torch.equal(found, expected)


def test_another_number_of_images_runs_in_the_model(case: Case) -> None:
    given = inputs(case.kind, rows=1, seed=3)
    with pytest.warns(RewriteWarning, match=f"no graph of .*{case.kind.tower} takes media of shape"):
        expected, found = both(case, given)
    assert torch.equal(found, expected)


def test_beams(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteWarning)
        expected, found = both(case, inputs(case.kind, rows=1, seed=4), num_beams=2)
    assert torch.equal(found, expected)


def test_image_tokens_that_do_not_match_the_features(case: Case) -> None:
    given = inputs(case.kind)
    given["input_ids"][0, 10] = 5
    if "mm_token_type_ids" in given:
        given["mm_token_type_ids"][0, 10] = 0
    before = [t.clone() for t in case.generator._state.tensors]
    with pytest.raises(InputError, match="can't merge these inputs"):
        case.generator.generate(**given, max_new_tokens=NEW)
    assert all(torch.equal(t, b) for t, b in zip(case.generator._state.tensors, before, strict=True))


def test_a_batch_that_does_not_fit(case: Case) -> None:
    with pytest.raises(InputError, match="3 sequences, beams counted, do not fit batch_size=2"):
        case.generator.generate(**inputs(case.kind, rows=3), max_new_tokens=NEW)


@pytest.mark.parametrize("wrong", [{"pixel_values": torch.zeros(1)}, {"input_ids": torch.ones(3, 4).long()}])
def test_an_example_that_does_not_fit(case: Case, wrong: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=r"rewrite_for_generation: (the )?example"):
        rewrite_for_generation(case.model, batch_size=2, max_length=8, example=wrong)


def test_an_example_for_a_model_of_text() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()
    with pytest.raises(InputError, match="example can't be given: LlamaForCausalLM has no part"):
        rewrite_for_generation(model, max_length=8, example={"input_ids": torch.ones(1, 4).long()})


def test_the_text_part_of_a_model_for_text_is_the_model() -> None:
    with torch.device("meta"):
        assert text_part(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))) == ""
        assert text_part(transformers.LlavaForConditionalGeneration(llava())) == "model.language_model"
