"""Tiny models of every architecture of transformers, from their own configs, and inputs that they take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from benchmarks.zoo.inputs import Inputs, candidates, failure, paddings
from benchmarks.zoo.special import FIELDS, MADE_OF
from neuron_attn_rewrite.cli.shrink import (
    COUNTS,
    HEAD,
    HEADS,
    LAYERS,
    VOCABULARY,
    WIDTHS,
    Sizes,
    arguments,
    no_extras,
    sections,
    shrink,
)

__all__ = ["NotBuilt", "architectures", "paddings", "ready", "supports", "version"]

MOST_PARAMETERS, PATIENCE = 80_000_000, 30
"""Parameters of a model, and seconds in which a config and inputs are looked for."""

GAIN = 1.5
"""Standard deviation of a weight times the root of its fan-in, at least: enough that attention is far from uniform."""

WINDOWS: Sizes = ((16, r"sliding_window|(.*_)?window_size|local_attention|attention_chunk_size|num_queries"),)
LENGTHS: Sizes = (
    (32, r"image_size|input_size|max_image_size"),
    (8, r"patch_size"),
    (4, r"num_frames"),
    (16, r"num_mel_bins|feature_size|num_freq"),
    (64, r"max_source_positions|max_spectrogram_length"),
    (128, r"max_length"),
    (512, r".*position.*"),
)
"""Windows shorter than the inputs, and short inputs."""

UNSET: Mapping[str, Any] = {
    "layer_types": ["full_attention"] * LAYERS,
    "head_dim": HEAD,
    "num_key_value_heads": HEADS // 2,
    "vocab_size": VOCABULARY,
    "prediction_length": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
"""What a model may need that its config leaves at None."""

ALL = WINDOWS + COUNTS + WIDTHS + LENGTHS
RUNGS: list[tuple[Sizes, bool]] = [
    (ALL, False),
    (ALL, True),
    (((HEADS, "num_key_value_heads"), *ALL), False),
    (WINDOWS + COUNTS + LENGTHS, False),
    (WINDOWS + COUNTS + WIDTHS, False),
    (WINDOWS + COUNTS, False),
]
"""What is shrunk, and whether unset fields are set: the first with which a model runs is taken."""

RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
"""In the place of a backbone from another library."""


def tiny(model_type: str, sizes: Sizes, unset: bool) -> PretrainedConfig:
    """A small config."""

    def given(config: PretrainedConfig) -> Mapping[str, Any]:
        own = {
            name: UNSET[name] for name in arguments(type(config)) if unset and name in UNSET and _lacks(config, name)
        }
        if getattr(config, "use_timm_backbone", False) or _kind(vars(config).get("backbone_config")) == "timm_backbone":
            own |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
            own["backbone_kwargs"] = None
            own = {name: value for name, value in own.items() if name in arguments(type(config))}
            own["backbone_config"] = dict(RESNET)
        if unset:
            own |= sections(config)
        return {**own, **FIELDS.get(config.model_type, {})}

    return no_extras(shrink(CONFIG_MAPPING[model_type](**MADE_OF.get(model_type, {})), sizes, given))


def _lacks(config: PretrainedConfig, name: str) -> bool:
    return vars(config).get(name, 0) is None


def _kind(config: Any) -> str:
    return getattr(config, "model_type", "")


def architectures() -> dict[str, type[PretrainedConfig]]:
    """Config classes by model type, of all base models."""
    return {name: CONFIG_MAPPING[name] for name in CONFIG_MAPPING if CONFIG_MAPPING[name] in MODEL_MAPPING}


def model_class(config: type[PretrainedConfig], mapping: Any = MODEL_MAPPING) -> type[nn.Module]:
    found = mapping[config]
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
            why_not = failure(model, offer)
            if why_not is None:
                return model, offer
            if time.process_time() > start + PATIENCE:
                break
            why.append(f"{', '.join(offer)}: {_short(why_not)}")
    raise NotBuilt(why[0] if why else "no inputs are known for it")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def build(
    model_type: str,
    implementation: str,
    sizes: Sizes,
    unset: bool,
    mapping: Any = MODEL_MAPPING,
    fields: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model in eval mode with weights large enough that a wrong mask shows.

    Args:
        model_type: as in the config.
        implementation: of its attention.
        sizes: see `tiny`.
        unset: see `tiny`.
        mapping: the classes of models by their config: those of base models, or for a task.
        fields: values for fields that the config has.
    """
    config = tiny(model_type, sizes, unset)
    for name, value in (fields or {}).items():
        if hasattr(config, name):
            setattr(config, name, value)
    make = model_class(CONFIG_MAPPING[model_type], mapping)._from_config  # type: ignore[attr-defined]
    # The default is not named: a part that does not support it then takes its own default.
    chosen = {} if implementation == supports(model_type)[0] else {"attn_implementation": implementation}
    size = 0
    with torch.device("meta"), contextlib.suppress(NotImplementedError):  # a value read while it is built
        size = sum(p.numel() for p in make(config, **chosen).parameters())
    if size > MOST_PARAMETERS:
        raise NotBuilt(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = make(config, **chosen)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(std=0.5)  # a table of zeros would hide that it is read
            elif p.dim() > 1 and p.numel():
                wanted = GAIN * (p.numel() / len(p)) ** -0.5
                p.mul_(max(1.0, float(wanted / p.std().clamp_min(1e-6))))
    return model.eval()  # type: ignore[no-any-return]


def version() -> str:
    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
