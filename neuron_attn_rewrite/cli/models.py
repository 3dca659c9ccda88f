"""From the MODEL argument of the command line to a model and its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
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
    fresh: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    """Other inputs of the same shapes, positional and by keyword. Token ids have padding in their mask."""


def is_function(word: str) -> bool:
    """Whether MODEL is a function in a file, such as `model.py:make`."""
    file, colon, _ = word.rpartition(":")
    return bool(colon) and file.endswith(".py")


def load(asked: Asked) -> Loaded:
    """The model and its inputs.

    Raises:
        InputError: MODEL names nothing that can be loaded, or no inputs are known for it.
        RewriteError: transformers is not installed.
    """
    if is_function(asked.model):
        file, _, function = asked.model.rpartition(":")
        return Loaded(*from_function(Path(file), function), fresh=lambda: from_function(Path(file), function)[1:])
    if asked.model.endswith(".py"):
        raise InputError(
            f"{asked.model} is a Python file. Name its function that returns (model, inputs): {asked.model}:make."
        )
    config, size = _config(asked)
    notes = () if configs.is_type(asked.model) else configs.misspelt_fields(config, Path(asked.model))
    weights = asked.model if asked.numbers and Path(asked.model).is_dir() else None
    model = build(config, asked.model, DTYPES[asked.dtype], asked.attn, weights=weights, numbers=asked.numbers)
    part = model if asked.part is None else _part(model, asked.part)
    given = inputs(part, asked.batch, asked.seq_len, asked.mask)
    if part is model:
        notes += _towers_without_input(model, given)
    return Loaded(
        part,
        (),
        given,
        notes,
        size == "tiny",
        lambda: ((), _padded(inputs(part, asked.batch, asked.seq_len, asked.mask))),
    )


def _padded(given: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with padding on the right: an eighth of the first sequence."""
    mask = given.get("attention_mask")
    if mask is not None and mask.shape[1] >= 8:
        mask[0, -(mask.shape[1] // 8) :] = 0
    return given


LARGE = 2**30
"""Bytes of weights above which a note says how much memory they take."""


def memory_note(asked: Asked) -> str:
    """How much memory the weights of a large model will take; "" for a small one. None is taken here.

    Raises:
        InputError: this machine has less memory.
    """
    config, size = _config(asked)
    if size == "tiny":
        return ""
    shapes = build(config, asked.model, DTYPES[asked.dtype], asked.attn, weights=None, numbers=False)
    needed = sum(parameter.nbytes for parameter in shapes.parameters())
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = f"the weights of {asked.model} take {needed / 2**30:.1f} GiB of memory, and this machine has "
    words += f"{here / 2**30:.1f} GiB"
    smaller = "--size tiny or --set num_hidden_layers=1 takes less"
    if needed > here:
        raise InputError(f"{words}: {smaller}. explain needs no memory for weights.")
    return f"{words}. Running both models may take long: {smaller}." if needed > LARGE else ""


def _config(asked: Asked) -> tuple[Any, str]:
    """The config of the model, and its size, "tiny" or "full"."""
    is_type = configs.is_type(asked.model)
    config = configs.read(asked.model)
    size = asked.size or ("tiny" if is_type else "full")
    if size == "full" and is_type:
        configs.make_full(config, asked.model)
    if size == "tiny":
        config = configs.tiny(config, asked.model)
    configs.change(config, asked.changes)
    configs.make_room(config, asked.seq_len, size == "tiny")
    no_extras(config)
    return config, size


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
