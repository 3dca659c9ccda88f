"""Measured times, which replace those of the cost model. `measure` writes the JSON file on a Neuron device.

    {"entries": [{"problem": "...", "target": "trn2", "cores": 2, "kernel": "attention_cte", "micros": 210.0}, ...]}

`kernel` is a kernel's name or "native"; `problem` is the key that `key` gives.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from neuron_attn_rewrite.errors import ConfigError, DeviceError
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy.cost import Time

SPREAD = 1.1
"""The factor by which a measured time may be off."""


def key(problem: AttentionProblem) -> str:
    """The problem as a string, without its scale."""
    p = problem
    extras = [f"bias{list(p.bias_shape)}"] if p.bias_shape else []
    extras += ["softcap"] if p.softcap is not None else []
    extras += ["sink"] if p.sink else []
    extras += [f"prior{p.prior.keys}"] if p.prior is not None else []
    shape = f"{p.batch}x{p.num_heads}/{p.num_kv_heads}x{p.q_len}x{p.kv_len}x{p.head_dim}/{p.v_head_dim}"
    return " ".join([shape, str(p.dtype).removeprefix("torch."), str(p.mask), *extras])


class Profile:
    """Measured times by problem, target, cores and kernel."""

    def __init__(self, entries: Iterable[dict[str, Any]]) -> None:
        self.times = {(e["problem"], e["target"], e["cores"], e["kernel"]): float(e["micros"]) for e in entries}

    def time(self, kernel: str, problem: AttentionProblem, target: str, cores: int) -> Time | None:
        """The measured time. None if there is none."""
        micros = self.times.get((key(problem), target, cores, kernel))
        return None if micros is None else Time(micros, SPREAD, "a measurement")


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: float) -> Profile:
    try:
        return Profile(json.loads(Path(path).read_text(encoding="utf-8"))["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"RewriteConfig.profile={path!r} is no profile: {type(error).__name__} {error}.") from error


def read(path: str) -> Profile:
    """The profile in a file.

    Raises:
        ConfigError: the file is not there, or is no profile.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"RewriteConfig.profile={path!r} is not a file: `neuron-attn-rewrite profile` writes one.")
    return _read(path, os.path.getmtime(path))


def device() -> torch.device:
    """The Neuron device of this machine.

    Raises:
        DeviceError: there is none.
    """
    if find_spec("torch_xla") is None or find_spec("torch_neuronx") is None:
        raise DeviceError(
            "No Neuron device here: torch_xla and torch_neuronx are not installed. Times are measured on the instance "
            "that runs the model; without them the cost model decides."
        )
    from torch_xla import runtime  # type: ignore[import-not-found,unused-ignore]
    from torch_xla.core import xla_model  # type: ignore[import-not-found,unused-ignore]

    if runtime.device_type() != "NEURON":
        raise DeviceError(f"No Neuron device here: torch_xla runs on {runtime.device_type()}.")
    found: torch.device = xla_model.xla_device()
    return found


def measure(
    calls: Iterable[tuple[AttentionProblem, str, Callable[[torch.device], Callable[[], Any]]]],
    path: str,
    *,
    target: str,
    cores: int,
    repeats: int = 20,
) -> int:
    """Time calls on the Neuron device of this machine and write them as a profile; gives the number of entries.

    Args:
        calls: problem, kernel name or "native", and what makes the call on a device: operands made once, then run.

    Raises:
        DeviceError: there is no Neuron device.
    """
    where = device()
    entries = []
    for problem, kernel, make in calls:
        run = make(where)
        micros = _median_micros(run, repeats)
        entries.append({"problem": key(problem), "target": target, "cores": cores, "kernel": kernel, "micros": micros})
    Path(path).write_text(json.dumps({"entries": entries}, indent=1) + "\n", encoding="utf-8")
    return len(entries)


def _median_micros(run: Callable[[], Any], repeats: int) -> float:
    from torch_xla.core import xla_model  # type: ignore[import-not-found,unused-ignore]

    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        xla_model.mark_step()
        xla_model.wait_device_ops()
        times.append(time.perf_counter() - start)
    # The first two compile and load.
    return sorted(times[2:])[repeats // 2] * 1e6
