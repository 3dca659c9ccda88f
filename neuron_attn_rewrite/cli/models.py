"""From a word on the command line to a model and inputs."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neuron_attn_rewrite.cli.shrink import COUNTS, VOCABULARY, WIDTHS, arguments, no_extras, shrink
from neuron_attn_rewrite.errors import InputError, RewriteError

FULL: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "gemma3": {"vision_config.image_size": 896, "vision_config.patch_size": 14},
}
"""The full size of a model type where transformers' default config is of another model, or of none: llama is Llama 3
70B; the image of Gemma 3 has more patches than tokens."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


@dataclass(frozen=True)
class Asked:
    """What the command line says about the model."""

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
    """Whether weights must have values, because the model is to be run."""
    part: str | None = None
    """The submodule that is meant, such as a vision tower; None means the model."""


@dataclass(frozen=True)
class Loaded:
    """A model, and what it is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What its user may not expect, in words."""
    is_small: bool = False
    """Whether it can be run here in no time."""


def load(asked: Asked) -> Loaded:
    """The model and its inputs.

    Raises:
        InputError: the word names nothing that can be loaded, or no inputs are known for it.
        RewriteError: transformers is not installed.
    """
    file, colon, function = asked.model.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_function(Path(file), function)
    if asked.model.endswith(".py"):
        raise InputError(
            f"{asked.model} is Python: name its function that returns (model, inputs), {asked.model}:make."
        )
    config = _config(asked.model)
    slips = () if _is_type(asked.model) else _slips(config, Path(asked.model))
    size = asked.size or ("tiny" if _is_type(asked.model) else "full")
    if size == "full" and _is_type(asked.model):
        for name, value in FULL.get(asked.model, {}).items():
            *parts, field = name.split(".")
            setattr(functools.reduce(getattr, parts, config), field, value)
    if size == "tiny":
        config = _tiny(config, asked.model)
    _change(config, asked.changes)
    _make_room(config, asked.seq_len, size == "tiny")
    no_extras(config)
    weights = asked.model if asked.numbers and Path(asked.model).is_dir() else None
    model = _build(config, asked, weights)
    part = model if asked.part is None else _part(model, asked.part)
    given = inputs(part, asked)
    return Loaded(part, (), given, (*slips, *(_left_out(model, given) if part is model else ())), size == "tiny")


def _slips(config: Any, path: Path) -> tuple[str, ...]:
    """Fields of a config's file that its class doesn't know, and that look like one that is not there."""
    where = path / "config.json" if path.is_dir() else path
    given = json.loads(where.read_text(encoding="utf-8"))
    known = {*arguments(type(config)), *getattr(config, "attribute_map", {})}
    close = {name: difflib.get_close_matches(name, known - given.keys(), 1, 0.85) for name in given.keys() - known}
    return tuple(
        f"{where} has {name!r}, which a config of {config.model_type} does not: did you mean {match[0]!r}?"
        for name, match in sorted(close.items())
        if match
    )


def _part(model: nn.Module, name: str) -> nn.Module:
    known = [path for path, part in model.named_modules() if path and hasattr(part, "main_input_name")]
    if name not in known:
        raise InputError(
            f"--part {name}: {type(model).__name__} has no such part; those with inputs of their own are "
            f"{', '.join(known) or 'none'}."
        )
    return model.get_submodule(name)


def _left_out(model: Any, given: Mapping[str, Any]) -> tuple[str, ...]:
    """The towers that see no input, in words: images and sound that stand in a text are left out of it."""
    if {"pixel_values", "input_features", "input_values"} & given.keys():
        return ()
    parts: list[Any] = [getattr(model.config, name, None) for name in ("vision_config", "audio_config")]
    kinds = {part.model_type for part in parts if hasattr(part, "model_type")}
    towers: list[str] = []
    for name, part in model.named_modules():
        of_kind = getattr(getattr(part, "config", None), "model_type", None) in kinds
        if (
            name
            and of_kind
            and hasattr(part, "main_input_name")
            and not name.startswith(tuple(f"{t}." for t in towers))
        ):
            towers.append(name)
    return tuple(f"{name} is not run, as the inputs are text: --part {name} explains it." for name in towers)


