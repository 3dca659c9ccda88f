"""Launch a kernel on one or two simulated cores, with tensors of numpy or torch."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.core import Core, Link, execute
from neuron_attn_rewrite.simulator.dtypes import Array, dtype
from neuron_attn_rewrite.simulator.memory import HBM, Allocator, MemoryRegion, Storage
from neuron_attn_rewrite.simulator.session import current_session
from neuron_attn_rewrite.simulator.target import Target, target
from neuron_attn_rewrite.simulator.tensor import NkiTensor
from neuron_attn_rewrite.simulator.trace import Trace

_TORCH = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}
_E4M3, _E4M3FN = np.dtype(ml_dtypes.float8_e4m3), np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Run:
    """What a launch gave: the kernel's outputs in the kind of its inputs, and what it did (None under the real nki)."""

    outputs: Any
    trace: Trace | None


class Pair(Link):
    """Two cores that take turns: each runs until it must wait for the other.

    So the order is always the same, and what the other core has not yet written is seen as unwritten.
    """

    def __init__(self, first: int) -> None:
        self.turn, self.condition = first, threading.Condition()
        self.waiting: dict[int, tuple[tuple[str, object], Any]] = {}
        self.answers: dict[int, Any] = {}
        self.done: set[int] = set()
        self.failed = False
        self.tensors: dict[int, list[Storage]] = {0: [], 1: []}

    def start(self, core: int) -> None:
        with self.condition:
            self._wait(core)

    def _wait(self, core: int) -> None:
        self.condition.wait_for(lambda: self.turn == core or self.failed)
        if self.failed:
            raise SimulatorError("the other core failed")

    def finish(self, core: int, *, failed: bool) -> None:
        with self.condition:
            self.done.add(core)
            self.failed |= failed
            self.turn = 1 - core
            self.condition.notify_all()

    def meet(self, core: int, key: tuple[str, object], payload: Any) -> Any:
        other = 1 - core
        with self.condition:
            if other in self.waiting:
                theirs, value = self.waiting.pop(other)
                if theirs != key:
                    raise SimulatorError(
                        f"core {core} is at {key[0]} and core {other} at {theirs[0]}: both wait forever"
                    )
                self.answers[other] = payload
                return value
            if other in self.done:
                raise SimulatorError(f"core {core} waits at {key[0]}, and core {other} is at its end: it waits forever")
            self.waiting[core] = (key, payload)
            self.turn = other
            self.condition.notify_all()
            self.condition.wait_for(lambda: self.failed or self.turn == core or other in self.done)
            if core in self.answers:
                return self.answers.pop(core)
            if self.failed:
                raise SimulatorError("the other core failed")
            raise SimulatorError(f"core {core} waits at {key[0]}, and core {other} is at its end: it waits forever")

    def shared(self, core: int, storage: Storage) -> Storage:
        mine, theirs = self.tensors[core], self.tensors[1 - core]
        position = len(mine)
        if position < len(theirs):
            other = theirs[position]
            if (other.shape, other.dtype, other.name) != (storage.shape, storage.dtype, storage.name):
                raise SimulatorError(
                    f"nl.ndarray: core {core} allocates {storage!r} where core {1 - core} has {other!r}; both cores "
                    "allocate the same tensors in shared HBM, in the same order"
                )
            storage = other
        mine.append(storage)
        return storage


def launch(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    lnc: int = 1,
    target_name: str | None = None,
    memory: str | None = None,
    uninitialized: str | None = None,
    first_core: int = 0,
    same_instructions: bool = True,
) -> Run:
    """Run `func` as a kernel. What is not given comes from the session that is switched on, else from the defaults."""
    session = current_session()
    options = session.options if session is not None else {}
    chip = target(target_name or options.get("target"))
    memory = memory or options.get("memory", "logical")
    uninitialized = uninitialized or options.get("uninitialized", "error")
    for key, value, legal in (
        ("lnc", lnc, (1, 2)),
        ("memory", memory, ("logical", "physical")),
        ("uninitialized", uninitialized, ("error", "nan")),
        ("first_core", first_core, (0, 1)),
    ):
        if value not in legal:
            raise SimulatorError(f"{key} is {' or '.join(map(repr, legal))}, not {value!r}")
    arguments = Arguments(chip, lnc)
    bound = arguments.bind(func, args, kwargs)
    link: Link = Pair(first_core) if lnc == 2 else Link()
    cores = [
        Core(n, lnc, chip, Allocator(chip, physical=memory == "physical"), link, check_reads=uninitialized == "error")
        for n in range(lnc)
    ]
    results = (
        _run_pair(func, bound, cores, link) if isinstance(link, Pair) else [execute(cores[0], lambda: func(**bound))]
    )
    if lnc == 2 and same_instructions:
        _same_instructions(cores)
    trace = Trace(chip.name, [i for core in cores for i in core.instructions])
    if session is not None:
        session.trace = trace
    outputs = arguments.outputs(results[0], check=uninitialized == "error")
    arguments.write_back()
    return Run(outputs, trace)


