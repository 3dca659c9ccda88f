"""Small configs of any architecture, whose fields fit one another."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from neuron_attn_rewrite.cli.shrink import COUNTS, HEAD, HEADS, LAYERS, VOCABULARY, WIDTH, WIDTHS, no_extras, shrink

ALL = COUNTS + WIDTHS


def small(name: str, **fields: Any) -> Any:
    config = transformers.AutoConfig.for_model(name, **fields)
    before = config.to_dict()
    made = shrink(config, ALL)
    assert type(made) is type(config) and config.to_dict() == before
    return made


def test_sizes_and_groups_of_heads() -> None:
    config = small("llama")
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (LAYERS, HEADS, WIDTH)
    assert config.num_key_value_heads == HEADS // 2 and config.head_dim == HEAD and config.vocab_size == VOCABULARY


def test_what_is_small_already_stays() -> None:
    assert (
        small("llama", num_hidden_layers=1, vocab_size=99).to_dict().items()
        >= {
            "num_hidden_layers": 1,
            "vocab_size": 99,
        }.items()
    )


def test_what_the_class_derives_is_derived_again() -> None:
    config = small("deepseek_v3")
    assert config.qk_head_dim == config.qk_nope_head_dim + config.qk_rope_head_dim == 2 * HEAD
    assert config.num_key_value_heads == config.num_attention_heads  # of one latent: no groups


def test_a_layer_of_each_kind_stays() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = small("gemma3_text", num_hidden_layers=12, layer_types=kinds * 2)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert small("gemma3_text", num_hidden_layers=6, layer_types=["full_attention"] * 6).num_hidden_layers == LAYERS


def test_a_listed_layer_of_each_kind_stays() -> None:
    text = small("mllama").text_config
    assert (text.num_hidden_layers, list(text.cross_attention_layers)) == (2, [1])
    vision = small("qwen2_5_vl").vision_config
    assert (vision.depth, list(vision.fullatt_block_indexes)) == (2, [1])
    assert list(small("sam").vision_config.global_attn_indexes) == [1]
    text = small("gemma3n_text")
    assert text.layer_types == ["sliding_attention", "full_attention"] * 2 and text.num_kv_shared_layers == 2
    assert list(small("sam", vision_config={"global_attn_indexes": []}).vision_config.global_attn_indexes) == []


def test_parts_are_small_too() -> None:
    config = small("clip")
    assert config.text_config.hidden_size == config.vision_config.hidden_size == WIDTH
    assert config.vision_config.image_size == 224  # decides no size of a weight but that of a table


def test_stages_keep_their_widths_and_lose_depth() -> None:
    config = small("swin")
    assert list(config.depths) == [2, 2, 2, 2] and config.embed_dim == 96 and list(config.num_heads) == [3, 6, 12, 24]


def test_tokens_stay_apart_and_inside_the_vocabulary() -> None:
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = small("qwen2_vl")
    text = {getattr(config, name, None) or getattr(config.text_config, name, None) for name in tokens[:2]}
    assert len(text) == 2 and all(0 < token < VOCABULARY for token in text)


def test_sections_of_a_rotation_keep_their_sum() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    key = "rope_parameters" if hasattr(transformers.Qwen2VLTextConfig(), "rope_parameters") else "rope_scaling"
    config = shrink(transformers.Qwen2VLTextConfig(hidden_size=8192, num_attention_heads=64, **{key: rope}), ALL)
    assert sum(getattr(config, key)["mrope_section"]) == HEAD // 2 == 8


def test_given_wins_wherever_a_part_stands() -> None:
    config = transformers.AutoConfig.for_model("clip")
    made = shrink(config, ALL, lambda part: {"num_hidden_layers": 1} if part.model_type == "clip_text_model" else {})
    assert (made.text_config.num_hidden_layers, made.vision_config.num_hidden_layers) == (1, LAYERS)


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_no_cache_anywhere(name: str) -> None:
    config = no_extras(transformers.AutoConfig.for_model(name))
    assert not config.get_text_config().use_cache
