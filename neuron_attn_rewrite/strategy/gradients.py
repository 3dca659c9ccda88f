"""What computes the gradients of an attention that a kernel computes: asked when they are taken, and before.

`neuron_attn::flash_bwd` asks on the device. A report asks the same of the same attention, so that who trains knows.
"""

from __future__ import annotations

from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.strategy.clauses import Setting
from neuron_attn_rewrite.strategy.legality import illegal

OPERATORS = "operators"
"""What computes the gradients where no kernel does: plain torch operators, which form the scores."""


def gradients(
    problem: AttentionProblem, target: str, lnc: int, sdk: str | None = None
) -> tuple[str, tuple[Reason, ...]]:
    """The kernel for the gradients, or `OPERATORS`, and the clauses of those that can't.

    Args:
        problem: what the kernel of the forward computes.
        target: the hardware.
        lnc: physical cores of the call.
        sdk: the release whose kernels are meant; None for those that are installed.
    """
    refused = []
    for name in vendor.BACKWARD:
        adapter = None if sdk else vendor.find(name)
        if not sdk and adapter is None:
            continue
        parameters = adapter.parameters if adapter else None
        reason = illegal(name, problem, Setting(target, lnc, sdk or Setting.sdk, parameters))
        if reason is None:
            return name, ()
        refused.append(reason)
    return OPERATORS, tuple(refused)


def told(problem: AttentionProblem, target: str, lnc: int, sdk: str | None) -> tuple[str, Reason]:
    """As `gradients`, with what a report says of it."""
    name, refused = gradients(problem, target, lnc, sdk)
    where = f" where SDK {sdk} is installed" if sdk else ""
    if name != OPERATORS:
        return name, Reason("gradients", f"gradients are computed by {name}{where}")
    why = "; ".join(refused) or "no kernel for them is installed"
    return name, Reason("gradients-decomposed", f"gradients are computed by plain operators{where}: {why}")
