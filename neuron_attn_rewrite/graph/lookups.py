"""Makes the code of a graph look up each operator, and each module that holds weights, once a call.

To find `self.model.layers.7.mlp` or `torch.ops.aten.mul.Tensor` anew for each node takes about as much time as a small
operator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx

MODULE, OPERATOR = "found_module_{}", "found_{}_{}_{}"
"""The variables of a module and of an operator."""
_READ = re.compile(r"(\w+) = (\S+(?:, \"[^\"]+\"\)\S*)*)")
_CALL = re.compile(r"= torch\.ops\.(\w+)\.(\w+)\.(\w+)\(")
_STEPS = (
    (re.compile(r'getattr\((.+), "([^"]+)"\)'), 'getattr({}, "{}")'),
    (re.compile(r"(.+)\.(\w+)"), "{}.{}"),
)
"""How the code reads an attribute: of what, and its name."""


def share_lookups(graph: fx.Graph) -> None:
    """Make the code that is generated of this graph look up each operator and each module once."""
    graph.on_generate_code(lambda before: before or shared)


def shared(body: Sequence[str]) -> list[str]:
    """Lines of code with a variable for each module and operator. A line of any other kind stays as it is."""
    variables = {"self": "self"}
    found: list[str] = []
    for line in body:
        if (call := _CALL.search(line)) is not None:
            name = OPERATOR.format(*call.groups())
            if name not in variables:
                variables[name] = name
                found.append(f"{name} {call[0][:-1]}\n")
            line = line.replace(call[0], f"= {name}(", 1)
        elif (read := _READ.fullmatch(line)) is not None:
            steps = _steps(read[2])
            for owner, name, step in steps[:-1]:
                path = step.format(owner, name)
                if path not in variables:
                    variables[path] = MODULE.format(len(variables))
                    found.append(f"{variables[path]} = {step.format(variables[owner], name)}\n")
            for owner, name, step in steps[-1:]:
                line = f"{read[1]} = {step.format(variables[owner], name)}"
        found.append(line)
    return found


def _steps(text: str) -> list[tuple[str, str, str]]:
    """Each attribute on a path from `self`: of what, its name, and how it is read. Empty if it is no such path."""
    steps: list[tuple[str, str, str]] = []
    while text != "self":
        found = next(((match, form) for pattern, form in _STEPS if (match := pattern.fullmatch(text))), None)
        if found is None:
            return []
        match, form = found
        steps.append((match[1], match[2], form))
        text = match[1]
    return steps[::-1]
