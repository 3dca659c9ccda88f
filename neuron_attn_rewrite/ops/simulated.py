"""Run the attention ops through their NKI kernels on a CPU, on the simulator.

With `NEURON_ATTN_SIMULATE` set in the environment to 1, or to a target "gen2", "gen3" or "gen4", every attention op on
CPU tensors runs its kernel; `simulated` does so for the calls within it. This tests the kernel's arithmetic
and the documented rules. It does not show its speed, and not that it runs on a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from neuron_attn_rewrite.errors import ConfigError
from neuron_attn_rewrite.kernels.nki.prepare import Launch

VARIABLE = "NEURON_ATTN_SIMULATE"
TARGETS = ("gen2", "gen3", "gen4")
_targets: list[str] = []


@contextmanager
def simulated(target: str = "gen3") -> Iterator[None]:
    """Attention ops within run their NKI kernels on the simulator of a target: "gen2", "gen3" (trn2), "gen4" (trn3)."""
    _targets.append(_checked(target, "simulated(target)"))
    try:
        yield
    finally:
        _targets.pop()


def simulating() -> str | None:
    """The target to simulate, None if ops should compute as usual."""
    if _targets:
        return _targets[-1]
    value = os.environ.get(VARIABLE, "")
    if value in ("", "0"):
        return None
    return "gen3" if value == "1" else _checked(value, VARIABLE)


def _checked(target: str, name: str) -> str:
    if target not in TARGETS:
        raise ConfigError(f"{name}={target!r} is not possible: choose one of {', '.join(map(repr, TARGETS))}.")
    return target


def run(launch: Launch, target: str, **options: Any) -> tuple[Any, Any]:
    """The launch's result on the simulator, and the trace of what it did. `options` are the simulator's."""
    from neuron_attn_rewrite import simulator

    kernel = getattr(simulator.load(launch.module), launch.kernel)
    arguments: dict[str, Any] = {**launch.tensors, **launch.static, **options}
    done = simulator.run(kernel, lnc=launch.lnc, target=target, **arguments)
    return launch.finish(done.outputs), done.trace
