"""Stand-ins for the SDK's kernels: the public signature, the documented shape checks, and the documented meaning in
float32. A wrong layout, a double scaling or a wrong window gives a wrong number or an AssertionError.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.stand_ins import neuronxcc, nkilib
from tests.stand_ins.neuronxcc import FlashConfig
from tests.stand_ins.nkilib import attention_cte_2_29, attention_cte_2_31

__all__ = ["Cores", "Recorded", "attention_cte_2_29", "attention_cte_2_31", "install", "put"]

PLACES: dict[str, tuple[str, Callable[..., Any]]] = {
    "attention_segmented_cte": (
        "nkilib.core.attention.attention_segmented_cte:attention_segmented_cte",
        nkilib.attention_segmented_cte,
    ),
    "attention_tkg": (
        "neuron_attn_rewrite.kernels.vendor.tkg_entry:attention_tkg_entry",
        nkilib.attention_tkg_entry,
    ),
    "attention_bwd": ("nkilib.core.attention.attention_bwd:attention_bwd", nkilib.attention_bwd),
    "attention_isa_kernel": (
        "neuronxcc.nki._private_kernels.attention:attention_isa_kernel",
        neuronxcc.attention_isa_kernel,
    ),
    "neuronxcc_flash_fwd": ("neuronxcc.nki.kernels.attention:flash_fwd", neuronxcc.neuronxcc_flash_fwd),
    "flash_attn_bwd": ("neuronxcc.nki.kernels.attention:flash_attn_bwd", neuronxcc.flash_attn_bwd),
    "sliding_window_flash_fwd": (
        "neuronx_distributed_inference.modules.sliding_window.attention:flash_fwd",
        neuronxcc.sliding_window_flash_fwd,
    ),
    "flash_paged_attention_with_schedule": (
        "neuronx_distributed_inference.modules.chunked_prefill.flash_pa_with_schedule:"
        "flash_paged_attention_with_schedule",
        neuronxcc.flash_paged_attention_with_schedule,
    ),
}
"""Where each kernel of the SDK lies, and what stands in for it."""


@dataclass
class Recorded:
    """A kernel that can be launched on a grid, and remembers how it was."""

    func: Callable[..., Any]
    calls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            assert not args, "positions of arguments move between releases"
            self.calls.append((grid, kwargs))
            return self.func(**kwargs)

        return launch

    def __call__(self, **kwargs: Any) -> Any:
        return self[None](**kwargs)


def put(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A module under this name, with its parents."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules or not isinstance(sys.modules[path], types.ModuleType):
            module = types.ModuleType(path)
            module.__spec__ = types.SimpleNamespace(name=path)  # type: ignore[assignment]
            module.__path__ = []  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, path, module)
    for key, value in attributes.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def install(monkeypatch: pytest.MonkeyPatch, cte: Callable[..., Any] = attention_cte_2_31) -> dict[str, Recorded]:
    """Every stand-in under the SDK's import paths, and what is launched by."""
    places = PLACES | {"attention_cte": ("nkilib.core.attention.attention_cte:attention_cte", cte)}
    kernels = {name: Recorded(function) for name, (_, function) in places.items()}
    for name, (place, _) in places.items():
        module, attribute = place.split(":")
        put(monkeypatch, module, **{attribute: kernels[name]})
    for module in ("neuronxcc.nki.kernels.attention", "neuronx_distributed_inference.modules.sliding_window.attention"):
        put(monkeypatch, module, FlashConfig=FlashConfig)
    put(monkeypatch, "nki", jit=lambda kernel: kernel)
    put(monkeypatch, "torch_neuronx.xla_impl.ops", nki_jit=lambda: lambda kernel: kernel)
    put(monkeypatch, "neuronxcc.nki.language", nc=Cores)
    return kernels


@dataclass(frozen=True)
class Cores:
    """neuronxcc.nki.language.nc: physical cores, as a factor of a grid axis."""

    count: int
    axis: int = 1

    def __mul__(self, axis: int) -> Cores:
        return Cores(self.count, axis)
