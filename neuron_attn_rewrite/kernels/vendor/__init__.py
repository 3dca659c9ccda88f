"""The attention kernels that the Neuron SDK ships, one module a generation. Importing this imports no SDK."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from neuron_attn_rewrite.errors import KernelError
from neuron_attn_rewrite.kernels.nki import prepare
from neuron_attn_rewrite.kernels.orders import Accepted
from neuron_attn_rewrite.kernels.vendor.adapter import Adapter
from neuron_attn_rewrite.kernels.vendor.neuronxcc import ATTENTION_ISA, FLASH_ATTN_BWD, FLASH_FWD
from neuron_attn_rewrite.kernels.vendor.nkilib import (
    ATTENTION_BWD,
    ATTENTION_CTE,
    ATTENTION_SEGMENTED_CTE,
    ATTENTION_TKG,
)
from neuron_attn_rewrite.kernels.vendor.nxd_inference import FLASH_PAGED, SLIDING_WINDOW

ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {
        adapter.name: adapter
        for adapter in (
            ATTENTION_CTE,
            ATTENTION_TKG,
            ATTENTION_SEGMENTED_CTE,
            ATTENTION_ISA,
            FLASH_FWD,
            SLIDING_WINDOW,
        )
    }
)
"""By name, as in decisions and in the op's `kernel_name`. Of equally fast kernels the first is chosen."""
BEHIND: Mapping[str, Adapter] = MappingProxyType({name: a for name, a in ADAPTERS.items() if a.behind})
"""The kernels of `flash_prior`, by its `kernel_name`."""
BACKWARD: Mapping[str, Adapter] = MappingProxyType({a.name: a for a in (ATTENTION_BWD, FLASH_ATTN_BWD)})
"""The kernels of `flash_bwd`. The first one that can compute the gradients is chosen."""
PAGED: Mapping[str, Adapter] = MappingProxyType({FLASH_PAGED.name: FLASH_PAGED})
"""The kernels of `flash_paged`, by its `kernel_name`."""
_ALL = {**ADAPTERS, **BACKWARD, **PAGED}


def find(name: str) -> Adapter | None:
    """The adapter of an installed kernel, ready to be called; None if it is not installed or not of this package."""
    return _ALL[name].resolve() if name in _ALL else None


def require(name: str) -> Adapter:
    """As `find`.

    Raises:
        KernelError: the kernel is not installed.
    """
    adapter = find(name)
    if adapter is None:
        places = ", ".join(p.replace(":", ".") for p in _ALL[name].places) if name in _ALL else "nothing"
        raise KernelError(
            f"this graph was rewritten for the SDK's kernel {name!r}, not installed here (looked for {places}). "
            'Install the SDK that ships it, or rewrite with RewriteConfig(kernels=("flash_fwd",)).'
        )
    return adapter


def accepted(name: str) -> Accepted:
    """The orders that a kernel takes: ours, or an adapter's."""
    return ADAPTERS[name].accepts if name in ADAPTERS else prepare.ACCEPTED


def installed() -> tuple[str, ...]:
    """The names of the kernels that can be called here."""
    return tuple(name for name in ADAPTERS if find(name))
