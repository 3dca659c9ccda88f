"""The trace of a launch: one record for each instruction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Instruction(NamedTuple):
    """One executed instruction.

    Sizes are those of the largest operand. Bytes are 0 for instructions that are no DMA.
    """

    op: str
    """Its name in `nki.isa`."""
    engine: str
    """"tensor", "vector", "scalar", "gpsimd", "dma" or "sync"."""
    core: int
    """0 or 1."""
    name: str | None
    """The `name=` that the kernel gave it."""
    partitions: int
    elements: int
    """Elements per partition, or all elements of a tensor in HBM."""
    dtypes: tuple[str, ...]
    """Of the operands that are tensors, dst first."""
    buffers: tuple[str, ...]
    """Of the same operands: "sbuf", "psum", "private_hbm" or "shared_hbm"."""
    contiguous: bool = True
    """Whether the last stride of every operand is 1."""
    dims: tuple[int, ...] = ()
    """(K, M, N) of a matmul, (partitions, elements) of a transpose."""
    bytes: int = 0
    """Bytes that a DMA moves."""
    run: int = 0
    """Contiguous bytes that one descriptor of a DMA moves."""
    hbm_read: int = 0
    """Bytes that a DMA reads from HBM."""
    hbm_written: int = 0
    """Bytes that a DMA writes to HBM."""
    readout: bool = False
    """Whether it also writes the reduction registers to a tile."""
    in_loop: bool = False
    """Whether it is in a loop of the hardware (`nl.fori_loop`, `nl.while_loop`)."""

    @property
    def label(self) -> tuple[str, str | None]:
        """What must be equal on both cores of a launch with two cores."""
        return self.op, self.name


@dataclass
class Trace:
    """The instructions of a launch: those of core 0 in the order of execution, then those of core 1."""

    target: str
    """"gen2", "gen3" or "gen4"."""
    instructions: list[Instruction] = field(default_factory=list)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def __len__(self) -> int:
        return len(self.instructions)

    def core(self, core: int) -> Trace:
        """The trace of one core."""
        return Trace(self.target, [i for i in self.instructions if i.core == core])

    @property
    def hbm_read(self) -> int:
        """Bytes read from HBM by all cores."""
        return sum(i.hbm_read for i in self.instructions)

    @property
    def hbm_written(self) -> int:
        """Bytes written to HBM by all cores."""
        return sum(i.hbm_written for i in self.instructions)

    def counts(self) -> Counter[str]:
        """How often each instruction ran, by its name in `nki.isa`."""
        return Counter(i.op for i in self.instructions)
