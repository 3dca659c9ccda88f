"""Which parts of the Neuron stack are installed, and what to do about the others."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from neuron_attn_rewrite.kernels import vendor

SETUP = "the Neuron package repository, see the Neuron SDK's setup guide"
OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    state: str
    """`OK`, `NOTE` or `PROBLEM`."""
    what: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """All findings about this machine, from Python up to the devices."""
    return [finding for check in CHECKS for finding in check()]


def _python() -> Iterator[Finding]:
    yield Finding(OK, "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    for name, advice in (
        ("torch", "pip install 'torch>=2.8'"),
        ("transformers", "pip install transformers, for models by type or config"),
        (
            "torch-xla",
            "it comes with torch-neuronx; from there, or pip install torch-xla",
        ),
    ):
        found = _distribution(name)
        missing = NOTE if name != "torch" else PROBLEM
        yield Finding(OK, name, found.version) if found else Finding(missing, name, "not installed", advice)


def _neuron() -> Iterator[Finding]:
    for name, module, what in (
        ("torch-neuronx", "torch_neuronx", "traces and runs models on Neuron devices"),
        ("neuronx-cc", "neuronxcc", "compiles them"),
        ("nki", "nki", "compiles kernels"),
        ("nki-library", "nkilib", "has the SDK's own attention kernels"),
        ("neuronx-distributed-inference", "neuronx_distributed_inference", "has a sliding window kernel"),
    ):
        found = _distribution(name)
        if found is None and find_spec(module) is None:
            yield Finding(NOTE, name, f"not installed ({what})", f"it is in {SETUP}")
        elif found is not None and is_placeholder(found, module):
            yield Finding(
                PROBLEM,
                name,
                f"{found.version} is an empty placeholder",
                f"pip uninstall {name}; the real one is in {SETUP}",
            )
        else:
            yield Finding(OK, name, found.version if found else "found, of unknown version")


def _kernels() -> Iterator[Finding]:
    for name, adapter in vendor.ADAPTERS.items():
        places = ", ".join(place.replace(":", ".") for place in adapter.places)
        here = vendor.find(name)
        yield Finding(OK if here else NOTE, f"kernel {name}", "can be called" if here else f"not found in {places}")


def _devices() -> Iterator[Finding]:
    devices = sorted(path.name for path in Path("/dev").glob("neuron*"))
    if devices:
        yield Finding(OK, "devices", ", ".join(devices))
    else:
        advice = "rewriting and checking need none; trace for a device on an instance that has it"
        yield Finding(NOTE, "devices", "none", advice)


def _environment() -> Iterator[Finding]:
    for name, meaning in (
        ("NEURON_LOGICAL_NC_CONFIG", "cores in a logical NeuronCore; RewriteConfig.lnc must be the same"),
        ("NEURON_RT_VISIBLE_CORES", "cores that the runtime may use"),
        ("NEURON_PLATFORM_TARGET_OVERRIDE", "target of the compiler; RewriteConfig.target must be the same"),
        ("NEURON_CC_FLAGS", "options of the compiler"),
        ("PJRT_DEVICE", "device that torch_xla runs on"),
    ):
        if name in os.environ:
            yield Finding(NOTE, name, os.environ[name], meaning)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _packages, _neuron, _kernels, _devices, _environment)


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def is_placeholder(found: Distribution, module: str) -> bool:
    """Whether a distribution has the name of a Neuron package but not its code: less than 1000 bytes."""
    files = [Path(str(found.locate_file(file))) for file in found.files or [] if str(file).startswith(module)]
    return sum(file.stat().st_size for file in files if file.suffix in (".py", ".so") and file.is_file()) < 1000
