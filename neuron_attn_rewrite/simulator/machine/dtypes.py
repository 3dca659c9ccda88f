"""NKI data types: names, storage and conversions. A dtype is its name, as in `nki.language` (`DType = str`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from neuron_attn_rewrite.errors import SimulatorError

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class DType:
    """One NKI data type: how numpy stores it, and how it is converted to float32 (`load`) and from it (`store`).

    `kind` is "float", "int" or "bool". float32 is rounded to the nearest even integer, with saturation. Sources:
    `nki.api.shared.rst`, "Supported Data Types", and the release notes of NKI 0.6.
    """

    name: str
    storage: np.dtype[Any]
    kind: str
    load: Callable[[Array], Array]
    store: Callable[[Array], Array]

    @property
    def itemsize(self) -> int:
        return self.storage.itemsize


def _same(x: Array) -> Array:
    return x


def _to_float(x: Array) -> Array:
    return x.astype(np.float32)


def _from_bfloat16(x: Array) -> Array:
    """A bfloat16 is the upper half of a float32. This is twice as fast as the cast of ml_dtypes."""
    wide: Array = (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def _round_tf32(x: Array) -> Array:
    """Round to the nearest even number with 10 bits of mantissa. Infinities and NaN stay."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)))) & np.uint32(0xFFFFE000)
    chosen: Array = np.where(np.isfinite(x), rounded.view(np.float32), x)
    return chosen


def _float(name: str, storage: Any) -> DType:
    kind = np.dtype(storage)
    if kind.itemsize == 1:
        # A table of the 256 values is eight times as fast as the cast.
        table = np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
        return DType(name, kind, "float", lambda x: table[x.view(np.uint8)], lambda x: x.astype(kind))
    return DType(name, kind, "float", _to_float, lambda x: x.astype(kind))


def _int(name: str, storage: Any, kind: str = "int") -> DType:
    limits = np.iinfo(storage)

    def store(x: Array) -> Array:
        rounded = np.clip(np.rint(x.astype(np.float64)), limits.min, limits.max)
        stored: Array = np.nan_to_num(rounded, nan=0.0).astype(storage)
        return stored

    return DType(name, np.dtype(storage), kind, _to_float, store)


_FLOAT32 = np.dtype(np.float32)

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("float32", _FLOAT32, "float", _same, _same),
        DType("tfloat32", _FLOAT32, "float", _same, _round_tf32),
        DType(
            "bfloat16",
            np.dtype(ml_dtypes.bfloat16),
            "float",
            _from_bfloat16,
            lambda x: x.astype(ml_dtypes.bfloat16),
        ),
        _float("float16", np.float16),
        _float("float8_e4m3", ml_dtypes.float8_e4m3),
        _float("float8_e4m3fn", ml_dtypes.float8_e4m3fn),
        _float("float8_e5m2", ml_dtypes.float8_e5m2),
        _int("int8", np.int8),
        _int("int16", np.int16),
        _int("int32", np.int32),
        _int("uint8", np.uint8),
        _int("uint16", np.uint16),
        _int("uint32", np.uint32),
        _int("bool", np.uint8, "bool"),
    )
}

FP8 = frozenset({"float8_e4m3", "float8_e4m3fn", "float8_e5m2"})
MATMUL = FP8 | {"bfloat16", "float16", "tfloat32", "float32"}

_BY_STORAGE = {d.storage: d.name for d in reversed(DTYPES.values())} | {np.dtype(np.bool_): "bool"}


def dtype(name: object) -> DType:
    """The data type of that name, or of a numpy dtype: the examples in the documentation of the ISA pass these."""
    if isinstance(name, str) and name in DTYPES:
        return DTYPES[name]
    try:
        return DTYPES[_BY_STORAGE[np.dtype(name)]]  # type: ignore[call-overload]
    except (KeyError, TypeError):
        raise SimulatorError(f"the simulator has no dtype {name!r}; it has {', '.join(DTYPES)}") from None
