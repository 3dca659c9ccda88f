"""The memory sizes of the three NeuronCore generations. Sources: `nki.isa` and the architecture guides."""

from __future__ import annotations

import os
from dataclasses import dataclass

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.hardware import GENERATIONS

PARTITIONS = 128
PSUM_BANKS = 8
PSUM_BANK_BYTES = 2048
PSUM_BYTES = PSUM_BANKS * PSUM_BANK_BYTES


@dataclass(frozen=True)
class Target:
    """One NeuronCore generation.

    `sbuf_bytes` is what a kernel may use of each partition (source: KLR, `Trace.lean`, March 2026). The documentation
    only gives the raw size, `sbuf_raw_bytes`. `moving` is the largest free size, in elements, of the moving operand of
    a matmul, by the dtype of dst.
    """

    name: str
    generation: int
    sbuf_raw_bytes: int
    sbuf_bytes: int
    moving: dict[str, int]

    def __str__(self) -> str:
        return self.name


TARGETS = {
    t.name: t
    for t in (
        Target("gen2", 2, 192 * 1024, 180224, {"float32": 512}),
        Target("gen3", 3, 224 * 1024, 212984, {"float32": 512}),
        Target("gen4", 4, 256 * 1024, 245752, {"float32": 4096, "bfloat16": 8192}),
    )
}


def target(name: str | None = None) -> Target:
    """The target of that name, else that of NEURON_PLATFORM_TARGET_OVERRIDE in the environment, else gen3."""
    name = name or os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE") or "gen3"
    found = TARGETS.get(GENERATIONS.get(name, name))
    if found is None:
        raise SimulatorError(f"target {name!r} is unknown; use one of {', '.join([*TARGETS, *GENERATIONS])}")
    return found
