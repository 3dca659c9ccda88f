"""From a function in the user's file to a model and inputs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neuron_attn_rewrite.errors import InputError


def from_function(file: Path, function: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model, positional inputs and keyword inputs that `function()` in `file` returns.

    Raises:
        InputError: there is no such function, it fails, or it returns something else than (model, inputs).
    """
    if not file.is_file():
        raise InputError(f"{file} is not a file.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        sys.modules[file.stem] = module
        with _errors_of(str(file)):
            spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    made = getattr(module, function, None)
    if not callable(made):
        raise InputError(f"{file} has no function {function!r}.")
    with _errors_of(f"{file}:{function}"):
        result = made()
    model, given = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
    if not isinstance(model, nn.Module) or not isinstance(given, (tuple, list, dict, Tensor)):
        raise InputError(
            f"{file}:{function} must return (model, inputs): a module, and a tuple or dict of example inputs."
        )
    if isinstance(given, dict):
        return model, (), given
    return model, (given,) if isinstance(given, Tensor) else tuple(given), {}


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Turn an error in the user's code into an `InputError` that names the code."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what} fails: {type(error).__name__}: {error} (--debug shows where)") from error
