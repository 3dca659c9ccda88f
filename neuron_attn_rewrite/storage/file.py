"""The file of a rewritten model: one file of safetensors, whose metadata has everything but the tensors as JSON.

A tensor that occurs under several names is in the file once. A strided tensor keeps its strides.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import InputError, RewriteError
from neuron_attn_rewrite.version import __version__

FORMAT = 1
"""The version of the file. It grows if an older version of this package can't read the file."""
KEY = "neuron_attn_rewrite"
"""The key of the metadata."""


@dataclass
class Saved:
    """The contents of a file."""

    document: dict[str, Any]
    """Everything but the tensors, as JSON."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The tensors, by name."""
    made_with: str = ""
    """The versions of this package and of torch, if they are not the present ones. Empty otherwise."""


def versions() -> str:
    """The present versions of this package and of torch."""
    return f"neuron_attn_rewrite {__version__} and torch {torch.__version__.partition('+')[0]}"


def write(path: str | Path, saved: Saved) -> None:
    """Write a file.

    Raises:
        RewriteError: safetensors is not installed, or a tensor has no values.
    """
    library = _library()
    kept: dict[tuple[Any, ...], str] = {}
    aliases, strides, plain = dict[str, str](), dict[str, list[int]](), dict[str, Tensor]()
    for name, tensor in saved.tensors.items():
        if tensor.is_meta or type(tensor.detach()) is not Tensor or tensor.layout is not torch.strided:
            what = "has no values: it is on the meta device" if tensor.is_meta else "is not a plain tensor"
            raise RewriteError(f"the weight {name!r} {what}. Save without weights: weights=False.")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in kept:
            aliases[name] = kept[place]
            continue
        kept[place] = name
        if not tensor.is_contiguous():
            strides[name] = list(tensor.stride())
        plain[name] = tensor.detach().to("cpu").contiguous()
        if plain[name].data_ptr() == tensor.data_ptr() and _is_part(tensor):
            plain[name] = plain[name].clone()
    document = {"format": FORMAT, "made_with": versions(), "aliases": aliases, "strides": strides, **saved.document}
    library.save_file(plain, str(path), metadata={"format": "pt", KEY: json.dumps(document)})


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor shows only a part of its storage, which safetensors refuses."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def overlapping(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The names of tensors of which one is a part of the other, or lies partly in it. A file would part them."""
    spans = []
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta and type(tensor.detach()) is Tensor and tensor.layout is torch.strided:
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            place = (str(tensor.device), start, start + (last + 1) * tensor.element_size())
            spans.append((*place, (tensor.shape, tensor.stride(), tensor.dtype), name))
    spans.sort(key=lambda span: span[:3])
    return [
        (one[4], two[4])
        for one, two in itertools.pairwise(spans)
        if one[0] == two[0] and two[1] < one[2] and one[1:4] != two[1:4]
    ]


def read(path: str | Path) -> Saved:
    """Read a file.

    Raises:
        RewriteError: safetensors is not installed.
        InputError: it is no such file, or another version of this package wrote it.
    """
    _library()
    library: Any = importlib.import_module("safetensors")
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        raise InputError(f"there is no file {path!r:.200} to load.")
    try:
        with library.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118
    except library.SafetensorError as error:
        raise InputError(f"{str(path)!r} is no file of a rewritten model: {error}") from error
    if text is None:
        raise InputError(f"{str(path)!r} is a file of safetensors, but RewrittenModule.save did not write it.")
    try:
        document = json.loads(text)
        found, made_with = document["format"], str(document["made_with"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is damaged: {type(error).__name__}: {error}") from error
    if found != FORMAT:
        raise InputError(
            f"{str(path)!r} was written by {made_with:.80} in format {found!r:.20}, and this package, {versions()}, "
            f"reads format {FORMAT}. Use the package that wrote it, or rewrite the model again."
        )
    saved = Saved(document, tensors, "" if made_with == versions() else made_with)
    with damaged(path, saved):
        for name, stride in document["strides"].items():
            tensors[name] = _with_strides(tensors[name], stride)
        tensors |= {name: tensors[other] for name, other in document["aliases"].items()}
    return saved


@contextlib.contextmanager
def damaged(path: str | Path, saved: Saved) -> Iterator[None]:
    """Within the block, an error of Python means that the contents of a file are not as `write` writes them.

    Raises:
        InputError: instead of such an error, or with the name of the file.
    """
    by = f", which was written by {saved.made_with:.80} and is read by {versions()}," if saved.made_with else ""
    try:
        yield
    except InputError as error:
        raise InputError(f"{str(path)!r}{by} can't be read: {error}") from error
    except RewriteError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, AssertionError, RuntimeError) as error:
        raise InputError(f"{str(path)!r}{by} is damaged: {type(error).__name__}: {error}") from error


def _with_strides(tensor: Tensor, stride: list[int]) -> Tensor:
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def _library() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        raise RewriteError("a rewritten model is saved and loaded with safetensors: pip install safetensors.") from None


def given_weights(names: Mapping[str, Any], given: Any, optional: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a model or a state dict that have these names.

    Args:
        names: the shape and the dtype of each tensor, as JSON.
        given: an nn.Module, or a dict of tensors by name.
        optional: the names of tensors that are taken if they are given.

    Raises:
        InputError: one is missing, or has another shape or dtype.
    """
    if isinstance(given, torch.nn.Module):
        given = {
            **dict(given.named_buffers(remove_duplicate=False)),
            **dict(given.named_parameters(remove_duplicate=False)),
        }
    if not isinstance(given, Mapping):
        raise InputError(f"weights must be a model or a state_dict, not {type(given).__name__}.")
    missing = [name for name in names if not isinstance(given.get(name), Tensor)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"weights has no {', '.join(missing[:3])}{more}: give the model, or its state_dict().")
    for name, (shape, dtype) in names.items():
        is_now = [list(given[name].shape), str(given[name].dtype)]
        if is_now != [shape, dtype]:
            raise InputError(f"the weight {name!r} is {is_now[1]} {is_now[0]}, and was saved as {dtype} {shape}.")
    return {name: given[name] for name in (*names, *optional) if name in given}
