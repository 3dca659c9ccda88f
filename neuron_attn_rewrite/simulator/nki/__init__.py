"""The simulator's `nki`: what kernel source finds under that name while the simulator is active. It is not NKI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.launch import launch
from neuron_attn_rewrite.simulator.machine.core import is_running
from neuron_attn_rewrite.simulator.nki import isa, language

__version__ = "0.0+simulator"


class Kernel:
    """A function under `@nki.jit`. `kernel[lnc](...)` runs it on `lnc` simulated cores and returns its outputs."""

    def __init__(self, func: Callable[..., Any], lnc: int = 1) -> None:
        self.func, self.lnc = func, lnc
        self.__name__, self.__doc__ = getattr(func, "__name__", "kernel"), func.__doc__

    def __getitem__(self, lnc: int) -> Kernel:
        if lnc not in (1, 2):
            raise SimulatorError(f"{self.__name__}[{lnc!r}]: LNC must be 1 or 2")
        return Kernel(self.func, lnc)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_running():
            raise SimulatorError(f"{self.__name__} is under @nki.jit and called from a kernel: call the plain function")
        return launch(self.func, args, kwargs, lnc=self.lnc).outputs

    def with_schedule(self, schedule: object) -> Kernel:
        """The kernel itself: a schedule has no effect on values."""
        return self


def jit(fn: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """Mark a function as a kernel. `mode=` is ignored; NKI has removed `platform_target=`."""
    if set(kwargs) - {"mode"}:
        raise SimulatorError(f"nki.jit has no option {', '.join(sorted(set(kwargs) - {'mode'}))}")
    return Kernel(fn) if fn is not None else Kernel


def simulate(kernel: Callable[..., Any]) -> Kernel:
    """The kernel itself: with this `nki`, every call of a kernel is simulated."""
    return kernel if isinstance(kernel, Kernel) else Kernel(kernel)


__all__ = ["Kernel", "isa", "jit", "language", "simulate"]
