"""Whether the Neuron SDK is installed. Packages of its names that are empty do not count."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec


def sdk_is_installed() -> bool:
    """Whether torch tensors on a Neuron device can launch kernels."""
    return has("torch_neuronx", "trace") or has("nki", "jit")


def has(package: str, attribute: str) -> bool:
    """Whether a package is installed and has an attribute that an empty package of its name lacks."""
    try:
        return find_spec(package) is not None and hasattr(import_module(package), attribute)
    except (ImportError, ValueError):
        return False