def _from_function(file: Path, function: str) -> Loaded:
    """`function()` of a file gives the model, or (model, inputs) with a tuple or a dict of inputs."""
    if not file.is_file():
        raise InputError(f"{file} is not a file.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        sys.modules[file.stem] = module
        with _blaming(str(file)):
            spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    made = getattr(module, function, None)
    if not callable(made):
        raise InputError(f"{file} has no function {function!r}.")
    with _blaming(f"{file}:{function}"):
        result = made()
    model, given = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
    if not isinstance(model, nn.Module) or not isinstance(given, (tuple, list, dict, Tensor)):
        raise InputError(
            f"{file}:{function} must return (model, inputs): a module, and a tuple or dict of example inputs."
        )
    if isinstance(given, dict):
        return Loaded(model, (), given)
    return Loaded(model, (given,) if isinstance(given, Tensor) else tuple(given), {})


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """An error of the user's own code is reported as one."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what} fails: {type(error).__name__}: {error} (--debug shows where)") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RewriteError("models by type or config need transformers: pip install transformers") from error
    return transformers


def _is_type(word: str) -> bool:
    return not Path(word).exists() and not word.endswith(".json")


def _config(word: str) -> Any:
    transformers = _transformers()
    path = Path(word)
    if path.exists():
        where = path / "config.json" if path.is_dir() else path
        if not where.is_file():
            raise InputError(f"{path} has no config.json.")
        try:
            return transformers.AutoConfig.from_pretrained(str(where))
        except Exception as error:  # whatever transformers meets in a file of somebody's
            words = " ".join(str(error).split())
            raise InputError(f"{where} is not a config of transformers: {words}") from error
    known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    if word not in known:
        close = difflib.get_close_matches(word, known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "give a model type such as llama or bert."
        raise InputError(f"{word!r} is no file, no directory and no model type: {hint}")
    return transformers.AutoConfig.for_model(word)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _tiny(config: Any, model: str) -> Any:
    """What decides a model's masks (windows, image sizes) stays."""
    try:
        return shrink(config, COUNTS + WIDTHS)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"the config of {model} can't be made tiny: {_first_line(error)}: use --size full.") from error


def _change(config: Any, changes: Sequence[tuple[str, str]]) -> None:
    for name, text in changes:
        if not hasattr(config, name):
            known = [n for n in vars(config) if not n.startswith("_")]
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else f"its fields are {', '.join(sorted(known))}."
            raise InputError(f"--set {name}: the config of {config.model_type} has no such field: {hint}")
        words = {"true": True, "false": False, "none": None}
        value: Any = words.get(text.lower(), text)
        for kind in (int, float):
            if isinstance(value, str):
                try:
                    value = kind(text)
                except ValueError:
                    continue
        setattr(config, name, value)


def _make_room(config: Any, length: int, exactly: bool) -> None:
    """As many positions as the inputs have, and some that models reserve."""
    for part in (config, getattr(config, "text_config", None)):
        for name in MAX_POSITIONS:
            value = getattr(part, name, None)
            if isinstance(value, int) and (exactly or value < length + 8):
                setattr(part, name, length + 8)