def _run_pair(func: Callable[..., Any], bound: dict[str, Any], cores: list[Core], link: Pair) -> list[Any]:
    results: list[Any] = [None, None]
    errors: list[BaseException | None] = [None, None]

    def body(core: Core) -> None:
        failed = True
        try:
            link.start(core.id)
            results[core.id] = execute(core, lambda: func(**bound))
            failed = False
        except BaseException as e:
            errors[core.id] = e
        finally:
            link.finish(core.id, failed=failed)

    threads = [threading.Thread(target=body, args=(core,), daemon=True) for core in cores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [e for e in errors if e is not None]
    if raised:
        raise next((e for e in raised if "the other core failed" not in str(e)), raised[0])
    return results


def _same_instructions(cores: list[Core]) -> None:
    """Both cores run one program. Loops of the hardware may turn a different number of times.

    The release notes of NKI demand identical control flow and say that it is not enforced; the SDK's own
    `attention_cte` gives its cores unequal work, so the check can be switched off.
    """
    first, second = ([i.label for i in core.instructions if not i.in_loop] for core in cores)
    for n in range(max(len(first), len(second))):
        a, b = first[n : n + 1], second[n : n + 1]
        if a != b:
            shown = [f"{x[0][0]} {x[0][1] or ''}".strip() if x else "nothing" for x in (a, b)]
            raise SimulatorError(
                f"instruction {n} is {shown[0]} on core 0 and {shown[1]} on core 1; both cores issue the same ones"
            )


class Arguments:
    """Tensors of the caller as tensors in HBM, and the kernel's outputs as tensors of the caller's kind."""

    def __init__(self, chip: Target, lnc: int) -> None:
        self.chip, self.torch = chip, False
        self.region = HBM[1] if lnc == 2 else HBM[0]
        self.copies: list[tuple[Any, Array]] = []
        self.inputs: dict[int, Any] = {}

    def bind(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            bound = inspect.signature(func).bind(*args, **kwargs)
        except TypeError as e:
            raise SimulatorError(f"{getattr(func, '__name__', 'the kernel')}: {e}") from None
        bound.apply_defaults()
        return {name: self._convert(name, value) for name, value in bound.arguments.items()}

    def _convert(self, name: str, value: Any) -> Any:
        if isinstance(value, list | dict | set):
            raise SimulatorError(f"argument {name} is a {type(value).__name__}; a kernel takes tuples")
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
            raise SimulatorError(f"argument {name} is on {plain.device}; the simulator takes tensors on the CPU")
        if plain.dtype in _TORCH:
            bits, storage = _TORCH[plain.dtype]
            return plain.contiguous().view(bits).numpy().view(storage)
        return plain.numpy()

    def _tensor(self, name: str, owner: Any, data: Array) -> NkiTensor:
        if data.dtype.itemsize > 4:
            raise SimulatorError(f"argument {name} is {data.dtype}; NKI has no types of 64 bits")
        if data.dtype == _E4M3FN and self.chip.generation < 4:
            if np.abs(np.nan_to_num(data.astype(np.float32))).max(initial=0) > 240:
                raise SimulatorError(
                    f"argument {name} is float8_e4m3fn with values above 240, which float8_e4m3 of {self.chip} lacks"
                )
            data = data.view(_E4M3)
        kind = dtype(data.dtype)
        if data.size == 0:
            raise SimulatorError(f"argument {name} has shape {data.shape}: no tensor is empty")
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
        """Inputs that the kernel wrote, where the simulator could not work on the caller's memory."""
        for owner, data in self.copies:
            if isinstance(owner, np.ndarray):
                if owner.flags.writeable and not np.shares_memory(owner, data):
                    owner[...] = data.view(owner.dtype)
            else:
                new = to_torch(data)
                if new.data_ptr() != owner.data_ptr() and new.dtype == owner.dtype:
                    owner.detach().copy_(new.reshape(owner.shape))

    def outputs(self, value: Any, *, check: bool) -> Any:
        if value is None:
            return None
        if isinstance(value, tuple | list):
            return type(value)(self.outputs(v, check=check) for v in value)
        if not isinstance(value, NkiTensor):
            raise SimulatorError(f"the kernel returns {value!r}; outputs are tensors")
        if id(value.storage) in self.inputs:
            data = value.array()
        elif value.buffer is not MemoryRegion.shared_hbm:
            raise SimulatorError(f"the kernel returns {value!r}; outputs are in nl.shared_hbm")
        else:
            marks = value.storage.bytes.written
            if check and not value.storage.complete and marks is not None and not value.shadow(marks).all():
                missing = int(np.count_nonzero(~value.shadow(marks)))
                raise SimulatorError(
                    f"output {value!r}: the kernel leaves {missing} of {math.prod(value.shape)} unwritten"
                )
            data = value.array()
        return to_torch(data) if self.torch else data


def to_torch(data: Array) -> torch.Tensor:
    for kind, (bits, storage) in _TORCH.items():
        if data.dtype == storage or (data.dtype == _E4M3 and kind is torch.float8_e4m3fn):
            width = np.int16 if bits is torch.int16 else np.uint8
            return torch.from_numpy(np.ascontiguousarray(data).view(width)).view(kind)
    return torch.from_numpy(np.ascontiguousarray(data))
