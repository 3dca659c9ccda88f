"""From any config of transformers to a small config of the same architecture."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

VOCABULARY, LAYERS, HEADS, WIDTH = 256, 2, 4, 64
HEAD = WIDTH // HEADS

MOST_KINDS = 4
"""A list with one entry for each layer names kinds of layers if it has at most this many different values."""

LISTED_LAYERS = r"cross_attention_layers|global_attn_indexes|fullatt_block_indexes"
"""Fields that list the numbers of the layers of one kind."""
SHARING = "num_kv_shared_layers"
"""The field that says how many of the last layers take the key and value of an earlier one."""

Sizes = tuple[tuple[int, str], ...]
Given = Callable[[Any], Mapping[str, Any]]

COUNTS: Sizes = (
    (LAYERS, r"(.*_)?num_(\w+_)?layers|num_(blocks|block_repeats)|(.*_)?layers|n_layers?|(.*_)?depth|resampler_depth"),
    (4, r"(.*_)?num_(local_)?experts|n_routed_experts|moe_num_experts|mm_tokens_per_image"),
    (2, r"(.*_)?num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|attn_layer_period|hybrid_layer_period"),
    (1, r"n_group|topk_group|num_shared_experts|n_shared_experts|first_k_dense_replace|attn_layer_offset"),
    (32, r"moe_(\w+_)?intermediate_size|expert_ffn_hidden_size|shared_(expert_)?intermediate_size"),
    (VOCABULARY, r"(.*_)?vocab_size\w*|(.*_)?codebook_size"),
)
"""Numbers of layers, experts and tokens in the vocabulary, as (largest value, pattern of the field's name)."""

WIDTHS: Sizes = (
    (HEADS, r"(.*_)?num_(attention_|encoder_attention_|decoder_attention_)?heads|n_heads?|(.*_)?attention_heads"),
    (HEADS // 2, r"(.*_)?num_(key_value_heads|kv_heads|query_groups)|multi_query_group_num|n_head_kv"),
    (WIDTH, r"(.*_)?(hidden_size|hidden_dim|embed_dim)|d_model|n_embd|dim|emb_dim|width|model_dim|embedding_size"),
    (WIDTH, r"projection_(dim|size)|condition_dim|word_embed_proj_dim|lru_width|upsample_groups"),
    (HEAD, r"(.*_)?head_dim|d_kv|kv_channels|qk_(nope|rope)_head_dim|rotary_dim|mamba_d_head"),
    (32, r"(q|kv)_lora_rank|index_head_dim"),
    (96, r"intermediate_size|.*ffn_(dim|hidden_size|intermediate_size)|d_ff|d_inner|n_inner|dim_feedforward|mlp_dim"),
    (8, r"mamba_n(um)?_heads"),
)
"""Widths, as (largest value, pattern of the field's name). The first pattern that matches the whole name decides."""


def shrink(config: Any, sizes: Sizes, given: Given = lambda config: {}) -> Any:
    """A new config of the same class whose sizes, and those of its parts, are small.

    The class makes it from smaller arguments, so the values that the class derives from them fit. The first layer of
    each kind stays, and at least two layers. A config with stages of several widths keeps the widths.

    Args:
        config: any config of transformers. It is not changed.
        sizes: the largest value of an integer, by the pattern of its name.
        given: more arguments for the class, as a function of the config.
    """
    if _is_list(getattr(config, "depths", None)):
        sizes = tuple(row for row in sizes if row not in WIDTHS)
    names = arguments(type(config))
    inner = [name for name, value in vars(config).items() if _is_config(value)]
    old = {name: _field(config, name) for name in dict.fromkeys([*names, *inner]) if _has(config, name)}
    old = {name.removeprefix("_"): value for name, value in old.items()}  # _out_features is given as out_features
    layers = "num_hidden_layers" if "num_hidden_layers" in old else "depth"
    count = old.get(layers)
    kinds = _kinds(old, count)
    kept = _layers({**old, **kinds}, count)

    def small(fields: Mapping[str, Any]) -> dict[str, Any]:
        made = {name: _smaller(name, value, sizes, given) for name, value in fields.items()}
        return made | _of_latents(fields, made)

    new = small(old)
    if "depths" not in old and any(_stage(name) > LAYERS for name in new.get("out_features") or ()):
        # Each layer is a stage. Without a choice, the class takes the last stage.
        new |= {"out_features": None, "out_indices": None}
    if kept:
        new |= {name: type(v)(v[i] for i in kept) for name, v in old.items() if _is_list(v) and len(v) == count}
        for name, kind in kinds.items():
            its = [n for n, i in enumerate(kept) if kind[i]]
            new[name] = len(its) if name == SHARING else type(old[name])(its)
        new[layers] = len(kept)
    for name in ("rope_parameters", "rope_scaling"):
        rope = new.get(name)
        if isinstance(rope, dict) and _is_list(rope.get("mrope_section")):
            total = round(sum(rope["mrope_section"]) * _head_dim(new) / _head_dim(old))
            new[name] = {**rope, "mrope_section": _portions(rope["mrope_section"], total)}
    if by_layer := getattr(config, "is_heterogeneous", False) and config.to_dict().get("per_layer_config"):
        changes = {int(i): change for i, change in by_layer.items()}
        whole = {i: small({**old, **change}) for i, change in changes.items() if i in kept}
        new["per_layer_config"] = {
            kept.index(i): {name: made[name] for name in changes[i]} for i, made in whole.items()
        }
    made = type(config)(**{**new, **given(config)})
    for name in set(arguments(_base(type(config)))) - set(names):
        if name in vars(config):
            setattr(made, name, _smaller(name, vars(config)[name], sizes, given))
    return made


def sections(config: Any) -> Mapping[str, Any]:
    """The sections of a rotation by time, height and width, where a class leaves them to the code of its model.

    That code then takes the sections of the published model, which do not fit a small head.
    """
    made: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = vars(config).get(name, 0) or {}
        is_nested = any(isinstance(value, dict) for value in rope.values())
        if name in arguments(type(config)) and "mrope_section" not in rope and not is_nested:
            share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
            parts = _portions((1, 1, 1), int(HEAD * share / 2))[::-1]
            made[name] = {"rope_type": "default", "rope_theta": 1e4, **rope, "mrope_section": parts}
    return made


def _stage(name: Any) -> int:
    return int(name.removeprefix("stage")) if re.fullmatch(r"stage\d+", str(name)) else 0


def no_extras(config: Any) -> Any:
    """The same config, changed in place, and all parts of it: no cache, attentions or hidden states among the outputs,
    and no weights from the network."""
    for part in filter(_is_config, list(vars(config).values())):
        no_extras(part)
    for name in ("use_cache", "output_attentions", "output_hidden_states", "use_pretrained_backbone"):
        if getattr(config, name, False):
            setattr(config, name, False)
    return config


def _smaller(name: str, value: Any, sizes: Sizes, given: Given) -> Any:
    if _is_config(value):
        part = shrink(value, sizes, given)
        if hasattr(part, "__dataclass_fields__"):
            return part
        return {name: v for name, v in part.to_dict().items() if name in ("model_type", *arguments(type(part)))}
    if _is_list(value) and name == "depths":
        return type(value)(min(depth, LAYERS) for depth in value)
    if _is_list(value) and value and all(type(v) is int for v in value):
        return type(value)(_smaller(name, v, sizes, given) for v in value)
    if type(value) is not int:
        return value
    if name.endswith(("token_id", "token_index", "_idx")) and value >= VOCABULARY:
        return VOCABULARY - 1 - sum(map(ord, name)) % 32  # so that different tokens stay different
    return next((min(small, value) for small, pattern in sizes if value > 0 and re.fullmatch(pattern, name)), value)


def _of_latents(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that follow from others in multi-head latent attention, where all heads share one latent."""
    made = {}
    if new.get("kv_lora_rank") and new.get("num_key_value_heads"):
        made["num_key_value_heads"] = new["num_attention_heads"]
    for name in ("head_dim", "qk_head_dim"):
        if old.get(name) and old[name] == sum(old.get(part) or 0 for part in LATENT_PARTS):
            made[name] = sum(new[part] for part in LATENT_PARTS)
    return made


LATENT_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim")


def _has(config: Any, name: str) -> bool:
    return name in vars(config) or hasattr(config, name)


def _field(config: Any, name: str) -> Any:
    """The value of the config itself. Where layers have other values, reading the attribute is an error."""
    return vars(config)[name] if name in vars(config) else getattr(config, name)


def _is_config(value: Any) -> bool:
    return hasattr(value, "model_type") and hasattr(value, "to_dict")


def _base(kind: type) -> type:
    """The class of all configs."""
    return next(base for base in reversed(kind.__mro__) if hasattr(base, "model_type"))


def arguments(kind: type) -> list[str]:
    """The names of the arguments of a config class and of its base classes."""
    base = _base(kind)
    classes = [kind] if hasattr(kind, "__dataclass_fields__") else [c for c in kind.__mro__ if issubclass(c, base)][:-1]
    named = [name for c in classes or [kind] for name, p in inspect.signature(c).parameters.items() if p.kind in KINDS]
    return list(dict.fromkeys(named))


KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _head_dim(fields: Mapping[str, Any]) -> float:
    given = fields.get("head_dim")
    return float(given or fields["hidden_size"] / fields["num_attention_heads"])


def _layers(old: Mapping[str, Any], count: Any) -> list[int]:
    """The first layer of each kind, and at least two layers. Empty if no list has an entry for each layer."""
    lists = [v for v in old.values() if _is_list(v) and len(v) == count]
    kinds = [v for v in lists if all(isinstance(kind, (str, int)) for kind in v) and len(set(v)) <= MOST_KINDS]
    first = {kind: i for i, kind in reversed(list(enumerate(zip(*kinds, strict=True))))}
    others = [i for i in range(count or 0) if i not in first.values()]
    return sorted([*first.values(), *others[: max(0, LAYERS - len(first))]]) if lists else []


def _kinds(old: Mapping[str, Any], count: Any) -> dict[str, list[bool]]:
    """For each field that chooses some of the layers: whether each layer is one of them."""
    if not isinstance(count, int):
        return {}
    listed = {name: v for name, v in old.items() if re.fullmatch(LISTED_LAYERS, name) and _is_list(v)}
    chosen = {name: [i in v for i in range(count)] for name, v in listed.items()}
    sharing = old.get(SHARING) or 0
    return chosen | ({SHARING: [i >= count - sharing for i in range(count)]} if sharing else {})


def _portions(parts: Iterable[int], total: int) -> list[int]:
    """Integers that have this sum and about these proportions."""
    parts = list(parts)
    smaller = [max(1, part * total // sum(parts)) for part in parts[:-1]]
    return [*smaller, total - sum(smaller)]
