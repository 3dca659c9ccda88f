"""Loops, and which core of the launch runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.core import VirtualRegister, current, register_value, set_register
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor


def program_id(axis: int = 0) -> int:
    """The core that runs: 0 or 1."""
    return current("nl.program_id").id


def num_programs(axes: int | Sequence[int] = 0) -> int:
    """How many cores the launch has: 1 or 2."""
    return current("nl.num_programs").lnc


def program_ndim() -> int:
    """How many axes the launch grid has: 0 for one core, else 1."""
    return 0 if current("nl.program_ndim").lnc == 1 else 1


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Python's range: the loop is unrolled."""
    for bound in (start, stop, step):
        if isinstance(bound, VirtualRegister):
            raise SimulatorError("a register cannot bound an unrolled loop: use nl.fori_loop")
    return range(start) if stop is None else range(start, stop, step)


affine_range = sequential_range = static_range


def _bound(x: int | VirtualRegister) -> int:
    return register_value(x, "nl.fori_loop") if isinstance(x, VirtualRegister) else int(x)


def fori_loop(
    lower: int | VirtualRegister,
    upper: int | VirtualRegister,
    body_fun: Callable[[VirtualRegister], None],
    step: int = 1,
) -> None:
    """A loop of the hardware. The body gets its index in a register."""
    if isinstance(step, VirtualRegister) or step < 1:
        raise SimulatorError(f"nl.fori_loop: step must be a positive integer known at compile time, not {step!r}")
    first = _bound(lower)
    for index in range(first, _bound(upper), step):
        if _iterate(body_fun, VirtualRegister(index), repeated=index > first) is not None:
            raise SimulatorError("nl.fori_loop: the body must return nothing")


def while_loop(init: VirtualRegister, body_fun: Callable[[VirtualRegister], VirtualRegister]) -> None:
    """A loop of the hardware, while the register is not zero. The body returns the register of the next condition."""
    condition, repeated = VirtualRegister(register_value(init, "nl.while_loop")), False
    while register_value(condition, "nl.while_loop"):
        following = _iterate(body_fun, condition, repeated=repeated)
        if not isinstance(following, VirtualRegister):
            raise SimulatorError("nl.while_loop: the body must return the register of the next condition")
        condition = VirtualRegister()
        set_register(condition, register_value(following, "nl.while_loop"))
        repeated = True


def _iterate(body: Callable[[VirtualRegister], Any], register: VirtualRegister, *, repeated: bool) -> Any:
    """One iteration. In a repeated one, instructions may have the names of those of the first."""
    core = current("a loop")
    before, core.repeated = core.repeated, core.repeated or repeated
    core.loops += 1
    try:
        return body(register)
    finally:
        core.loops -= 1
        core.repeated = before


def no_reorder() -> nullcontext[None]:
    """Keep the order of the instructions. The simulator always keeps it."""
    return nullcontext()


def device_print(print_prefix: str, tensor: NkiTensor) -> None:
    print(print_prefix, tensor.array())
