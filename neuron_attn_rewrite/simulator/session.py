"""Switching the simulator on: while it is, `import nki` finds it; afterwards the name is as free as before."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.trace import Trace

_NAMES = ("nki", "nki.isa", "nki.language", "nki.typing")


@dataclass
class Session:
    """The simulator is switched on, with these options for launches; `trace` is that of the last launch."""

    options: dict[str, Any] = field(default_factory=dict)
    trace: Trace | None = None


_sessions: list[Session] = []
_kept: dict[str, ModuleType] = {}


def current_session() -> Session | None:
    return _sessions[-1] if _sessions else None


def real_nki() -> bool:
    """Whether the real `nki` is installed: an `nki` with an instruction set, not a placeholder of that name."""
    if any(name in sys.modules and sys.modules[name] is module for name, module in _simulated().items()):
        return False
    try:
        return importlib.util.find_spec("nki.isa") is not None
    except (ImportError, ValueError):
        return False


def _simulated() -> dict[str, ModuleType]:
    from neuron_attn_rewrite.simulator import isa, language, nki, typing_names

    return dict(zip(_NAMES, (nki, isa, language, typing_names), strict=True))


@contextmanager
def active(**options: Any) -> Iterator[Session]:
    """Switch the simulator on. Options: target="gen2|gen3|gen4", memory="logical|physical", uninitialized="error|nan".

    Modules imported meanwhile that use `nki` are bound to the simulator. They leave `sys.modules` together with it and
    come back with it. Where the real `nki` is installed, that stays what `import nki` finds.
    """
    unknown = set(options) - {"target", "memory", "uninitialized"}
    if unknown:
        raise SimulatorError(f"the simulator has no option {', '.join(sorted(unknown))}")
    session = Session(options)
    outermost = not _sessions and not real_nki()
    before = {name: sys.modules.get(name) for name in _NAMES}
    known = set(sys.modules)
    if outermost:
        sys.modules.update(_simulated())
        sys.modules.update(_kept)
    _sessions.append(session)
    try:
        yield session
    finally:
        _sessions.pop()
        if outermost:
            _put_away(known)
            for name, module in before.items():
                if module is None:
                    sys.modules.pop(name, None)
                else:
                    sys.modules[name] = module


def _put_away(known: set[str]) -> None:
    """Take the modules that are bound to the simulator out of `sys.modules` and keep them."""
    shims = list(_simulated().values())
    for name in set(sys.modules) - known:
        module = sys.modules[name]
        if name not in _NAMES and any(v is shim for v in vars(module).values() for shim in shims):
            _kept[name] = module
    for name in _kept:
        sys.modules.pop(name, None)
        parent, _, leaf = name.rpartition(".")
        if parent in sys.modules and getattr(sys.modules[parent], leaf, None) is _kept[name]:
            delattr(sys.modules[parent], leaf)


def load(name: str) -> ModuleType:
    """Import a module of kernels with the simulator in the place of `nki`, or with the real one where there is one."""
    with active():
        return importlib.import_module(name)


def simulate_really(kernel: Any, lnc: int) -> Callable[..., Any]:
    """The kernel under the simulator of the real `nki`."""
    simulated: Callable[..., Any] = importlib.import_module("nki").simulate(kernel[lnc])
    return simulated
