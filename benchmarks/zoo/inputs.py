"""Inputs that a model of transformers takes, by the names of its arguments."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.special import INPUTS
from neuron_attn_rewrite.cli.shrink import VOCABULARY

BATCH, LENGTH = 2, 64

Inputs = dict[str, Tensor]


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Inputs to try, the likeliest first: a main input, what the signature demands, then what else is known."""
    torch.manual_seed(1)
    if model.config.model_type in INPUTS:
        yield INPUTS[model.config.model_type]()
        return
    signature = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "")
    main = main if isinstance(main, str) else main[0]
    known = {name: made for name in signature if (made := list(named(model.config, name)))}
    required = [n for n, p in signature.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if "decoder_input_ids" in known:
        required.append("decoder_input_ids")
    leads = [n for n in dict.fromkeys([main, *MAIN]) if n in known]
    extras = [n for n in known if n not in MAIN and n not in required and n != "attention_mask"]
    sets = [
        *([lead, *required] for lead in leads),
        *([lead, *required, "pixel_values"] for lead in leads if "pixel_values" in known),
        *([lead, *required, "attention_mask"] for lead in leads),
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
    elif name == "attention_mask":
        yield torch.ones(BATCH, LENGTH, dtype=torch.int64)
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


def failure(model: nn.Module, inputs: Inputs) -> Exception | None:
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
        if any(masks) and all(failure(model, call) is None for call in calls.values()):
            return calls
    return {}
