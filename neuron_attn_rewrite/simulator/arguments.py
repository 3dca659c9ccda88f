"""Tensors of numpy and torch become tensors in HBM, and the kernel's outputs become tensors of numpy or torch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.dtypes import Array, dtype
from neuron_attn_rewrite.simulator.machine.memory import HBM, MemoryRegion, Storage
from neuron_attn_rewrite.simulator.machine.target import Target
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor

_TORCH = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}
"""Dtypes that torch cannot give to numpy: the integer dtype that both can view, and the dtype of numpy."""
_E4M3, _E4M3FN = np.dtype(ml_dtypes.float8_e4m3), np.dtype(ml_dtypes.float8_e4m3fn)


class Arguments:
    """The tensors of one launch: those of the caller in HBM, and the outputs as tensors of torch or numpy."""

    def __init__(self, chip: Target, lnc: int) -> None:
        self.chip, self.torch = chip, False
        self.region = HBM[1] if lnc == 2 else HBM[0]
        self.copies: list[tuple[Any, Array]] = []
        self.inputs: dict[int, Any] = {}

    def bind(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The kernel's arguments by name, defaults included, with tensors in HBM."""
        try:
            bound = inspect.signature(func).bind(*args, **kwargs)
        except TypeError as e:
            raise SimulatorError(f"{getattr(func, '__name__', 'the kernel')}: {e}") from None
        bound.apply_defaults()
        return {name: self._convert(name, value) for name, value in bound.arguments.items()}

    def _convert(self, name: str, value: Any) -> Any:
        if isinstance(value, list | dict | set):
            raise SimulatorError(f"argument {name} is a {type(value).__name__}: pass a tuple")
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(self._convert(f"{name}[{k}]", v) for k, v in enumerate(value))
        if isinstance(value, torch.Tensor):
            self.torch = True
            return self._tensor(name, value, self._from_torch(name, value))
        if isinstance(value, np.ndarray):
            return self._tensor(name, value, value)
        return value

    def _from_torch(self, name: str, value: torch.Tensor) -> Array:
        plain = value.detach()
        if plain.device.type != "cpu":
            raise SimulatorError(f"argument {name} is on {plain.device}: pass a tensor on the CPU")
        if plain.dtype in _TORCH:
            bits, storage = _TORCH[plain.dtype]
            return plain.contiguous().view(bits).numpy().view(storage)
        return plain.numpy()

    def _tensor(self, name: str, owner: Any, data: Array) -> NkiTensor:
        if data.dtype.itemsize > 4:
            raise SimulatorError(f"argument {name} is {data.dtype}: NKI has no dtypes of 64 bits")
        if data.dtype == _E4M3FN and self.chip.generation < 4:
            if np.abs(np.nan_to_num(data.astype(np.float32))).max(initial=0) > 240:
                raise SimulatorError(
                    f"argument {name} is float8_e4m3fn with values above 240, the largest of float8_e4m3 on {self.chip}"
                )
            data = data.view(_E4M3)
        kind = dtype(data.dtype)
        if data.size == 0:
            raise SimulatorError(f"argument {name} has shape {data.shape}: it must not be empty")
        shape = data.shape or (1,)
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if not flat.flags.writeable or not np.shares_memory(flat, data):
            flat = flat.copy()
        storage = Storage(shape, kind.name, self.region, name)
        storage.own(flat)
        self.copies.append((owner, flat.view(data.dtype).reshape(data.shape)))
        self.inputs[id(storage)] = owner
        return NkiTensor.whole(storage)

    def write_back(self) -> None:
        """Copy what the kernel wrote into its inputs back to the caller, if they do not share memory."""
        for owner, data in self.copies:
            if isinstance(owner, np.ndarray):
                if owner.flags.writeable and not np.shares_memory(owner, data):
                    owner[...] = data.view(owner.dtype)
            else:
                new = to_torch(data)
                if new.data_ptr() != owner.data_ptr() and new.dtype == owner.dtype:
                    owner.detach().copy_(new.reshape(owner.shape))

    def outputs(self, value: Any, *, check: bool) -> Any:
        """What the kernel returned, as tensors of torch or numpy. `check`: every element must have been written."""
        if value is None:
            return None
        if isinstance(value, tuple | list):
            return type(value)(self.outputs(v, check=check) for v in value)
        if not isinstance(value, NkiTensor):
            raise SimulatorError(f"the kernel returns {value!r}: it must return tensors")
        if id(value.storage) in self.inputs:
            data = value.array()
        elif value.buffer is not MemoryRegion.shared_hbm:
            raise SimulatorError(f"the kernel returns {value!r}: outputs must be in nl.shared_hbm")
        else:
            marks = value.storage.bytes.written
            if check and not value.storage.complete and marks is not None and not value.shadow(marks).all():
                missing = int(np.count_nonzero(~value.shadow(marks)))
                raise SimulatorError(
                    f"output {value!r}: the kernel has not written {missing} of {math.prod(value.shape)} elements"
                )
            data = value.array()
        return to_torch(data) if self.torch else data


def to_torch(data: Array) -> torch.Tensor:
    """The same tensor in torch; float8_e4m3 becomes float8_e4m3fn, which has the same bits for finite numbers."""
    for kind, (bits, storage) in _TORCH.items():
        if data.dtype == storage or (data.dtype == _E4M3 and kind is torch.float8_e4m3fn):
            width = np.int16 if bits is torch.int16 else np.uint8
            return torch.from_numpy(np.ascontiguousarray(data).view(width)).view(kind)
    return torch.from_numpy(np.ascontiguousarray(data))
