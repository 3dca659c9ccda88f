"""The bound of a trace: the documented cost of each instruction, the busiest engine, exact bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neuron_attn_rewrite.simulator import Instruction, Trace, active, run
from neuron_attn_rewrite.simulator.cost import lower_bound

with active():
    import nki.isa as nisa
    import nki.language as nl

SBUF, PSUM = "sbuf", "psum"
BF16, F32 = "bfloat16", "float32"


def instruction(op: str, engine: str, elements: int, dtypes: Any, buffers: Any, **facts: Any) -> Instruction:
    return Instruction(op, engine, 0, None, 128, elements, dtypes, buffers, **facts)


CASES: list[tuple[str, Instruction, float]] = [
    # (target, instruction, cycles of its engine), by hand from the formulas
    ("gen3", instruction("nc_matmul", "tensor", 512, (F32, BF16, BF16), (PSUM, SBUF, SBUF), dims=(128, 128, 512)), 512),
    ("gen3", instruction("nc_matmul", "tensor", 512, (F32, F32, F32), (PSUM, SBUF, SBUF), dims=(128, 128, 512)), 2048),
    ("gen3", instruction("nc_matmul", "tensor", 8, (F32, BF16, BF16), (PSUM, SBUF, SBUF), dims=(128, 128, 8)), 64),
    ("gen3", instruction("nc_transpose", "tensor", 128, (BF16, BF16), (PSUM, SBUF), dims=(128, 128)), 128),
    ("gen3", instruction("activation", "scalar", 512, (BF16, F32), (SBUF, PSUM), readout=True), 576),
    ("gen3", instruction("activation", "scalar", 8, (BF16, F32), (SBUF, PSUM)), 64),
    ("gen3", instruction("tensor_copy", "vector", 512, (BF16, BF16), (SBUF, SBUF)), 128),
    ("gen3", instruction("tensor_copy", "vector", 512, (BF16, BF16), (SBUF, PSUM)), 256),
    ("gen3", instruction("tensor_copy", "vector", 512, (BF16, BF16), (SBUF, SBUF), contiguous=False), 256),
    ("gen3", instruction("tensor_copy", "vector", 512, (BF16, F32), (SBUF, PSUM)), 512),
    ("gen2", instruction("tensor_copy", "vector", 512, (BF16, BF16), (SBUF, SBUF)), 512),
    ("gen3", instruction("tensor_tensor", "vector", 512, (F32, F32, F32), (SBUF, SBUF, SBUF)), 1024),
    ("gen3", instruction("tensor_tensor", "vector", 512, (F32, F32, F32), (SBUF, PSUM, SBUF)), 512),
    ("gen3", instruction("tensor_tensor", "vector", 512, (BF16, BF16, BF16), (SBUF, SBUF, SBUF)), 512),
    ("gen3", instruction("tensor_reduce", "vector", 512, (F32, F32), (SBUF, PSUM)), 512),
    ("gen3", instruction("tensor_reduce", "vector", 512, (BF16, BF16), (SBUF, SBUF)), 256),
    ("gen3", instruction("range_select", "vector", 512, (F32, F32), (SBUF, PSUM), readout=True), 576),
    ("gen3", instruction("reciprocal", "vector", 16, (F32, F32), (SBUF, SBUF)), 128),
    ("gen4", instruction("exponential", "vector", 512, (BF16, F32), (SBUF, PSUM)), 128),
    ("gen3", instruction("affine_select", "gpsimd", 512, (F32, F32), (SBUF, SBUF)), 662),
    ("gen3", instruction("core_barrier", "sync", 0, (), ()), 0),
]
GHZ = {
    "gen2": {"tensor": 2.8, "vector": 1.12, "scalar": 1.4, "gpsimd": 1.4, "sync": 1.0},
    "gen3": {"tensor": 2.4, "vector": 0.96, "scalar": 1.2, "gpsimd": 1.2, "sync": 1.0},
    "gen4": {"tensor": 2.4, "vector": 1.2, "scalar": 1.2, "gpsimd": 1.2, "sync": 1.0},
}


@pytest.mark.parametrize("target,i,cycles", CASES, ids=lambda x: x.op if isinstance(x, Instruction) else str(x))
def test_cycles(target: str, i: Instruction, cycles: float) -> None:
    assert lower_bound(Trace(target, [i])).busy[i.engine] == pytest.approx(cycles / GHZ[target][i.engine] / 1e9)


@pytest.mark.parametrize(
    "op,hbm,share", [("dma_copy", 1, 4096 / 4608), ("dma_transpose", 1, 0.9), ("dma_transpose", 0, 0.5)]
)
def test_dma(op: str, hbm: int, share: float) -> None:
    i = instruction(op, "dma", 2048, (BF16, BF16), (SBUF, SBUF), bytes=2**20, run=4096, hbm_read=hbm * 2**20)
    assert lower_bound(Trace("gen3", [i])).seconds == pytest.approx(2**20 / (368e9 * share))


def test_the_busiest_engine_of_the_busiest_core_and_the_bytes_of_all() -> None:
    def kernel(x: Any) -> Any:
        out = nl.ndarray((2, 128, 512), x.dtype, buffer=nl.shared_hbm)
        tile = nl.ndarray((128, 512), x.dtype)
        me = nl.program_id(0)
        nisa.dma_copy(tile, x)
        for _ in range(8 * me):
            nisa.reciprocal(tile, tile)
        nisa.dma_copy(out[me], tile)
        return out

    trace = run(kernel, np.ones((128, 512), np.float32), lnc=2, target="gen3", same_instructions=False).trace
    assert trace is not None
    b = lower_bound(trace)
    assert b.engine == "vector"
    assert b.seconds == pytest.approx(8 * 8 * 512 / 0.96e9)
    assert (b.hbm_read, b.hbm_written) == (2 * 128 * 512 * 4,) * 2
    assert b.hbm_bytes == 4 * 128 * 512 * 4
    assert len(trace.core(1)) == len(trace.core(0)) + 8
