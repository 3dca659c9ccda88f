"""The simulator's `nki`: what kernel source finds under that name while the simulator is switched on. It is not NKI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator import isa, language
from neuron_attn_rewrite.simulator.core import is_running

__version__ = "0.0+simulator"


class Kernel:
    """A function under `@nki.jit`. `kernel[lnc](...)` runs it on the simulator, for the target that is switched on."""

    def __init__(self, func: Callable[..., Any], lnc: int = 1) -> None:
        self.func, self.lnc = func, lnc
        self.__name__, self.__doc__ = getattr(func, "__name__", "kernel"), func.__doc__

    def __getitem__(self, lnc: int) -> Kernel:
        if lnc not in (1, 2):
            raise SimulatorError(f"{self.__name__}[{lnc!r}]: a launch has LNC 1 or 2")
        return Kernel(self.func, lnc)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from neuron_attn_rewrite.simulator.launch import launch

        if is_running():
            raise SimulatorError(f"{self.__name__} is under @nki.jit and called from a kernel; call the plain function")
        return launch(self.func, args, kwargs, lnc=self.lnc).outputs

    def with_schedule(self, schedule: object) -> Kernel:
        """Scheduling has no effect on values."""
        return self


def jit(fn: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """Mark a function as a kernel; `mode=` is ignored, `platform_target=` was removed from NKI."""
    if set(kwargs) - {"mode"}:
        raise SimulatorError(f"nki.jit takes no {', '.join(sorted(set(kwargs) - {'mode'}))}")
    return Kernel(fn) if fn is not None else Kernel


def simulate(kernel: Callable[..., Any]) -> Kernel:
    """A callable that runs the kernel here; with this `nki` every kernel does that anyway."""
    return kernel if isinstance(kernel, Kernel) else Kernel(kernel)


__all__ = ["Kernel", "isa", "jit", "language", "simulate"]
