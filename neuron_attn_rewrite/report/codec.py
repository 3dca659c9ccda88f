"""Reports as JSON, JSON as reports, and the JSON Schema. All three follow the type hints of the data classes.

A new field or a new claim of a mask needs no change here. `VERSION` grows if a reader of the old version can't read the
new one.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.reasons import REASONS, Reason
from neuron_attn_rewrite.report.data import ReportData

VERSION = 1
"""The version of the schema, `schema` in the JSON."""


def to_json(report: ReportData) -> str:
    head = {"schema": VERSION, "replaced": len(report.replaced), "kept": len(report.kept)}
    return json.dumps({**head, **encode(report, ReportData)}, indent=1)


Report = TypeVar("Report", bound=ReportData)


def from_json(text: str | bytes, kind: type[Report]) -> Report:
    """The report that `to_json` wrote, as an object of `kind`."""
    try:
        data = json.loads(text)
    except (ValueError, TypeError) as error:
        raise InputError(f"this is not JSON: {error}.") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != VERSION:
        said = "it has no schema version" if found is None else f"its schema is {found!r}"
        raise InputError(f"this report can't be read: {said}, and version {VERSION} is needed.")
    try:
        report = decode({k: v for k, v in data.items() if k not in ("schema", "replaced", "kept")}, kind)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"this report is damaged: {type(error).__name__}: {error}.") from error
    assert isinstance(report, kind)
    return report


def is_record(kind: Any) -> bool:
    """Whether a hint is a dataclass."""
    return is_dataclass(kind)


@cache
def hints(kind: Any) -> Mapping[str, Any]:
    """The resolved type hint of each field of a dataclass."""
    known = get_type_hints(kind)
    return {f.name: known[f.name] for f in fields(kind)}


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows, without None."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(o for o in options if o is not type(None))


def _tagged(hint: Any) -> bool:
    """Whether the JSON of a value needs the field `kind`, because the hint allows several dataclasses."""
    return sum(is_record(o) for o in _members(hint)) > 1


def encode(value: Any, hint: Any) -> Any:
    """A value as plain JSON data."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Reason):
        return {"code": value.code, "text": str(value)}
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, tuple):
        items = next((get_args(o) for o in _members(hint) if get_origin(o) is tuple), ())
        of = [items[0]] * len(value) if items[-1:] == (...,) else items
        return [encode(v, h) for v, h in zip(value, of, strict=True)]
    if is_record(value):
        kind: Any = type(value)
        data = {name: encode(getattr(value, name), h) for name, h in hints(kind).items()}
        return {"kind": kind.__name__, **data} if _tagged(hint) else data
    return str(value)


def decode(data: Any, hint: Any) -> Any:
    """The value that `encode` made `data` from."""
    if data is None:
        return None
    option: Any
    for option in _members(hint):
        if is_record(option) and isinstance(data, dict):
            if not _tagged(hint) or data["kind"] == option.__name__:
                known = hints(option)
                return option(**{n: decode(v, known[n]) for n, v in data.items() if n != "kind" or n in known})
        elif get_origin(option) is tuple and isinstance(data, list):
            items = get_args(option)
            of = [items[0]] * len(data) if items[-1] is ... else items
            return tuple(decode(v, h) for v, h in zip(data, of, strict=True))
        elif option is Reason:
            return Reason(data["code"], data["text"])
        elif option is torch.dtype:
            return getattr(torch, data)
        elif option is float and not isinstance(data, bool):
            return float(data)
        elif isinstance(option, type) and issubclass(option, Enum):
            return option[data]
        elif isinstance(option, type) and isinstance(data, option):
            return data
    raise ValueError(f"{data!r} is of no type that was expected")


# The schema

PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def schema(described: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The JSON Schema of `to_json`.

    Args:
        described: for each class the docstrings of its fields, and its own docstring under the name "".
    """
    definitions: dict[str, Any] = {}

    def of(hint: Any, tag: str = "") -> Any:
        options = _members(hint)
        if options != (hint,):
            kinds = [of(o, o.__name__ if _tagged(hint) and is_record(o) else "") for o in options]
            nullable = type(None) in get_args(hint)
            return {"anyOf": [*kinds, *([{"type": "null"}] if nullable else [])]}
        if is_record(hint):
            return reference(hint, tag)
        if get_origin(hint) is tuple:
            items = get_args(hint)
            if items[-1] is ...:
                return {"type": "array", "items": of(items[0])}
            return {"type": "array", "prefixItems": [of(i) for i in items], "minItems": len(items), "items": False}
        if hint is Reason:
            properties = {"code": {"enum": sorted(REASONS)}, "text": {"type": "string"}}
            return {"type": "object", "properties": properties, "required": ["code", "text"]}
        if hint is float:
            return {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
        if isinstance(hint, type) and issubclass(hint, Enum):
            return {"enum": [member.name for member in hint]}
        return {"type": "string" if hint is torch.dtype else PLAIN[hint]}

    def reference(kind: Any, tag: str) -> dict[str, str]:
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}
            definitions[kind.__name__] = record(kind, tag)
        return {"$ref": f"#/$defs/{kind.__name__}"}

    def record(kind: Any, tag: str = "") -> dict[str, Any]:
        words = described.get(kind.__name__, {})
        properties: dict[str, Any] = {"kind": {"const": tag}} if tag else {}
        for name, hint in hints(kind).items():
            properties[name] = {**({"description": words[name]} if name in words else {}), **of(hint)}
        about = {"description": words[""]} if "" in words else {}
        return {
            **about,
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    root = record(ReportData)
    head = {"schema": {"const": VERSION}, "replaced": {"type": "integer"}, "kept": {"type": "integer"}}
    root["properties"] = {**head, **root["properties"]}
    root["required"] = list(root["properties"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}
