"""What one index of a tensor selects. The index is an int, a slice or `nl.ds`, as strict as in the compiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.core import VirtualRegister, register_value


@dataclass(frozen=True)
class DynamicSlice:
    """`nl.ds(start, size)`: `size` elements from a start that may be a register."""

    start: int | VirtualRegister
    size: int


def _fail(message: str) -> NoReturn:
    raise SimulatorError(f"NkiTensor.__getitem__: {message}")


def selected(k: Any, d: int, size: int, partitions: bool) -> tuple[int, int, int, bool]:
    """Start, size and step of index `k` of dim `d`, which has `size` elements, and whether the dimension stays.

    `partitions`: dim `d` is the partition dimension.
    """
    if isinstance(k, DynamicSlice):
        start = register_value(k.start, "nl.ds") if isinstance(k.start, VirtualRegister) else k.start
        if not isinstance(k.size, int) or k.size < 1 or not 0 <= start <= size - k.size:
            _fail(f"ds({start}, {k.size}) of dim {d}, whose size is {size}: it must be in range")
        return start, k.size, 1, True
    if isinstance(k, slice):
        start = 0 if k.start is None else k.start
        stop = size if k.stop is None else k.stop
        step = 1 if k.step is None else k.step
        for bound in (start, stop, step):
            if isinstance(bound, VirtualRegister):
                _fail("a slice bound must not be a register: use nl.ds(register, size)")
            if not isinstance(bound, int | np.integer):
                _fail(f"slice bound {bound!r} of dim {d} is not an integer")
        if not 0 <= start < stop <= size or step < 1:
            _fail(f"{start}:{stop}:{step} of dim {d}, whose size is {size}: a slice must be in range and not empty")
        if step > 1 and partitions:
            _fail("a slice of partitions must not have a step")
        return int(start), -(-int(stop - start) // int(step)), int(step), True
    if isinstance(k, VirtualRegister):
        _fail("an index must not be a register: use nl.ds(register, size) or .select(dim, register)")
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        _fail(f"{k!r} is not an index: use an int, a slice or nl.ds")
    if not 0 <= k < size:
        _fail(f"index {k} of dim {d}, whose size is {size}: it must be in range, and must not be negative")
    return int(k), 1, 1, False
