"""From a model type or a file to a config of transformers, in the size that the command line asks for."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuron_attn_rewrite.cli.shrink import COUNTS, WIDTHS, Given, Sizes, arguments, sections, shrink
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
"""The full size of a model type whose default config in transformers is not that of a published model.

llama is Llama 3 70B. The default image of gemma3 has fewer patches than the text has image tokens.
"""

MAX_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RewriteError("a model type or a config needs transformers: pip install transformers") from error
    return transformers


def is_type(word: str) -> bool:
    """Whether MODEL is a model type such as llama, and not a file."""
    return not Path(word).exists() and not word.endswith(".json")


def read(word: str) -> Any:
    """The config of a model type, a directory or a config file.

    Raises:
        InputError: there is no such config.
        RewriteError: transformers is not installed.
    """
    transformers = import_transformers()
    if not word:
        raise InputError("MODEL is empty: give a model type such as llama or bert, a directory or a file.")
    path = Path(word)
    if path.exists():
        where = path / "config.json" if path.is_dir() else path
        if not where.is_file():
            raise InputError(f"{path} has no config.json.")
        try:
            return transformers.AutoConfig.from_pretrained(str(where))
        except Exception as error:  # transformers raises many kinds of errors
            words = " ".join(str(error).split())
            raise InputError(f"{where} is not a config of transformers: {words}") from error
    known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    if word not in known:
        close = difflib.get_close_matches(word.lower().replace("-", "_"), known, n=3)
        if "/" in word:
            raise InputError(
                f"{word!r} is not a file or a directory. If it is a model of the Hugging Face Hub, which is not "
                "downloaded here: pass a directory with its config.json, or its model type, such as llama."
            )
        hint = f"did you mean {', '.join(close)}?" if close else "give a model type such as llama or bert."
        raise InputError(f"{word!r} is not a file, a directory or a model type: {hint}")
    try:
        return transformers.AutoConfig.for_model(word)
    except Exception as error:  # a config that is made of others
        raise InputError(
            f"transformers {transformers.__version__} has no default config of {word}: {first_line(error)}. Pass a "
            "directory with its config.json."
        ) from error


def misspelt_fields(config: Any, path: Path) -> tuple[str, ...]:
    """One note for each field of a config file that its class does not know but that resembles a missing field."""
    where = path / "config.json" if path.is_dir() else path
    given = json.loads(where.read_text(encoding="utf-8"))
    known = {*arguments(type(config)), *getattr(config, "attribute_map", {})}
    close = {name: difflib.get_close_matches(name, known - given.keys(), 1, 0.85) for name in given.keys() - known}
    return tuple(
        f"{where} has {name!r}, but a config of {config.model_type} has no such field: did you mean {match[0]!r}?"
        for name, match in sorted(close.items())
        if match
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def why(error: Exception) -> str:
    """What an error of transformers says; of a missing package, how to install it."""
    install = re.search(r"requires the (\S+) library.*?pip install ([^`\s]+)", str(error), re.DOTALL)
    return f"it needs {install[1]}: pip install {install[2]}" if install else first_line(error)


def make_full(config: Any, model_type: str) -> None:
    """Give a config the sizes of `FULL`."""
    for name, value in FULL.get(model_type, {}).items():
        *parts, field = name.split(".")
        setattr(functools.reduce(getattr, parts, config), field, value)


Way = tuple[Sizes, Given]
"""What is made small, and what is given besides."""
TINY: Sequence[Way] = ((COUNTS + WIDTHS, lambda _: {}), (COUNTS + WIDTHS, sections), (COUNTS, lambda _: {}))
"""The ways to make a config tiny, the first with which a model runs is taken."""


def tiny(config: Any, model: str, way: Way) -> Any:
    """A small copy of a config. The sizes that decide the masks (windows, image sizes) do not change."""
    try:
        return shrink(config, *way)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"the config of {model} can't be made tiny: {first_line(error)}. Use --size full.") from error


def change(config: Any, changes: Sequence[tuple[str, str]]) -> None:
    """Set fields of a config from text: true, false, none, a number, or a string."""
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
        try:
            setattr(config, name, value)
        except Exception as error:  # a config of transformers checks its fields
            raise InputError(f"--set {name}={text}: {' '.join(str(error).split())}") from error


def name_image_token(config: Any) -> None:
    """Give a config a token for the pieces of an image if it needs one and has none: the last one."""
    if getattr(config, "image_token_index", 0) is None:
        config.image_token_index = getattr(config, "text_config", config).vocab_size - 1


def make_room(config: Any, length: int, exactly: bool) -> None:
    """Allow as many positions as the inputs have, and 8 more, because some models reserve a few."""
    for part in (config, getattr(config, "text_config", None)):
        for name in MAX_POSITIONS:
            value = getattr(part, name, None)
            if isinstance(value, int) and (exactly or value < length + 8):
                setattr(part, name, length + 8)
