"""Failed captures: whether the caller's inputs are to blame, and what torch.export prints is kept off the terminal."""

from __future__ import annotations

import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.capture.handed import closed
from neuron_attn_rewrite.errors import InputError

TRACERS = r"torch\.(export|_export|fx|_dynamo|_functorch|_higher_order_ops|_subclasses)\b"
"""The modules of torch whose warnings are about tensors and nodes that a caller does not know."""
_PACKAGES = tuple(str(Path(path).parent) + os.sep for path in (str(torch.__file__), str(Path(__file__).parent)))
"""Where the lines are that are not the model's."""
MOST_WEIGHTS = 2**28
"""The most weights of a model that is run once to see whether it fails without a tracer too."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch.export logs, prints and warns of: errors are raised anyway. TORCH_LOGS shows everything."""
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch")]
    shown = [logger for logger in loggers if not logger.disabled]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", module=TRACERS)
        for logger in shown:
            logger.disabled = True
        try:
            yield
        finally:
            for logger in shown:
                logger.disabled = False


def value_needed(error: Exception | None) -> str:
    """A sentence about the line of the model that needs values while it is traced. Empty if that is not the error."""
    if error is None or type(error).__name__ != "GuardOnDataDependentSymNode":
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((*_PACKAGES, "<"))]
    where = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}" if own else "some line"
    return (
        f"At {where}, the model needs the value of a tensor (of item(), int() or bool(), or of a mask as an index), "
        "and a graph has no values: compute with the tensor itself, or choose with torch.where.\n  "
    )


def check_dynamic_shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> None:
    """Check what torch.export does not say clearly about `dynamic_shapes`.

    Raises:
        InputError: they are no dict, tuple or list, or name a dim that an example input does not have, or a range
            without the size of the example.
    """
    if dynamic_shapes is None:
        return
    if not isinstance(dynamic_shapes, (dict, tuple, list)):
        raise InputError(
            "dynamic_shapes must be a dict by the names of the inputs, or a tuple, as for torch.export.export, not "
            f"{type(dynamic_shapes).__name__}."
        )
    given: Any = (*args, *kwargs.values())
    if isinstance(dynamic_shapes, dict):
        for name, value in kwargs.items():
            _check_shape(f"dynamic_shapes[{name!r}]", value, dynamic_shapes.get(name))
        if len(dynamic_shapes) == len(given) and not dynamic_shapes.keys() & kwargs.keys():
            _check_shape("dynamic_shapes", given, tuple(dynamic_shapes.values()))
    else:
        _check_shape("dynamic_shapes", given, dynamic_shapes)


def _check_shape(where: str, value: Any, shape: Any) -> None:
    """The same for one input, or for several of them in a list, tuple or dict."""
    if not isinstance(value, Tensor):
        pairs = (
            [(name, value[name], shape[name]) for name in value if name in shape]
            if isinstance(value, Mapping) and isinstance(shape, Mapping)
            else list(zip(range(len(value)), value, shape, strict=False))
            if isinstance(value, (tuple, list)) and isinstance(shape, (tuple, list))
            else []
        )
        for name, part, of_part in pairs:
            _check_shape(f"{where}[{name!r}]", part, of_part)
        return
    dims = (
        dict(shape) if isinstance(shape, dict) else dict(enumerate(shape)) if isinstance(shape, (tuple, list)) else {}
    )
    for dim, size in dims.items():
        if not isinstance(dim, int) or not 0 <= dim < value.dim():
            raise InputError(
                f"{where} names dim {dim!r}, but the example input is {list(value.shape)}: its dims are "
                f"{', '.join(map(str, range(value.dim()))) or 'none'}."
            )
        low, high = getattr(size, "min", None), getattr(size, "max", None)
        if isinstance(low, int) and isinstance(high, int) and not low <= value.shape[dim] <= high:
            raise InputError(
                f"{where}[{dim}] has the range [{low}, {high}], but the example input has the size "
                f"{value.shape[dim]} there: pass an example within the range, or change the range."
            )


def refuse_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception | None) -> None:
    """Raise an `InputError` if a capture failed because of what the caller gave.

    A model without too many weights is run once without a tracer, on copies of its inputs and buffers.

    Raises:
        InputError: `dynamic_shapes` do not fit the example inputs, or the model itself fails on these.
    """
    from torch._dynamo.exc import UserError, UserErrorType  # takes a second to import

    if isinstance(error, UserError) and error.error_type is UserErrorType.INVALID_INPUT:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"dynamic_shapes do not fit the example inputs: {first}") from error
    tensors = [*model.parameters(), *model.buffers()]
    if sum(t.numel() for t in tensors) > MOST_WEIGHTS or any(t.is_meta for t in tensors):
        return
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    copies = closed(pytree.tree_map_only(Tensor, torch.clone, (args, dict(kwargs))))
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.func.functional_call(model, buffers, *copies)
    except Exception as fault:
        words = " ".join(str(fault).split()).rstrip(".")
        raise InputError(
            f"{type(model).__name__} itself fails on the example inputs: {type(fault).__name__}: {words:.300}. Pass "
            "inputs with which a call of the model works."
        ) from fault
