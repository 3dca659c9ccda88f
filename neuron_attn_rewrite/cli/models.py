"""From the MODEL argument of the command line to a model and its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuron_attn_rewrite.cli import configs
from neuron_attn_rewrite.cli.build import build
from neuron_attn_rewrite.cli.functions import from_function
from neuron_attn_rewrite.cli.inputs import inputs
from neuron_attn_rewrite.cli.shrink import no_extras
from neuron_attn_rewrite.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Asked:
    """The model that the command line asks for."""

    model: str
    size: str | None = None
    """"tiny" or "full"; None means tiny for a model type, and full for a config."""
    seq_len: int = 2048
    batch: int = 1
    dtype: str = "bf16"
    attn: str | None = None
    mask: bool = True
    """Whether a mask of ones is among the inputs."""
    changes: Sequence[tuple[str, str]] = ()
    """Fields of the config that get other values."""
    numbers: bool = False
    """Whether the weights need values, because the model will be run."""
    part: str | None = None
    """The submodule to take, such as a vision tower. None means the whole model."""


@dataclass(frozen=True)
class Loaded:
    """A model and its inputs."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What the user may not expect, one sentence each."""
    is_small: bool = False
    """Whether the model is small enough to be run here."""


def load(asked: Asked) -> Loaded:
    """The model and its inputs.

    Raises:
        InputError: MODEL names nothing that can be loaded, or no inputs are known for it.
        RewriteError: transformers is not installed.
    """
    file, colon, function = asked.model.rpartition(":")
    if colon and file.endswith(".py"):
        return Loaded(*from_function(Path(file), function))
    if asked.model.endswith(".py"):
        raise InputError(
            f"{asked.model} is a Python file. Name its function that returns (model, inputs): {asked.model}:make."
        )
    is_type = configs.is_type(asked.model)
    config = configs.read(asked.model)
    notes = () if is_type else configs.misspelt_fields(config, Path(asked.model))
    size = asked.size or ("tiny" if is_type else "full")
    if size == "full" and is_type:
        configs.make_full(config, asked.model)
    if size == "tiny":
        config = configs.tiny(config, asked.model)
    configs.change(config, asked.changes)
    configs.make_room(config, asked.seq_len, size == "tiny")
    no_extras(config)
    weights = asked.model if asked.numbers and Path(asked.model).is_dir() else None
    model = build(config, asked.model, DTYPES[asked.dtype], asked.attn, weights=weights, numbers=asked.numbers)
    part = model if asked.part is None else _part(model, asked.part)
    given = inputs(part, asked.batch, asked.seq_len, asked.mask)
    if part is model:
        notes += _towers_without_input(model, given)
    return Loaded(part, (), given, notes, size == "tiny")


def _part(model: nn.Module, name: str) -> nn.Module:
    known = [path for path, part in model.named_modules() if path and hasattr(part, "main_input_name")]
    if name not in known:
        raise InputError(
            f"--part {name}: {type(model).__name__} has no such part. The parts with inputs of their own are "
            f"{', '.join(known) or 'none'}."
        )
    return model.get_submodule(name)


def _towers_without_input(model: Any, given: Mapping[str, Any]) -> tuple[str, ...]:
    """One note for each vision or audio tower that does not run, because the inputs are text only."""
    if {"pixel_values", "input_features", "input_values"} & given.keys():
        return ()
    parts: list[Any] = [getattr(model.config, name, None) for name in ("vision_config", "audio_config")]
    kinds = {part.model_type for part in parts if hasattr(part, "model_type")}
    towers: list[str] = []
    for name, part in model.named_modules():
        is_tower = getattr(getattr(part, "config", None), "model_type", None) in kinds
        is_inside = name.startswith(tuple(f"{tower}." for tower in towers))
        if name and is_tower and hasattr(part, "main_input_name") and not is_inside:
            towers.append(name)
    return tuple(f"{name} is not run, because the inputs are text: --part {name} explains it." for name in towers)
