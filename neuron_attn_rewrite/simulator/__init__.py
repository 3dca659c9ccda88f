"""A strict functional simulator of the NKI subset that flash attention needs, written from public documentation.

    kernels = load("my_package.my_kernels")            # source that does `import nki`
    result = run(kernels.flash_fwd, q, k, v, lnc=2, target="gen3")
    result.outputs, result.trace

It is not NKI: it neither compiles nor schedules. See docs/simulator.md for what it checks and what it does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from neuron_attn_rewrite.errors import SimulatorError

try:
    import ml_dtypes  # noqa: F401
    import numpy  # noqa: F401
except ImportError as e:
    raise ImportError("the simulator needs numpy and ml_dtypes: pip install 'neuron-attn-rewrite[simulator]'") from e

from neuron_attn_rewrite.simulator.launch import Run, launch
from neuron_attn_rewrite.simulator.nki import Kernel
from neuron_attn_rewrite.simulator.session import Session, active, load, real_nki, simulate_really
from neuron_attn_rewrite.simulator.trace import Instruction, Trace


def run(
    kernel: Callable[..., Any],
    *args: Any,
    lnc: int | None = None,
    target: str | None = None,
    memory: str | None = None,
    uninitialized: str | None = None,
    first_core: int = 0,
    same_instructions: bool = True,
    **kwargs: Any,
) -> Run:
    """Launch a kernel, `@nki.jit` or a plain function, with tensors of numpy or torch; the rest goes to the kernel.

    lnc: cores, 1 or 2. target: "gen2", "gen3" or "gen4". memory: "logical" (independent tensors) or "physical"
    (tensors share bytes by address=, capacity is counted). uninitialized: "error", or "nan" to read NaN. first_core:
    which core of two runs first up to each synchronisation; a right kernel gives the same either way.
    same_instructions: whether both cores must issue the same instructions.

    Raises SimulatorError where the kernel breaks a rule of NKI. A kernel of the real `nki` goes to its own simulator.
    """
    if isinstance(kernel, Kernel):
        lnc = lnc or kernel.lnc
        kernel = kernel.func
    elif real_nki() and not inspect.isfunction(kernel):
        return Run(simulate_really(kernel, lnc or 1)(*args, **kwargs), None)
    return launch(
        kernel,
        args,
        kwargs,
        lnc=1 if lnc is None else lnc,
        target_name=target,
        memory=memory,
        uninitialized=uninitialized,
        first_core=first_core,
        same_instructions=same_instructions,
    )


__all__ = ["Instruction", "Kernel", "Run", "Session", "SimulatorError", "Trace", "active", "load", "real_nki", "run"]
