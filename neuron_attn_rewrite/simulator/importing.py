"""What `import nki` finds: the simulator while it is active, else whatever is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from neuron_attn_rewrite.simulator import nki
from neuron_attn_rewrite.simulator.nki import isa, language, typing
from neuron_attn_rewrite.simulator.session import Memory, Options, Session, Uninitialized, opened

_SIMULATED: dict[str, ModuleType] = {"nki": nki, "nki.isa": isa, "nki.language": language, "nki.typing": typing}
_kernel_modules: dict[str, ModuleType] = {}
"""Modules that were imported against the simulator. They are in `sys.modules` only while it is active."""


def real_nki() -> bool:
    """Whether the real `nki` is installed. A package of that name without an instruction set does not count."""
    if any(sys.modules.get(name) is module for name, module in _SIMULATED.items()):
        return False
    try:
        return importlib.util.find_spec("nki.isa") is not None
    except (ImportError, ValueError):
        return False


@contextmanager
def active(
    *, target: str | None = None, memory: Memory = "logical", uninitialized: Uninitialized = "error"
) -> Iterator[Session]:
    """Within this context, `import nki` finds the simulator.

    The options are those of `run`; they hold for each launch that does not set its own. The `trace` of the session
    that the context gives is that of the last launch.

    A module that is imported within the context and uses `nki` is bound to the simulator. It leaves `sys.modules` at
    the end of the context, and is there again in the next one. If the real `nki` is installed, `import nki` finds the
    real one here too.

    Raises:
        SimulatorError: an option has a value that does not exist.
    """
    with opened(Session(Options(target, memory, uninitialized))) as session:
        if _is_installed() or real_nki():
            yield session
        else:
            with _installed():
                yield session


def _is_installed() -> bool:
    return sys.modules.get("nki") is nki


@contextmanager
def _installed() -> Iterator[None]:
    """The simulator's modules, and those that were imported against them, are in `sys.modules`."""
    before = {name: sys.modules.get(name) for name in _SIMULATED}
    known = set(sys.modules)
    sys.modules.update(_SIMULATED)
    sys.modules.update(_kernel_modules)
    try:
        yield
    finally:
        _put_away(known)
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def _put_away(known: set[str]) -> None:
    """Take the modules that are bound to the simulator out of `sys.modules` and out of their packages."""
    simulated = list(_SIMULATED.values())
    for name in set(sys.modules) - known:
        module = sys.modules[name]
        if name not in _SIMULATED and any(v is s for v in vars(module).values() for s in simulated):
            _kernel_modules[name] = module
    for name, module in _kernel_modules.items():
        sys.modules.pop(name, None)
        parent, _, leaf = name.rpartition(".")
        if parent in sys.modules and getattr(sys.modules[parent], leaf, None) is module:
            delattr(sys.modules[parent], leaf)


def load(name: str) -> ModuleType:
    """Import a module of kernels, such as "my_package.my_kernels", with the simulator in the place of `nki`.

    If the real `nki` is installed, the module gets the real one.
    """
    with active():
        return importlib.import_module(name)


def simulate_really(kernel: Any, lnc: int) -> Callable[..., Any]:
    """The kernel as a function that runs on the simulator of the real `nki`, on `lnc` cores."""
    simulated: Callable[..., Any] = importlib.import_module("nki").simulate(kernel[lnc])
    return simulated
