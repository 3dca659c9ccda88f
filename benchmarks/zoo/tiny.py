"""Tiny models of every architecture of transformers, from their own configs, and inputs that they take."""

from __future__ import annotations

import inspect
import itertools
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

BATCH, LENGTH, VOCABULARY, LAYERS, WINDOW, HEAD = 2, 64, 256, 2, 16, 16
MOST_PARAMETERS, PATIENCE = 30_000_000, 20
"""Parameters of a model, and seconds in which a config and inputs are looked for."""

GAIN = 1.5
"""Standard deviation of a weight times the root of its fan-in, at least: enough that attention is far from uniform."""

COUNTS = [
    (r"(num_(hidden_|encoder_|decoder_|block_)?layers|n_layers?|(encoder|decoder)_layers|.*_num_layers|depth)", LAYERS),
    (r"(moe_intermediate_size|expert_ffn_hidden_size|shared_expert_intermediate_size)", 32),
    (r"(num_(local_)?experts|n_routed_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok|moe_k|moe_topk|num_experts_per_token)", 2),
    (r"(n_group|topk_group|num_shared_experts|n_shared_experts|first_k_dense_replace)", 1),
    (r"vocab_size.*|(text_)?vocab_size", VOCABULARY),
    (r"(sliding_window|attention_window_size|local_attention|attention_chunk_size|num_queries)", WINDOW),
]
WIDTHS = [
    (r"(num_(attention_|encoder_attention_|decoder_attention_)?heads|n_heads?|(en|de)coder_attention_heads)", 4),
    (r"num_(key_value_heads|kv_heads|query_groups)|multi_query_group_num|n_head_kv", 2),
    (r"(hidden_size|d_model|n_embd|embed_dim|dim|hidden_dim|emb_dim|width|model_dim|encoder_hidden_size)", 64),
    (r"(attention_hidden_size|word_embed_proj_dim|embedding_size|projection_dim|out_hidden_size|lru_width)", 64),
    (r"(head_dim|d_kv|attention_head_dim|v_head_dim|global_head_dim|kv_channels|qk_nope_head_dim)", HEAD),
    (r"qk_rope_head_dim|qk_head_dim|rotary_dim", HEAD),
    (r"(q_lora_rank|kv_lora_rank|index_head_dim)", 32),
    (r"(intermediate_size|.*ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|dim_feedforward|ffn_intermediate_size)", 96),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", HEAD),
    (r"upsample_groups", 64),
    (r"window_size", WINDOW),
]
INPUTS = [
    (r"(image_size|input_size|max_image_size)", 32),
    (r"patch_size", 8),
    (r"(num_mel_bins|feature_size|num_freq)", 16),
    (r"(max_source_positions|max_spectrogram_length)", 64),
    (r"max_length", 128),
]
"""The value that an int field gets, by its name."""
UNSET: dict[str, Any] = {
    "layer_types": ["full_attention"] * LAYERS,
    "head_dim": HEAD,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "prediction_length": 8,
}
"""... and where a model needs a field that its config leaves at None."""

RUNGS = [
    (COUNTS + WIDTHS + INPUTS, False),
    (COUNTS + WIDTHS + INPUTS, True),
    ([(r"num_key_value_heads", 4), *COUNTS, *WIDTHS, *INPUTS], False),
    (COUNTS + INPUTS, False),
    (COUNTS + WIDTHS, False),
    (COUNTS, False),
]
"""What is shrunk, and whether unset fields are set: the first with which a model runs is taken."""

CUT = re.compile(r"layer_types|block_types|layers_block_type|mlp_layer_types|attn_layer_indices|hybrid_layer_ids")

Inputs = dict[str, Tensor]


