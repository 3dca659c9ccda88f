"""TorchNeuron: AOTAutograd's graph with the kernels' own nodes in the place of our ops, which its compiler takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch

from neuron_attn_rewrite.kernels.vendor.sdk import has
from neuron_attn_rewrite.ops.blocks import checked_blocks
from neuron_attn_rewrite.ops.definitions import BLOCKS
from neuron_attn_rewrite.ops.flash_fwd import backward_on_device, forward_on_device

WRAPPERS = ("libtorch_neuronx_lite.nki.nki_hop:wrap_nki", "torch_neuronx:wrap_nki")
"""Where TorchNeuron keeps what turns a NKI kernel into a node of AOTAutograd's graph."""


RULES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "flash_fwd": forward_on_device,
        "flash_bwd": backward_on_device,
        "flash_blocks": BLOCKS.on_device,
        "checked_blocks": checked_blocks,
    }
)
"""What computes an op, with a way to launch kernels."""


def wrap_nki() -> Callable[[Any], Any] | None:
    """TorchNeuron's way to make a NKI kernel a node of the graph; None if it is not installed."""
    for place in WRAPPERS:
        module, name = place.split(":")
        if has(module.partition(".")[0], "__name__") and has(module, name):
            found: Callable[[Any], Any] = getattr(import_module(module), name)
            return found
    return None


@contextmanager
def dissolved(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block AOTAutograd sees the kernel's own node in place of our op, which its compiler doesn't know.

    Args:
        wrap: TorchNeuron's `wrap_nki`: `wrap(kernel)[grid](**arguments)`.
    """
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    def launcher(kernel: Any, lnc: int) -> Callable[..., Any]:
        launched: Callable[..., Any] = wrap(kernel)[(lnc,)]
        return launched

    def rule(compute: Callable[..., Any]) -> Callable[..., Any]:
        def on_device(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
            given = {} if compute is checked_blocks else {"launcher": launcher}
            with mode:
                return compute(*args, **(kwargs or {}), **given)

        return on_device

    untyped: Any = torch.library
    library = untyped.Library("neuron_attn", "FRAGMENT")
    try:
        for op, compute in RULES.items():
            untyped.register_torch_dispatch(f"neuron_attn::{op}", FunctionalTensorMode, rule(compute), lib=library)
        yield
    finally:
        library._destroy()
