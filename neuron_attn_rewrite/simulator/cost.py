"""How long the engines are busy with the instructions of a trace. This is a lower bound of the time, not a latency.

Each engine executes its instructions one after another. All engines work at once, and none waits. The formulas are the
costs in the documentation of SDK 2.26 (later ones give none), with the rates of the architecture guides. The bound is 6
to 8 percent below published times of well pipelined matmuls, and 1.4 to 2.2 times below those of attention. It ranks
kernels and names the engine that limits them. The bytes are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from neuron_attn_rewrite.hardware import HARDWARE, TARGETS, Hardware
from neuron_attn_rewrite.simulator.trace import Instruction, Trace

ISSUE = 64
"""The least cycles of an instruction."""
GPSIMD_START = 150
DESCRIPTOR = 512
"""The overhead of a DMA descriptor, in bytes that it could move in that time (source: the DMA bandwidth guide)."""
TRANSPOSE_HBM, TRANSPOSE_SBUF = 0.9, 0.5
"""Shares of the bandwidth that a transpose by DMA reaches, from HBM and within SBUF (source: the guide of trn2)."""
NARROW = frozenset({"bfloat16", "float16", "float8_e4m3", "float8_e4m3fn", "float8_e5m2"})


@dataclass(frozen=True)
class LowerBound:
    """The launch takes at least `seconds`."""

    busy: dict[str, float]
    """Seconds that each engine of the busiest core is busy, by the name of the engine."""
    engine: str
    """The busiest engine."""
    seconds: float
    """How long the busiest engine is busy."""
    hbm_read: int
    """Bytes that all cores read from HBM."""
    hbm_written: int
    """Bytes that all cores write to HBM."""

    @property
    def hbm_bytes(self) -> int:
        return self.hbm_read + self.hbm_written


def lower_bound(trace: Trace, target: str | None = None) -> LowerBound:
    """How long a trace takes at least, on "gen2", "gen3" or "gen4"; by default on the target of the trace."""
    generation = target or trace.target
    chip = HARDWARE[TARGETS[generation]]
    cores: dict[int, dict[str, float]] = {}
    for i in trace:
        busy = cores.setdefault(i.core, {})
        busy[i.engine] = busy.get(i.engine, 0.0) + seconds(i, chip, generation)
    busy = max(cores.values(), key=lambda b: max(b.values()), default={"tensor": 0.0})
    engine = max(busy, key=lambda e: busy[e])
    return LowerBound(busy, engine, busy[engine], trace.hbm_read, trace.hbm_written)


def seconds(i: Instruction, chip: Hardware, generation: str) -> float:
    """How many seconds one instruction keeps its engine busy."""
    if i.engine == "dma":
        share = i.run / (i.run + DESCRIPTOR) if i.run else 1.0
        if i.op == "dma_transpose":
            share = TRANSPOSE_HBM if i.hbm_read + i.hbm_written else TRANSPOSE_SBUF
        return i.bytes / (chip.dma_gbs * 1e9 * share)
    if i.engine == "tensor":
        return tensor_cycles(i) / (chip.tensor_ghz * 1e9)
    if i.engine == "scalar":
        return (max(ISSUE, i.elements) + ISSUE * i.readout) / (chip.scalar_ghz * 1e9)
    if i.engine == "vector":
        return (max(ISSUE, vector_cycles(i, generation)) + ISSUE * i.readout) / (chip.vector_ghz * 1e9)
    # GpSimd has the clock of the scalar engine. Barriers and registers count as free.
    return (GPSIMD_START + i.elements) / (chip.scalar_ghz * 1e9) if i.engine == "gpsimd" else 0.0


def tensor_cycles(i: Instruction) -> float:
    """A matmul streams its moving columns. A transpose is a matmul whose moving operand is the identity."""
    if i.op == "nc_transpose":
        p, f = i.dims
        return max(p, min(64, f))
    _, m, n = i.dims
    return max(min(64, m), n) * (4 if "float32" in i.dtypes[1:] else 1)


def vector_cycles(i: Instruction, generation: str) -> float:
    """Cycles that an instruction of the vector engine needs for its elements."""
    return _VECTOR.get(i.op, _plain)(i, generation)


def _plain(i: Instruction, generation: str) -> float:
    return i.elements


def _fast_copy(i: Instruction, generation: str) -> float:
    """From gen3 on, copies of 16 bits are four times as fast within SBUF, and twice with PSUM or with strides."""
    if generation == "gen2" or not set(i.dtypes[:2]) <= NARROW:
        return i.elements
    return i.elements / (4 if "psum" not in i.buffers[:2] and i.contiguous else 2)


def _two_inputs(i: Instruction, generation: str) -> float:
    """Two inputs from SBUF share one port, unless all operands have 16 bits and are in SBUF."""
    in_psum = "psum" in i.buffers[1:]
    narrow = set(i.dtypes) <= NARROW and "psum" not in i.buffers
    return i.elements * (1 if in_psum or narrow else 2)


def _reduce(i: Instruction, generation: str) -> float:
    return i.elements / (2 if set(i.dtypes) <= NARROW else 1)


def _twice(i: Instruction, generation: str) -> float:
    return 2 * i.elements


_VECTOR: dict[str, Callable[[Instruction, str], float]] = {
    "tensor_copy": _fast_copy,
    "tensor_scalar": _fast_copy,
    "tensor_tensor": _two_inputs,
    "tensor_copy_predicated": _two_inputs,
    "scalar_tensor_tensor": _twice,
    "tensor_tensor_scan": _twice,
    "tensor_reduce": _reduce,
    "memset": _reduce,
    "nc_transpose": lambda i, _: max(ISSUE, i.dims[1]),
    "reciprocal": lambda i, _: 8 * i.elements,
    "exponential": lambda i, _: i.elements / 4,
}