def shrink(config: PretrainedConfig, sizes: list[tuple[str, int]], unset: bool) -> PretrainedConfig:
    """The config with small sizes, its own and those of its parts."""
    old_head = _head_dim(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            part = shrink(value, sizes, unset)
            vars(config)[name] = _without_timm(part)
        elif name in ("use_cache", "output_attentions", "output_hidden_states"):
            vars(config)[name] = False
        elif value is None and unset and name in UNSET:
            _set(config, name, UNSET[name])
        elif isinstance(value, int) and not isinstance(value, bool):
            _set(config, name, _small(name, value, sizes))
        elif isinstance(value, (list, tuple)) and CUT.fullmatch(name) and len(value) > LAYERS:
            _set(config, name, _each_kind(list(value)))
    ropes = (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None))
    for rope in {id(rope): rope for rope in ropes}.values():
        if isinstance(rope, dict) and isinstance(rope.get("mrope_section"), (list, tuple)):
            rope["mrope_section"] = _portions(rope["mrope_section"], _head_dim(config) / old_head)
        elif isinstance(rope, dict) and unset:
            rotary = _head_dim(config) * rope.get("partial_rotary_factor", 1.0)
            rope["mrope_section"] = _portions([2, 3, 3], rotary / HEAD)
    return config


def _without_timm(config: PretrainedConfig) -> PretrainedConfig:
    """A small ResNet in the place of a backbone from another library."""
    if config.model_type != "timm_backbone":
        return config
    return transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 32, 64],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )


def _head_dim(config: PretrainedConfig) -> float:
    given = vars(config).get("head_dim")
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    plain = width / heads if isinstance(width, int) and isinstance(heads, int) and heads else 1.0
    return float(given) if isinstance(given, int) else plain


def _portions(parts: list[int], factor: float) -> list[int]:
    """Integers in about the same proportions, whose sum is `factor` times the sum."""
    smaller = [max(1, int(p * factor)) for p in parts[:-1]]
    return [*smaller, round(sum(parts) * factor) - sum(smaller)]


def _small(name: str, value: int, sizes: list[tuple[str, int]]) -> int:
    if name.endswith(("token_id", "token_index", "_idx")) and value >= VOCABULARY:
        return VOCABULARY - 1 - sum(map(ord, name)) % 32
    for pattern, small in sizes:
        if re.fullmatch(pattern, name):
            return min(small, value) if value > 0 else value
    return min(value, 512) if "position" in name else value


def _each_kind(values: list[Any]) -> list[Any]:
    """Two entries, of different kinds if there are any."""
    kinds = list(dict.fromkeys(values)) if all(isinstance(v, str) for v in values) else []
    return (kinds + values)[:LAYERS]


