"""A strict functional simulator of NKI: run a kernel on a CPU; get its outputs, its trace and its errors.

    import numpy as np
    from neuron_attn_rewrite import simulator

    kernels = simulator.load("my_package.my_kernels")      # a module that does `import nki`
    result = simulator.run(kernels.my_kernel, np.ones((128, 512), np.float32), target="gen3")
    result.outputs                                         # a numpy array, as the argument is
    result.trace.counts()                                  # how often each instruction ran
    simulator.lower_bound(result.trace).seconds            # the kernel takes at least so long

It is written from the public documentation, models the subset of NKI that attention kernels need, and is not NKI: it
neither compiles nor schedules. docs/simulator.md lists what it checks and what it does not.
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
    raise ImportError("the simulator needs numpy and ml_dtypes: pip install numpy ml_dtypes") from e

from neuron_attn_rewrite.simulator.cost import LowerBound, lower_bound
from neuron_attn_rewrite.simulator.importing import active, load, real_nki, simulate_really
from neuron_attn_rewrite.simulator.launch import Result, launch
from neuron_attn_rewrite.simulator.nki import Kernel
from neuron_attn_rewrite.simulator.session import Memory, Session, Uninitialized, current_session
from neuron_attn_rewrite.simulator.trace import Instruction, Trace


def run(
    kernel: Callable[..., Any],
    *args: Any,
    lnc: int | None = None,
    target: str | None = None,
    memory: Memory | None = None,
    uninitialized: Uninitialized | None = None,
    first_core: int = 0,
    same_instructions: bool = True,
    **kwargs: Any,
) -> Result:
    """Launch a kernel, and return its outputs and its trace.

    A kernel of the real `nki` goes to the simulator of the real `nki`.

    Args:
        kernel: a function under `@nki.jit`, or a plain function that computes with `nki`.
        args: the arguments of the kernel. Tensors are of torch, on the CPU, or of numpy; of any shape, and of a dtype
            that NKI has, so of at most 32 bits. What the kernel writes into them is in them afterwards.
        kwargs: more arguments of the kernel. An argument whose name is one of the options here can only be given by
            position.
        lnc: how many physical cores run the kernel, 1 or 2; by default as in `kernel[lnc]`, else 1.
        target: "gen2", "gen3" (trn2) or "gen4" (trn3), or the name of a device such as "trn2". By default that of
            `active`, else NEURON_PLATFORM_TARGET_OVERRIDE of the environment, else "gen3".
        memory: "logical" (default): each tensor has bytes of its own. "physical": tensors with `address=` share SBUF
            and PSUM, and all tensors that Python refers to must fit into them.
        uninitialized: "error" (default) if a read of bytes that nothing was written to is an error, "nan" if it gives
            NaN.
        first_core: which of two cores runs first, and first after each synchronisation: 0 or 1. A correct kernel gives
            the same result for both.
        same_instructions: whether it is an error if two cores issue different instructions.

    Raises:
        SimulatorError: the kernel breaks a rule of NKI or uses what the simulator does not model, or an option has a
            value that does not exist.
    """
    if isinstance(kernel, Kernel):
        lnc, kernel = lnc or kernel.lnc, kernel.func
    elif real_nki() and not inspect.isfunction(kernel):
        return Result(simulate_really(kernel, lnc or 1)(*args, **kwargs), None)
    return launch(
        kernel,
        args,
        kwargs,
        lnc=1 if lnc is None else lnc,
        options=current_session().options.changed(target=target, memory=memory, uninitialized=uninitialized),
        first_core=first_core,
        same_instructions=same_instructions,
    )


__all__ = [
    "Instruction",
    "Kernel",
    "LowerBound",
    "Result",
    "Session",
    "SimulatorError",
    "Trace",
    "active",
    "load",
    "lower_bound",
    "real_nki",
    "run",
]
