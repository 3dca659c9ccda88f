"""What the rules for sizes and inputs do not get right, by model type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, randn

from neuron_attn_rewrite.cli.shrink import VOCABULARY

IMAGE = VOCABULARY - 6
"""The token that stands for a piece of an image."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}

MADE_OF: Mapping[str, Mapping[str, Any]] = {
    "phi4_multimodal": {"vision_config": {}, "audio_config": {}},
    "vision-text-dual-encoder": {"vision_config": {"model_type": "vit"}, "text_config": {"model_type": "bert"}},
}
"""Parts without which a config can't be made."""

FIELDS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "clap_audio_model": {
        "num_mel_bins": 64,
        "spec_size": 256,
        "patch_embeds_hidden_size": 32,
        "window_size": 8,
        "hidden_size": 256,
    },
    "blip-2": {"image_token_index": IMAGE, "image_token_id": IMAGE, "num_query_tokens": 16},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_routed_experts": 4},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "depth_pro": {"patch_size": 32, "intermediate_hook_ids": [1, 0]},
    "emu3": {"vocabulary_map": {"<image>": IMAGE}},
    "ernie4_5_vl_moe_text": {"rope_parameters": ROPE},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4,
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "2/4"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "grounding-dino": {"num_queries": 16},
    "instructblip": {"image_token_index": IMAGE, "image_token_id": IMAGE, "num_query_tokens": 16},
    "instructblipvideo": {"video_token_index": IMAGE, "video_token_id": IMAGE, "num_query_tokens": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_k25_vision": {"pos_emb_height": 8, "pos_emb_width": 8},
    "lw_detr": {"projector_scale_factors": [1.0], "num_queries": 16},
    "lw_detr_vit": {
        "image_size": 64,
        "pretrain_image_size": 64,
        "num_windows": 4,
        "out_features": ["stage1", "stage2"],
        "out_indices": [1, 2],
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mask2former": {"feature_size": 64, "mask_feature_size": 64},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"out_hidden_size": 64},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 16},
    "oneformer": {"conv_dim": 64, "mask_dim": 64},
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 2},
    "rf_detr": {"num_queries": 16},
    "pvt_v2": {"image_size": [64, 64]},
    "pvt": {"image_size": 64},
    "seggpt": {"image_size": [64, 32], "merge_index": 0, "intermediate_hidden_state_indices": [0, 1]},
    "transfo-xl": {"cutoffs": [64, 128, 192], "proj_share_all_but_first": True},
    "xlnet": {"d_head": 16, "n_head": 4, "d_model": 64},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "videoprism_vision_model": {"tubelet_size": [1, 8, 8]},
    "zamba2": {"use_mem_rope": False, "attention_head_dim": 32, "use_mamba_kernels": False},
    "deta": {"two_stage": False, "with_box_refine": False},
    "kosmos-2": {"latent_query_num": 8},
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "blocks_per_stage": [1, 1, 2, 1],
        "global_attention_blocks": [3],
        "image_size": [128, 128],
        "window_size_per_stage": [8, 4, 4, 2],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "sam2_prompt_encoder": {"image_size": 128, "patch_size": 16},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8},
    "step3p5": {"sliding_window": 16},
    "emu3_vqgan": {"base_channels": 32},
    "phi4_multimodal": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
        }
    },
}
"""Fields of a config, wherever it stands."""


def words(length: int = 64, pieces: int = 0) -> Tensor:
    """Tokens, so many pieces of an image first."""
    tokens = torch.randint(3, 200, (2, length))
    tokens[:, :pieces] = IMAGE
    return tokens


def of_blip(pixels: tuple[int, ...]) -> dict[str, Tensor]:
    made = {"pixel_values": randn(2, *pixels), "input_ids": words(64, 16), "decoder_input_ids": words(16)}
    return made | {"attention_mask": torch.ones(2, 64, dtype=torch.int64)}


