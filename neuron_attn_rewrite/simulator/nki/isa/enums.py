"""The enumerations of `nki.isa`."""

from __future__ import annotations

from enum import Enum, IntEnum


class engine(Enum):
    """The engines of a NeuronCore. `unknown` lets the compiler choose."""

    tensor = 1
    vector = 5
    scalar = 2
    gpsimd = 3
    dma = 4
    sync = 6
    unknown = 0


class reduce_cmd(Enum):
    """What an instruction does to the reduction registers of its engine."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4


class dge_mode(Enum):
    """What generates the descriptors of a DMA: software, hardware, or none of them."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class oob_mode(Enum):
    """What happens if a run-time index is out of range."""

    error = 0
    skip = 1


class matmul_perf_mode(Enum):
    none = "none"
    double_row = "double_row"


class nc_version(IntEnum):
    """The generations, as integers: kernels compare them."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


class dma_engine(Enum):
    dma = 1
    gpsimd_dma = 2


class NkiValidationError(Exception):
    """For kernels to raise. The simulator itself raises `SimulatorError`."""


tensor_engine = engine.tensor
vector_engine = engine.vector
scalar_engine = engine.scalar
gpsimd_engine = engine.gpsimd
unknown_engine = engine.unknown
