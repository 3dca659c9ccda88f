"""The hardware: the names, cores and rates of the NeuronCore generations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Hardware:
    """One physical NeuronCore. Sources: the SDK's architecture guides and its DMA bandwidth guide."""

    generation: str
    """What NKI calls it."""
    max_lnc: int
    """Physical cores in the largest logical NeuronCore (LNC)."""
    tensor_ghz: float
    vector_ghz: float
    scalar_ghz: float
    dma_gbs: float


HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        "trn1": Hardware("gen2", 1, 2.8, 1.12, 1.4, 272),
        "inf2": Hardware("gen2", 1, 2.8, 1.12, 1.4, 272),
        "trn2": Hardware("gen3", 2, 2.4, 0.96, 1.2, 368),
        "trn3": Hardware("gen4", 2, 2.4, 1.2, 1.2, 528),
    }
)
"""By the name of the target."""
GENERATIONS: Mapping[str, str] = MappingProxyType({name: chip.generation for name, chip in HARDWARE.items()})
"""The generation of each target."""
TARGETS: Mapping[str, str] = MappingProxyType({"gen2": "trn1", "gen3": "trn2", "gen4": "trn3"})
"""One target of each generation."""
