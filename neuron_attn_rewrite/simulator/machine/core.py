"""The simulated core that runs on this thread, and its registers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.dtypes import Array
from neuron_attn_rewrite.simulator.machine.memory import Allocator, Storage
from neuron_attn_rewrite.simulator.machine.target import PARTITIONS, Target
from neuron_attn_rewrite.simulator.trace import Instruction


@dataclass
class Accumulator:
    """The 128 reduction registers of an engine. `op` is the operator of what they hold, or None if it is unknown."""

    values: Array = field(default_factory=lambda: np.full((PARTITIONS, 1), np.nan, np.float32))
    op: str | None = None


class Link:
    """What connects the cores of a launch. This one is for a launch with one core."""

    def execute(self, cores: list[Core], call: Callable[[], Any]) -> list[Any]:
        """What `call` returns on each core."""
        return [execute(core, call) for core in cores]

    def meet(self, core: int, key: tuple[str, object], payload: Any) -> Any:
        """Wait until the other core is at the same point, and return its payload."""
        raise SimulatorError(f"nki.isa.{key[0]} needs a launch with LNC 2: use kernel[2](...)")

    def shared(self, core: int, storage: Storage) -> Storage:
        """The allocation that both cores use, for one in shared HBM."""
        return storage


@dataclass
class Core:
    """One physical NeuronCore of a launch."""

    id: int
    lnc: int
    target: Target
    allocator: Allocator
    link: Link
    check_reads: bool = True
    instructions: list[Instruction] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    scalar: Accumulator = field(default_factory=Accumulator)
    vector: Accumulator = field(default_factory=Accumulator)
    loops: int = 0
    repeated: bool = False


_running = threading.local()


def current(what: str = "this") -> Core:
    """The core that runs on this thread."""
    core: Core | None = getattr(_running, "core", None)
    if core is None:
        raise SimulatorError(f"{what} works only in a running kernel: launch it with simulator.run or kernel[lnc](...)")
    return core


def is_running() -> bool:
    return getattr(_running, "core", None) is not None


def execute(core: Core, call: Callable[[], Any]) -> Any:
    """Run `call` on this thread as `core`, without numpy's warnings: the hardware gives inf and NaN silently."""
    _running.core = core
    try:
        with np.errstate(all="ignore"):
            return call()
    finally:
        _running.core = None


class VirtualRegister:
    """A scalar register. Its value exists only on the device, so any use as a Python number raises an error."""

    __slots__ = ("_value",)

    def __init__(self, value: int | None = None) -> None:
        self._value = value

    def _opaque(self, *_: object) -> NoReturn:
        raise SimulatorError(
            "a register has no value while the kernel is built: use it as scalar_offset=, in nl.ds, as a bound of "
            "nl.fori_loop or in nisa.register_*, not in Python arithmetic, comparisons, int(), range() or if"
        )

    __int__ = __index__ = __float__ = __bool__ = __len__ = __iter__ = _opaque
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __pos__ = __abs__ = _opaque
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __pow__ = _opaque
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rshift__ = __invert__ = _opaque
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _opaque


def register_value(register: VirtualRegister, what: str) -> int:
    """The value that the device would find in the register."""
    value = register._value
    if value is None:
        raise SimulatorError(f"{what} reads a register that was never written")
    return value


def set_register(register: VirtualRegister, value: int) -> None:
    register._value = value
