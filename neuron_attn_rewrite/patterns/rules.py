"""The tables of rules by operator. Only rules know how an attention may be spelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import fx

from neuron_attn_rewrite.graph.nodes import WRITTEN, op_name
from neuron_attn_rewrite.reasons import Reason

NO_RULE = Reason("unknown-node", "no rule knows it")
CHANGED = Reason("written", "the model writes into it after it is made")
DETACHED = Reason("gradient", "no gradient flows through it, but one would flow through a kernel")

Rule = TypeVar("Rule", bound=Callable[..., Any])


class Blocked(Exception):
    """Raised at a node that no rule can undo. The walk ends there, and the attention is not replaced."""

    def __init__(self, node: fx.Node, why: Reason = NO_RULE) -> None:
        self.node = node
        why = CHANGED if why is NO_RULE and WRITTEN in node.meta else why
        self.reason = why.behind(f"at {node.name} ({op_name(node) or node.op}): ")
        super().__init__(self.reason)


@dataclass(frozen=True)
class Registration:
    """A rule that was added. Undone by `undo()`, or at the end of a `with` block."""

    undo: Callable[[], None]

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


@dataclass(frozen=True)
class Rules(Generic[Rule]):
    """Rules by the name of the operator, such as `softmax`. The newest is asked first; None means "not mine"."""

    by_op: dict[str, list[Rule]] = field(default_factory=dict)

    def __call__(self, *ops: str) -> Callable[[Rule], Rule]:
        """Decorate the rule of some operators."""

        def decorate(rule: Rule) -> Rule:
            for op in ops:
                self.add(op, rule)
            return rule

        return decorate

    def add(self, op: str, rule: Rule) -> Registration:
        rules = self.by_op.setdefault(op, [])
        rules.insert(0, rule)
        return Registration(lambda: rules.remove(rule) if rule in rules else None)

    def of(self, node: fx.Node) -> Iterator[Rule]:
        return iter(tuple(self.by_op.get(op_name(node), ())))

    def ask(self, node: fx.Node, *given: Any) -> Any:
        """The first answer that is not None; None if no rule knows the node."""
        return next((answer for rule in self.of(node) if (answer := rule(*given)) is not None), None)