def _set(config: PretrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a derived property
        vars(config)[name] = value


def architectures() -> dict[str, type[PretrainedConfig]]:
    """Config classes by model type, of all base models."""
    return {name: CONFIG_MAPPING[name] for name in CONFIG_MAPPING if CONFIG_MAPPING[name] in MODEL_MAPPING}


def model_class(config: type[PretrainedConfig]) -> type[nn.Module]:
    found = MODEL_MAPPING[config]
    return found[0] if isinstance(found, (list, tuple)) else found


def supports(model_type: str) -> list[str]:
    """The attention implementations of an architecture, the default first."""
    try:
        has_sdpa = getattr(model_class(CONFIG_MAPPING[model_type]), "_supports_sdpa", False)
    except Exception:  # listed, but its class can't be imported
        has_sdpa = False
    return ["sdpa", "eager"] if has_sdpa else ["eager"]


class NotBuilt(Exception):
    """No config or no inputs were found with which the model runs."""


def ready(model_type: str, implementation: str) -> tuple[nn.Module, Inputs]:
    """A model and inputs with which it runs.

    Raises:
        NotBuilt: there are none.
    """
    why: list[str] = []
    start = time.process_time()
    for rung in RUNGS:
        if time.process_time() > start + PATIENCE:
            break
        try:
            model = build(model_type, implementation, *rung)
        except Exception as error:
            why.append(_short(error))
            continue
        for offer in candidates(model):
            failure = _failure(model, offer)
            if failure is None:
                return model, offer
            if time.process_time() > start + PATIENCE:
                break
            why.append(f"{', '.join(offer)}: {_short(failure)}")
    raise NotBuilt(why[0] if why else "no inputs are known for it")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def build(model_type: str, implementation: str, sizes: list[tuple[str, int]], unset: bool) -> nn.Module:
    """A model in eval mode with weights large enough that a wrong mask shows."""
    config_class = CONFIG_MAPPING[model_type]
    config = shrink(config_class(), sizes, unset)
    make = model_class(config_class)._from_config  # type: ignore[attr-defined]
    # The default is not named: a part that does not support it then takes its own default.
    chosen = {} if implementation == supports(model_type)[0] else {"attn_implementation": implementation}
    with torch.device("meta"):
        size = sum(p.numel() for p in make(config, **chosen).parameters())
    if size > MOST_PARAMETERS:
        raise NotBuilt(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = make(config, **chosen)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(std=0.5)  # a table of zeros would hide that it is read
            elif p.dim() > 1:
                wanted = GAIN * (p.numel() / len(p)) ** -0.5
                p.mul_(max(1.0, float(wanted / p.std().clamp_min(1e-6))))
    return model.eval()  # type: ignore[no-any-return]


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Inputs to try, the likeliest first: a main input, what the signature demands, then what else is known."""
    torch.manual_seed(1)
    signature = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "")
    known = {name: made for name in signature if (made := list(named(model.config, name)))}
    required = [n for n, p in signature.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if "decoder_input_ids" in known:
        required.append("decoder_input_ids")
    leads = [n for n in dict.fromkeys([main, *MAIN]) if n in known]
    extras = [n for n in known if n not in MAIN and n not in required]
    sets = [
        *([lead, *required] for lead in leads),
        *([lead, *required, "pixel_values"] for lead in leads if "pixel_values" in known),
        *([lead, *required, *extras] for lead in leads),
        [*required, *leads, *extras],
        required,
    ]
    tried: set[tuple[str, ...]] = set()
    for names in sets:
        chosen = tuple(dict.fromkeys(n for n in names))
        if not chosen or chosen in tried or any(n not in known for n in chosen):
            continue
        tried.add(chosen)
        for values in itertools.islice(itertools.product(*(known[n] for n in chosen)), 48):
            yield dict(zip(chosen, values, strict=True))


MAIN = (
    "input_ids pixel_values input_values input_features inputs_embeds hidden_states pixel_values_videos past_values"
).split()


def named(config: Any, name: str) -> Iterator[Tensor]:
    """Tensors that an argument of this name may be, by the conventions of transformers."""
    words = getattr(config, "vocab_size", None) or VOCABULARY
    ids = torch.randint(3, max(4, min(words, VOCABULARY - 40)), (BATCH, LENGTH))
    hidden = getattr(config, "hidden_size", getattr(config, "d_model", None)) or 64
    size = _image_size(config)
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    patch = getattr(vision, "patch_size", 8)
    if name in ("input_ids", "decoder_input_ids", "qformer_input_ids"):
        yield ids if name != "decoder_input_ids" else ids.flip(1)
    elif name in ("pixel_values", "prompt_pixel_values"):
        height, width = size
        yield torch.randn(BATCH, channels, height, width)
        yield torch.randn(BATCH, 1, channels, height, width)
        yield torch.randn(BATCH, 2, channels, height, width)
        yield torch.randn(BATCH, 4, channels, height, width)
        if isinstance(patch, int):
            yield torch.randn(16, channels * patch**2 * (getattr(vision, "temporal_patch_size", None) or 1))
            yield torch.randn(BATCH, 16, channels * patch**2)
    elif name == "pixel_values_videos":
        yield torch.randn(BATCH, 4, channels, *size)
    elif name == "input_values":
        yield from (torch.randn(*shape) for shape in ((BATCH, 4000), (BATCH, 1, 3840), (BATCH, 128, 16), (BATCH, 3840)))
    elif name == "input_features":
        sizes = {16, 80, 128, getattr(config, "num_mel_bins", 16), getattr(config, "input_dim", 16), hidden}
        for mel, frames in itertools.product(sorted(n for n in sizes if isinstance(n, int)), (128, 160, 3000)):
            yield torch.randn(BATCH, mel, frames)
            yield torch.randn(BATCH, frames, mel)
    elif name == "hidden_states" and isinstance(patch, int) and hasattr(config, "spatial_merge_size"):
        frames = getattr(config, "temporal_patch_size", None) or 1
        yield torch.randn(32, channels * frames * patch**2)
        yield torch.randn(32, hidden)
    elif name in ("inputs_embeds", "hidden_states", "query_embeds", "encoder_hidden_states"):
        yield torch.randn(BATCH, LENGTH, hidden)
    elif name in ("grid_thw", "image_grid_thw"):
        yield torch.tensor([[1, 4, 4], [1, 4, 4]])
        yield torch.tensor([[1, 4, 4]])
    elif name == "bbox":
        yield torch.randint(0, 500, (BATCH, LENGTH, 4)).sort(-1).values
        yield torch.rand(BATCH, LENGTH, 8)
        yield torch.rand(BATCH, LENGTH, 4).sort(-1).values
    elif name == "visual_feats":
        yield torch.randn(BATCH, 10, getattr(config, "visual_feat_dim", 2048))
    elif name == "visual_pos":
        yield torch.rand(BATCH, 10, getattr(config, "visual_pos_dim", 4))
    elif name == "spatial_shapes":
        yield torch.tensor([[4, 4]] * BATCH)
    elif name == "pixel_attention_mask":
        yield torch.ones(BATCH, 16, dtype=torch.int64)
    elif name == "pixel_position_ids":
        yield (
            torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
            .reshape(1, 16, 2)
            .expand(BATCH, 16, 2)
        )
    elif name == "input_features_mask":
        yield torch.ones(BATCH, 128, dtype=torch.int64)
    elif name in ("past_values", "future_values"):
        length = getattr(config, "context_length", LENGTH)
        lags = max(getattr(config, "lags_sequence", None) or [0])
        yield torch.randn(BATCH, length + lags)
        yield torch.randn(BATCH, length, getattr(config, "num_input_channels", 1))
    elif name == "past_time_features":
        length = getattr(config, "context_length", LENGTH) + max(getattr(config, "lags_sequence", None) or [0])
        yield torch.randn(BATCH, length, getattr(config, "num_time_features", 0))
    elif name == "past_observed_mask":
        yield torch.ones(BATCH, getattr(config, "context_length", LENGTH) + max(getattr(config, "lags_sequence", [0])))
    elif name == "action_embeds":
        yield torch.randn(BATCH, 8, hidden)
    elif name == "image_embeds_position_mask":
        mask = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        mask[:, 1 : 1 + getattr(config, "latent_query_num", 8)] = 1
        yield mask


def _image_size(config: Any) -> tuple[int, int]:
    for holder in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(holder, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (list, tuple)) and size:
            return int(size[0]), int(size[-1])
    return 64, 64


def _failure(model: nn.Module, inputs: Inputs) -> Exception | None:
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return error
    return None


LENGTHS = {
    "attention_mask": (("input_ids", 1), ("input_values", -1), ("input_features", 2), ("input_features", 1)),
    "decoder_attention_mask": (("decoder_input_ids", 1),),
}
"""Of which input and dim a mask may have the length."""


def paddings(model: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    """The inputs with masks that pad nothing, the end of the first and the begin of the second sequence."""
    names = inspect.signature(model.forward).parameters
    options = [
        [(mask, inputs[of].shape[dim]) for of, dim in lengths if of in inputs] or [None]
        for mask, lengths in LENGTHS.items()
        if mask in names
    ]
    for masks in itertools.product(*options):
        calls = {padding: dict(inputs) for padding in ("ones", "right", "left")}
        for mask, length in filter(None, masks):
            for padding, call in calls.items():
                call[mask] = torch.ones(BATCH, length, dtype=torch.int64)
                if padding == "right":
                    call[mask][0, length * 3 // 4 + 1 :] = 0
                if padding == "left":
                    call[mask][1, : length // 3] = 0
        if any(masks) and all(_failure(model, call) is None for call in calls.values()):
            return calls
    return {}


def version() -> str:
    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
