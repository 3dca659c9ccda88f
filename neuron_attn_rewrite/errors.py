"""The errors and the warning that users meet. Each message says what is wrong, where, and what to do."""

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
    """A kernel was to be launched that is not there."""


class DeviceError(RewriteError, RuntimeError):
    """Something is to run on a Neuron device, and there is none."""


class TraceError(RewriteError, RuntimeError):
    """A module does not lower as it should, or can't be lowered here."""


class RewriteWarning(UserWarning):
    """The rewrite succeeded, but something in it deserves to be read."""


class SimulatorError(RewriteError, RuntimeError):
    """A NKI kernel does what the documentation of NKI forbids, or what the simulator does not model."""
