"""The simulator's `nki.language`."""

from __future__ import annotations

from typing import Any

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.dtypes import DTYPES
from neuron_attn_rewrite.simulator.machine.memory import MemoryRegion
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.language.allocation import (
    ds,
    empty_like,
    full,
    hbm,
    is_hbm,
    is_on_chip,
    is_psum,
    is_sbuf,
    ndarray,
    ones,
    private_hbm,
    psum,
    sbuf,
    shared_constant,
    shared_hbm,
    shared_identity_matrix,
    tile_size,
    zeros,
    zeros_like,
)
from neuron_attn_rewrite.simulator.nki.language.control import (
    affine_range,
    device_print,
    fori_loop,
    no_reorder,
    num_programs,
    program_id,
    program_ndim,
    sequential_range,
    static_range,
    while_loop,
)
from neuron_attn_rewrite.simulator.nki.language.objects import NKIObject
from neuron_attn_rewrite.simulator.nki.language.tiles import FUNCTIONS, broadcast_to, load, store, sum

# nl.float32, ... are plain strings.
globals().update({name: name for name in DTYPES if name != "bool"})
bool_ = "bool"
DType = str

# nl.add, nl.exp, ...
globals().update(FUNCTIONS)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise SimulatorError(f"nl.{name} is not modelled by the simulator")


__all__ = [
    "DType",
    "MemoryRegion",
    "NKIObject",
    "NkiTensor",
    "affine_range",
    "bool_",
    "broadcast_to",
    "device_print",
    "ds",
    "empty_like",
    "fori_loop",
    "full",
    "hbm",
    "is_hbm",
    "is_on_chip",
    "is_psum",
    "is_sbuf",
    "load",
    "ndarray",
    "no_reorder",
    "num_programs",
    "ones",
    "private_hbm",
    "program_id",
    "program_ndim",
    "psum",
    "sbuf",
    "sequential_range",
    "shared_constant",
    "shared_hbm",
    "shared_identity_matrix",
    "static_range",
    "store",
    "sum",
    "tile_size",
    "while_loop",
    "zeros",
    "zeros_like",
]