class _Weightless(TorchFunctionMode):
    """Tensors made to be filled, which weights are, get no memory. What is computed (masks, frequencies) is real."""

    FILLED = (torch.empty, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FILLED:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _build(config: Any, asked: Asked, weights: str | None) -> nn.Module:
    transformers = _transformers()
    options: dict[str, Any] = {"dtype": DTYPES[asked.dtype]}
    if asked.attn is not None:
        options["attn_implementation"] = asked.attn
    auto = _auto_class(transformers, config)
    torch.manual_seed(0)
    try:
        if weights is not None:
            model = auto.from_pretrained(weights, config=config, **options)
        elif asked.numbers:
            model = auto.from_config(config, **options)
        else:
            with _Weightless():
                model = auto.from_config(config, **options)
    except Exception as error:  # whatever transformers meets in a config, or in the weights
        raise InputError(f"transformers can't build {asked.model}: {_first_line(error)}") from error
    give_stand_ins(model)
    model.eval()
    assert isinstance(model, nn.Module)
    return model


def give_stand_ins(model: nn.Module) -> None:
    """Every tensor on the meta device becomes a parameter, which no proof reads, and all share one piece of memory.

    The memory is as large as the largest of them, and never touched: what is not touched is not taken.
    """
    places = [(m, name) for m in model.modules() for name in (*m._parameters, *m._buffers)]
    found = [(m, name, t) for m, name in places if isinstance(t := getattr(m, name), Tensor) and t.is_meta]
    memory = torch.empty(max((t.nbytes for _, _, t in found), default=0), dtype=torch.uint8)
    made: dict[int, nn.Parameter] = {}
    for module, name, tensor in found:
        if id(tensor) not in made:
            shape = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            made[id(tensor)] = nn.Parameter(shape, requires_grad=False)
        module._buffers.pop(name, None)
        module._parameters[name] = made[id(tensor)]


def _auto_class(transformers: Any, config: Any) -> Any:
    """The class that the config names, else the one with a head for language, else the bare model."""
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    if hasattr(transformers, named):
        return _FromClass(getattr(transformers, named))
    kinds = transformers.models.auto.modeling_auto
    kind = config.model_type
    has_head = kind in kinds.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder or (has_head and kind not in kinds.MODEL_MAPPING_NAMES):
        return transformers.AutoModelForSeq2SeqLM if has_head else transformers.AutoModel
    is_decoder = kind in kinds.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in kinds.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModel


@dataclass(frozen=True)
class _FromClass:
    """A class of transformers, built like an auto class."""

    kind: Any

    def from_config(self, config: Any, **options: Any) -> Any:
        return self.kind._from_config(config, **options)

    def from_pretrained(self, path: str, **options: Any) -> Any:
        return self.kind.from_pretrained(path, **options)


def inputs(model: Any, asked: Asked) -> dict[str, Any]:
    """Inputs by the conventions of transformers.

    Raises:
        InputError: the model's main input is none of tokens, pixels, sound.
    """
    config, batch = model.config, asked.batch
    takes = inspect.signature(model.forward).parameters
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    words = getattr(text, "vocab_size", None) or VOCABULARY
    ids = torch.randint(3, max(4, words - 8), (batch, asked.seq_len))
    ones = torch.ones(batch, asked.seq_len, dtype=torch.int64)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    main = model.main_input_name
    given: dict[str, Any] = {}
    if {"hidden_states", "grid_thw"} <= takes.keys():  # images of 16 by 16 patches, each patch one row
        patch = config.patch_size**2 * getattr(config, "temporal_patch_size", 1) * getattr(config, "in_channels", 3)
        return {
            "hidden_states": torch.randn(batch * 256, patch, dtype=dtype),
            "grid_thw": torch.tensor([[1, 16, 16]] * batch),
        }
    if main == "input_ids":
        given["input_ids"] = ids
        if asked.mask and "attention_mask" in takes:
            given["attention_mask"] = ones
    two_towers = hasattr(config, "vision_config") and hasattr(config, "text_config")
    in_text = any(getattr(config, f"image_token_{name}", None) is not None for name in ("id", "index"))
    if main == "pixel_values" or (two_towers and not in_text):  # images that stand in a text may be left out
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        given["pixel_values"] = torch.randn(batch, getattr(vision, "num_channels", 3), height, width, dtype=dtype)
    if main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        given["input_features"] = torch.randn(batch, getattr(config, "num_mel_bins", 80), frames, dtype=dtype)
    if main == "input_values":
        given["input_values"] = torch.randn(batch, 16000, dtype=dtype)
    if not given:
        raise InputError(
            f"no inputs are known for {type(model).__name__}, whose main input is {main!r}: "
            "write a function that returns (model, inputs), and give it as file.py:function."
        )
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids.flip(1)
    return given
