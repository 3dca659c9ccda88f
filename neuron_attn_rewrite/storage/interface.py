"""The signature and the configuration of a model as JSON."""

from __future__ import annotations

import importlib
import inspect
import json
from typing import Any

from neuron_attn_rewrite.errors import InputError, RewriteError
from neuron_attn_rewrite.storage import literals


class Unsaved:
    """A default of the model's signature that a file can't hold."""

    def __repr__(self) -> str:
        return "<not saved>"


UNSAVED = Unsaved()
_KINDS = {
    kind.name: kind
    for kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    )
}


def encode_signature(signature: inspect.Signature | None) -> Any:
    """The names, kinds and defaults of the parameters."""
    return signature and [[p.name, p.kind.name, *_default(p)] for p in signature.parameters.values()]


def _default(parameter: inspect.Parameter) -> list[Any]:
    if parameter.default is parameter.empty:
        return []
    try:
        return [literals.encode(parameter.default)]
    except RewriteError:
        return [{"unsaved": []}]


def decode_signature(data: Any) -> inspect.Signature | None:
    """The signature that `encode_signature` made `data` from, without annotations."""
    return data and inspect.Signature([_parameter(*record) for record in data])


def _parameter(name: str, kind: str, *default: Any) -> inspect.Parameter:
    value: Any = inspect.Parameter.empty
    if default:
        value = UNSAVED if default[0] == {"unsaved": []} else literals.decode(default[0], {})
    return inspect.Parameter(literals.name(name), _KINDS[kind], default=value)


def encode_config(config: Any) -> Any:
    """A configuration of transformers as JSON. None for any other."""
    write = getattr(config, "to_json_string", None)
    if not isinstance(getattr(config, "model_type", None), str) or write is None:
        return None
    return json.loads(write(use_diff=False))


def decode_config(data: Any) -> Any:
    """The configuration as the class that transformers has for its `model_type`. None without transformers.

    Raises:
        InputError: transformers can't read it.
    """
    if data is None:
        return None
    try:
        kinds: Any = importlib.import_module("transformers").CONFIG_MAPPING
    except ImportError:
        return None
    if data["model_type"] not in kinds:
        return None
    try:
        return kinds[data["model_type"]].from_dict({k: v for k, v in data.items() if k != "auto_map"})
    except Exception as error:  # whatever the class of a model raises
        raise InputError(f"the configuration can't be read: {type(error).__name__}: {error}") from error
