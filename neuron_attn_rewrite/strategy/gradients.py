"""What computes the gradients of an attention that a kernel computes: a kernel of the SDK, or plain operators.

`neuron_attn::flash_bwd` decides by this on the device, and the report says it before the model is trained.
"""

from __future__ import annotations

from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.strategy.clauses import Setting
from neuron_attn_rewrite.strategy.legality import illegal

OPERATORS = "operators"
"""Plain torch operators, which compute the score matrix again. They are used if no kernel can."""


def gradients(
    problem: AttentionProblem, target: str, lnc: int, sdk: str | None = None
) -> tuple[str, tuple[Reason, ...]]:
    """The kernel for the gradients, or `OPERATORS` with the reason of each kernel that can't.

    Args:
        problem: what the forward kernel computes.
        target: the hardware.
        lnc: physical cores of the call.
        sdk: a release, whose kernels are asked. None for the installed kernels.
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


def gradients_with_reason(problem: AttentionProblem, target: str, lnc: int, sdk: str | None) -> tuple[str, Reason]:
    """As `gradients`, with the sentence for the report."""
    name, refused = gradients(problem, target, lnc, sdk)
    where = f" where SDK {sdk} is installed" if sdk else ""
    if name != OPERATORS:
        return name, Reason("gradients", f"gradients are computed by {name}{where}")
    why = "; ".join(refused) or "no kernel for them is installed"
    return name, Reason("gradients-decomposed", f"gradients are computed by plain operators{where}: {why}")
