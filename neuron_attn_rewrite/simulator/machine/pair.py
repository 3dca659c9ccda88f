"""The two cores of a logical NeuronCore: they take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.core import Core, Link, execute
from neuron_attn_rewrite.simulator.machine.memory import Storage


class _OtherCoreFailed(SimulatorError):
    """This core stops because the other one raised an error."""


class Pair(Link):
    """Two cores that take turns. Each runs until it has to wait for the other.

    So a launch does the same every time. A core does not see what the other core has not written yet.
    """

    def __init__(self, first: int) -> None:
        self.turn, self.condition = first, threading.Condition()
        self.waiting: dict[int, tuple[tuple[str, object], Any]] = {}
        self.answers: dict[int, Any] = {}
        self.done: set[int] = set()
        self.failed = False
        self.tensors: dict[int, list[Storage]] = {0: [], 1: []}

    def start(self, core: int) -> None:
        """Wait for the first turn."""
        with self.condition:
            self.condition.wait_for(lambda: self.turn == core or self.failed)
        if self.failed:
            raise _OtherCoreFailed("the other core failed")

    def finish(self, core: int, *, failed: bool) -> None:
        with self.condition:
            self.done.add(core)
            self.failed |= failed
            self.turn = 1 - core
            self.condition.notify_all()

    def meet(self, core: int, key: tuple[str, object], payload: Any) -> Any:
        other = 1 - core
        with self.condition:
            if other in self.waiting:
                theirs, value = self.waiting.pop(other)
                if theirs != key:
                    raise SimulatorError(
                        f"core {core} is at {key[0]} and core {other} at {theirs[0]}: both would wait forever"
                    )
                self.answers[other] = payload
                return value
            if other in self.done:
                raise SimulatorError(
                    f"core {core} waits at {key[0]}, and core {other} has ended: it would wait forever"
                )
            self.waiting[core] = (key, payload)
            self.turn = other
            self.condition.notify_all()
            self.condition.wait_for(lambda: self.failed or self.turn == core or other in self.done)
            if core in self.answers:
                return self.answers.pop(core)
            if self.failed:
                raise _OtherCoreFailed("the other core failed")
            raise self._alone(core, key[0])

    @staticmethod
    def _alone(core: int, what: str) -> SimulatorError:
        return SimulatorError(f"core {core} waits at {what}, and core {1 - core} has ended: it would wait forever")

    def shared(self, core: int, storage: Storage) -> Storage:
        mine, theirs = self.tensors[core], self.tensors[1 - core]
        position = len(mine)
        if position < len(theirs):
            other = theirs[position]
            if (other.shape, other.dtype, other.name) != (storage.shape, storage.dtype, storage.name):
                raise SimulatorError(
                    f"nl.ndarray: core {core} allocates {storage!r} where core {1 - core} has {other!r}: both cores "
                    "must allocate the same tensors in shared HBM, in the same order"
                )
            storage = other
        mine.append(storage)
        return storage

    def execute(self, cores: list[Core], call: Callable[[], Any]) -> list[Any]:
        """What `call` returns on each core. Each core has a thread of its own."""
        results: list[Any] = [None, None]
        errors: list[BaseException | None] = [None, None]

        def body(core: Core) -> None:
            failed = True
            try:
                self.start(core.id)
                results[core.id] = execute(core, call)
                failed = False
            except BaseException as e:
                errors[core.id] = e
            finally:
                self.finish(core.id, failed=failed)

        threads = [threading.Thread(target=body, args=(core,), daemon=True) for core in cores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        raised = [e for e in errors if e is not None]
        if raised:
            raise next((e for e in raised if not isinstance(e, _OtherCoreFailed)), raised[0])
        return results
