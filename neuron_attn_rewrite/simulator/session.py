"""The options of launches, and the session that sets them while the simulator is active."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.target import target
from neuron_attn_rewrite.simulator.trace import Trace

Memory: TypeAlias = Literal["logical", "physical"]
Uninitialized: TypeAlias = Literal["error", "nan"]


@dataclass(frozen=True)
class Options:
    """How a kernel is launched; `simulator.run` explains each option."""

    target: str | None = None
    memory: Memory = "logical"
    uninitialized: Uninitialized = "error"

    def __post_init__(self) -> None:
        if self.target is not None:
            target(self.target)
        check_choice("memory", self.memory, ("logical", "physical"))
        check_choice("uninitialized", self.uninitialized, ("error", "nan"))

    def changed(self, **options: Any) -> Options:
        """These options with those that are not None in the place of their own."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})


@dataclass
class Session:
    """The options of each launch that does not set its own, and the trace of the last launch."""

    options: Options = field(default_factory=Options)
    trace: Trace | None = None
    """None before the first launch."""


_sessions: list[Session] = []


def current_session() -> Session:
    """The innermost session that is open, or one with the default options."""
    return _sessions[-1] if _sessions else Session()


@contextmanager
def opened(session: Session) -> Iterator[Session]:
    """Launches within belong to this session."""
    _sessions.append(session)
    try:
        yield session
    finally:
        _sessions.pop()


def check_choice(name: str, value: object, legal: tuple[object, ...]) -> None:
    """Raise SimulatorError if the value of an option is none of these."""
    if value not in legal:
        raise SimulatorError(f"{name} must be {' or '.join(map(repr, legal))}, not {value!r}")
