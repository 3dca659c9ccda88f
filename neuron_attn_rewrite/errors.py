"""The errors and the warning of this package. Each message says what is wrong, where, and what to do."""

from __future__ import annotations


class RewriteError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(RewriteError, ValueError):
    """A `RewriteConfig` field is unknown or has an impossible value."""


class CaptureError(RewriteError, RuntimeError):
    """The model could not be turned into one graph with shapes."""


class InputError(RewriteError, TypeError):
    """The arguments of a call do not fit what was captured."""


class KernelError(RewriteError, RuntimeError):
    """The kernel of a launch is not installed."""


class DeviceError(RewriteError, RuntimeError):
    """There is no Neuron device to run on."""


class TraceError(RewriteError, RuntimeError):
    """A module does not lower as it should, or torch-xla is not installed."""


class RewriteWarning(UserWarning):
    """The rewrite succeeded, but the user should check something."""


class SimulatorError(RewriteError, RuntimeError):
    """A NKI kernel does something that the NKI documentation forbids or that the simulator does not model."""
