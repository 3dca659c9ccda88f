"""From the MODEL argument of the command line to a model and its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuron_attn_rewrite.cli import configs
from neuron_attn_rewrite.cli.build import build
from neuron_attn_rewrite.cli.functions import from_function
from neuron_attn_rewrite.cli.inputs import inputs, parts
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
    by_convention: bool = False
    """Whether the command line made the inputs, and not a function of the user."""
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
    is_tiny = _size(asked) == "tiny"
    config, model = _that_runs(asked) if is_tiny else _built(asked)
    notes = () if configs.is_type(asked.model) else configs.misspelt_fields(config, Path(asked.model))
    part = model if asked.part is None else _part(model, asked.part)
    given = inputs(part, asked.batch, asked.seq_len, asked.mask)
    return Loaded(
        part,
        (),
        given,
        notes,
        is_small=is_tiny,
        by_convention=True,
        fresh=lambda: ((), _padded(inputs(part, asked.batch, asked.seq_len, asked.mask))),
    )


def _built(asked: Asked, way: configs.Way | None = None) -> tuple[Any, nn.Module]:
    """The config and the model, made tiny in this way."""
    config = _config(asked, way)
    weights = asked.model if asked.numbers and Path(asked.model).is_dir() else None
    model = build(config, asked.model, DTYPES[asked.dtype], asked.attn, weights=weights, numbers=asked.numbers)
    return config, model


def _that_runs(asked: Asked) -> tuple[Any, nn.Module]:
    """The first way to make it tiny with which it runs on short inputs, or can at least be built."""
    usable: list[configs.Way] = []
    failure: InputError | None = None
    for way in configs.TINY:
        try:
            config, model = _built(replace(asked, numbers=False), way)
        except InputError as error:
            failure = failure or error
            continue
        usable.append(way)
        if _runs(model, asked):
            return _built(asked, way) if asked.numbers else (config, model)
    if failure and not usable:
        raise failure
    return _built(asked, usable[0])


def _runs(model: nn.Module, asked: Asked) -> bool:
    """Whether a model, or the part that is asked for, runs on short inputs."""
    try:
        part = model if asked.part is None else _part(model, asked.part)
        with torch.no_grad():
            part(**inputs(part, 1, min(asked.seq_len, SHORT), asked.mask))
    except Exception:  # a model can fail in any way
        return False
    return True


SHORT = 64
"""Tokens with which a tiny model is tried."""


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
    if _size(asked) == "tiny":
        return ""
    config = _config(asked)
    shapes = build(config, asked.model, DTYPES[asked.dtype], asked.attn, weights=None, numbers=False)
    needed = sum(parameter.nbytes for parameter in shapes.parameters())
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = f"the weights of {asked.model} take {needed / 2**30:.1f} GiB of memory, and this machine has "
    words += f"{here / 2**30:.1f} GiB"
    smaller = "--size tiny or --set num_hidden_layers=1 takes less"
    if needed > here:
        raise InputError(f"{words}: {smaller}. explain needs no memory for weights.")
    return f"{words}. Running both models may take long: {smaller}." if needed > LARGE else ""


def _size(asked: Asked) -> str:
    """The size of the model, "tiny" or "full"."""
    return asked.size or ("tiny" if configs.is_type(asked.model) else "full")


def _config(asked: Asked, way: configs.Way | None = None) -> Any:
    """The config of the model, made tiny in this way."""
    config = configs.read(asked.model)
    if way is not None:
        config = configs.tiny(config, asked.model, way)
    elif configs.is_type(asked.model):
        configs.make_full(config, asked.model)
    configs.change(config, asked.changes)
    configs.name_image_token(config)
    configs.make_room(config, asked.seq_len, way is not None)
    return no_extras(config)


def _part(model: nn.Module, name: str) -> nn.Module:
    part = dict(model.named_modules()).get(name)
    if not name or not hasattr(part, "main_input_name"):
        raise InputError(
            f"--part {name}: {type(model).__name__} has no such part. The parts with inputs of their own are "
            f"{parts(model)}."
        )
    return model.get_submodule(name)
