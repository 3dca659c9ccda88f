"""Launch a kernel on one or two simulated cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.arguments import Arguments
from neuron_attn_rewrite.simulator.machine.core import Core, Link
from neuron_attn_rewrite.simulator.machine.memory import Allocator
from neuron_attn_rewrite.simulator.machine.pair import Pair
from neuron_attn_rewrite.simulator.machine.target import target
from neuron_attn_rewrite.simulator.session import Options, check_choice, current_session
from neuron_attn_rewrite.simulator.trace import Trace


@dataclass(frozen=True)
class Result:
    """What a launch gave."""

    outputs: Any
    """What the kernel returned: a tensor, a tuple of tensors, or None. They are of torch if an argument was, else of
    numpy."""
    trace: Trace | None
    """What the kernel did. None if the real `nki` ran it."""


def launch(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    lnc: int = 1,
    options: Options | None = None,
    first_core: int = 0,
    same_instructions: bool = True,
) -> Result:
    """Run `func` as a kernel. `options` are those of the session if not given.

    Raises:
        SimulatorError: the kernel breaks a rule of NKI, or an option has a value that does not exist.
    """
    check_choice("lnc", lnc, (1, 2))
    check_choice("first_core", first_core, (0, 1))
    session = current_session()
    options = options or session.options
    chip = target(options.target)
    check = options.uninitialized == "error"
    arguments = Arguments(chip, lnc)
    bound = arguments.bind(func, args, kwargs)
    link = Pair(first_core) if lnc == 2 else Link()
    cores = [
        Core(n, lnc, chip, Allocator(chip, physical=options.memory == "physical"), link, check_reads=check)
        for n in range(lnc)
    ]
    results = link.execute(cores, lambda: func(**bound))
    if lnc == 2 and same_instructions:
        _check_same_instructions(cores)
    session.trace = Trace(chip.name, [i for core in cores for i in core.instructions])
    outputs = arguments.outputs(results[0], check=check)
    arguments.write_back()
    return Result(outputs, session.trace)


def _check_same_instructions(cores: list[Core]) -> None:
    """Both cores run one program. Only loops of the hardware may run a different number of times.

    The release notes of NKI demand identical control flow and say that this is not enforced. The SDK's own
    `attention_cte` gives its cores unequal work, so the check can be switched off.
    """
    first, second = ([i.label for i in core.instructions if not i.in_loop] for core in cores)
    for n in range(max(len(first), len(second))):
        a, b = first[n : n + 1], second[n : n + 1]
        if a != b:
            shown = [f"{x[0][0]} {x[0][1] or ''}".strip() if x else "nothing" for x in (a, b)]
            raise SimulatorError(
                f"instruction {n} is {shown[0]} on core 0 and {shown[1]} on core 1: they must be the same on both"
            )
