"""What a kernel did: one record an instruction. The cost model, byte counts and instruction budgets read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Instruction(NamedTuple):
    """One executed instruction.

    `elements` is the free size, the elements a partition, of the largest operand; `dtypes` and `buffers` are those of
    the operands in order, dst first. `dims` is (K, M, N) of a matmul and (partitions, free) of a transpose. For a DMA
    `bytes` is what moves, `run` the contiguous bytes of one descriptor. `contiguous`: every operand's last stride is 1.
    """

    op: str
    engine: str
    core: int
    name: str | None
    partitions: int
    elements: int
    dtypes: tuple[str, ...]
    buffers: tuple[str, ...]
    contiguous: bool = True
    dims: tuple[int, ...] = ()
    bytes: int = 0
    run: int = 0
    hbm_read: int = 0
    hbm_written: int = 0
    readout: bool = False
    in_loop: bool = False

    @property
    def label(self) -> tuple[str, str | None]:
        """What must be equal on both cores of a launch with LNC 2."""
        return self.op, self.name


@dataclass
class Trace:
    """The instructions of a launch, core by core, in the order of execution."""

    target: str
    instructions: list[Instruction] = field(default_factory=list)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def __len__(self) -> int:
        return len(self.instructions)

    def core(self, core: int) -> Trace:
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
        """How often each op ran."""
        return Counter(i.op for i in self.instructions)