INPUTS: Mapping[str, Callable[[], dict[str, Tensor]]] = {
    "blip-2": lambda: of_blip((3, 32, 32)),
    "clap": lambda: {
        "input_ids": words(),
        "input_features": randn(2, 1, 128, 64),
        "is_longer": torch.zeros(2, 1, dtype=torch.bool),
    },
    "clvp": lambda: {"input_ids": words(), "input_features": randn(2, 16, 128)},
    "decision_transformer": lambda: {
        "states": randn(2, 16, 17),
        "actions": randn(2, 16, 4),
        "rewards": randn(2, 16, 1),
        "returns_to_go": randn(2, 16, 1),
        "timesteps": torch.arange(16).expand(2, 16),
        "attention_mask": torch.ones(2, 16),
    },
    "dia": lambda: {"input_ids": words(), "decoder_input_ids": torch.randint(3, 200, (2, 16, 9))},
    "fastspeech2_conformer_with_hifigan": lambda: {"input_ids": torch.randint(3, 70, (2, 32))},
    "fun_asr_nano_encoder": lambda: {
        "input_features": randn(2, 64, 112),
        "input_features_mask": torch.ones(2, 64, dtype=torch.int64),
    },
    "idefics": lambda: {
        "input_ids": words(),
        "pixel_values": randn(2, 1, 3, 32, 32),
        "image_attention_mask": torch.ones(2, 64, 1, dtype=torch.int64),
    },
    "instructblip": lambda: of_blip((3, 32, 32)) | {"qformer_input_ids": words(16)},
    "instructblipvideo": lambda: of_blip((4, 3, 32, 32)) | {"qformer_input_ids": words(16)},
    "kosmos-2": lambda: {
        "input_ids": words(),
        "pixel_values": randn(2, 3, 32, 32),
        "image_embeds_position_mask": (torch.arange(64) < 8).long().expand(2, 64),
    },
    "mimi_decoder": lambda: {"latents": randn(2, 64, 32)},
    "mask2former": lambda: {"pixel_values": randn(2, 3, 64, 64)},
    "oneformer": lambda: {"pixel_values": randn(2, 3, 64, 64), "task_inputs": words(77)},
    "perceiver": lambda: {"inputs": randn(2, 64, 64)},
    "pocket_tts_audio_tokenizer_decoder": lambda: {"latents": randn(2, 64, 32)},
    "qwen3_asr_encoder": lambda: {
        "input_features": randn(2, 16, 200),
        "input_features_mask": torch.ones(2, 200, dtype=torch.int64),
    },
    "sam3": lambda: {"pixel_values": randn(2, 3, 32, 32), "input_ids": words(32)},
    "siglip2": lambda: {
        "input_ids": words(),
        "pixel_values": randn(2, 16, 192),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    "seggpt": lambda: {
        "pixel_values": randn(2, 3, 32, 32),
        "prompt_pixel_values": randn(2, 3, 32, 32),
        "prompt_masks": randn(2, 3, 32, 32),
    },
    "speecht5": lambda: {"input_values": randn(2, 32, 64), "decoder_input_values": randn(2, 16, 64)},
    "timesfm": lambda: {
        "past_values": randn(2, 128),
        "past_values_padding": torch.zeros(2, 128, dtype=torch.int64),
        "freq": torch.zeros(2, 1, dtype=torch.int64),
    },
    "owlv2": lambda: {"input_ids": words(16), "pixel_values": randn(2, 3, 32, 32)},
    "owlvit": lambda: {"input_ids": words(16), "pixel_values": randn(2, 3, 32, 32)},
    "vilt": lambda: {"input_ids": words(32), "pixel_values": randn(2, 3, 32, 32)},
    "depth_pro": lambda: {"pixel_values": randn(2, 3, 128, 128)},
    "omdet-turbo": lambda: {
        "pixel_values": randn(2, 3, 64, 64),
        "classes_input_ids": words(8).repeat(2, 1),
        "classes_attention_mask": torch.ones(4, 8, dtype=torch.int64),
        "tasks_input_ids": words(8),
        "tasks_attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "classes_structure": torch.tensor([2, 2]),
    },
    "video_llama_3_vision": lambda: {
        "pixel_values": randn(32, 192),
        "grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "merge_sizes": torch.tensor([2, 2]),
    },
    "pp_ocrv5_mobile_rec": lambda: {"pixel_values": randn(2, 3, 48, 160)},
    "pp_ocrv5_server_rec": lambda: {"pixel_values": randn(2, 3, 48, 160)},
    "minicpm_ocr_vision": lambda: {"pixel_values": randn(1, 3, 8, 128), "target_sizes": torch.tensor([[4, 4]])},
    "minicpmv4_7_vision": lambda: {"pixel_values": randn(1, 3, 8, 128), "target_sizes": torch.tensor([[4, 4]])},
    "inkling2_vision": lambda: {"pixel_values": randn(32, 192), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)},
    "kimi_k25_vision": lambda: {"pixel_values": randn(32, 3, 8, 8), "grid_thw": torch.tensor([[1, 4, 4]] * 2)},
    "muse_glimmer_vision": lambda: {"pixel_values": randn(32, 384), "grid_thw": torch.tensor([[1, 4, 4]] * 2)},
    "muse_spark_vision": lambda: {"pixel_values": randn(32, 384), "grid_thw": torch.tensor([[1, 4, 4]] * 2)},
    "graphormer": lambda: {
        "input_nodes": words(16).unsqueeze(-1),
        "input_edges": torch.randint(1, 9, (2, 16, 16, 5, 1)),
        "attn_bias": torch.zeros(2, 17, 17),
        "in_degree": torch.randint(1, 9, (2, 16)),
        "out_degree": torch.randint(1, 9, (2, 16)),
        "spatial_pos": torch.randint(1, 9, (2, 16, 16)),
        "attn_edge_type": torch.randint(1, 9, (2, 16, 16, 1)),
    },
}
"""All inputs of a model."""
