"""Which module of a model the graphs compute: the whole model, or the part of a multimodal model that reads text.

A multimodal model merges what its towers find into the embeddings of its tokens, computes positions and sometimes
masks, and calls its text part with them. All this stays as it is. Only the text part and the towers are replaced.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.errors import CaptureError, InputError
from neuron_attn_rewrite.generation.fit import (
    Sizes,
    Window,
    has_tensors,
    merged,
    of_all_tokens,
    to_mask,
    to_positions,
    without_none,
    zeros_like,
)
from neuron_attn_rewrite.generation.step import CACHES, Names
from neuron_attn_rewrite.generation.tokens import random_tokens

EMBEDDINGS = "inputs_embeds"
MEDIA = re.compile(r"pixel_|image|video|vision|audio|input_features|input_values|cross_attention_states")
"""In the name of an input that is no text."""
IGNORED = ("use_cache", "return_dict", "cache_position")
"""Inputs of a model that the graphs do not need."""

Forward = Callable[..., Any]


def text_part(model: Any) -> str:
    """The name of the module that the graphs compute. Empty for the whole model.

    Of a model that takes more than text, it is the outermost module that takes embeddings and a cache, and text alone.
    """
    if not _takes_media(model) or model.config.is_encoder_decoder:
        return ""
    for name, module in model.named_modules():
        parameters = _parameters(module)
        if name and EMBEDDINGS in parameters and {*CACHES} & {*parameters} and not _takes_media(module):
            return str(name)
    return ""


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _takes_media(module: nn.Module) -> bool:
    return any(MEDIA.search(name) for name in _parameters(module))


def with_forwards(model: Any, forwards: Mapping[str, Forward]) -> Any:
    """The model with other functions as `forward` of some of its modules. It shares all else with the model.

    Attributes that the model sets on itself while it runs are set on the copy.
    """
    new = copy.copy(model)
    new._modules = dict(model._modules)
    if "" in forwards:
        new.forward = forwards[""]
    inner: dict[str, dict[str, Forward]] = {}
    for path, forward in forwards.items():
        if path:
            first, _, rest = path.partition(".")
            inner.setdefault(first, {})[rest] = forward
    for name, those in inner.items():
        new._modules[name] = with_forwards(model._modules[name], those)
    return new


@dataclass(frozen=True)
class Part:
    """The module that the graphs compute, and what it is called with."""

    path: str
    """Its name in the model. Empty for the model itself."""
    module: Any
    names: Names
    usual: Mapping[str, Any]
    """What a text part is called with, as `inputs` gives it. Empty for a whole model, which is called with tokens."""
    output: Any
    """The class of what it gives."""
    result: str
    """The first entry of it."""

    @classmethod
    def of(cls, model: Any, batch: int, length: int, examples: Sequence[Mapping[str, Any]]) -> Part:
        """The text part of a multimodal model, or the whole model.

        Args:
            model: a model of transformers.
            batch: the number of sequences.
            length: how many tokens a prompt has at most.
            examples: inputs with media, as for `generate`.

        Raises:
            CaptureError: the model does not run, or calls its text part in a way that is not known.
        """
        path = text_part(model)
        if not path:
            from transformers.utils.generic import ModelOutput

            return cls(path, model, Names.of(model), {}, ModelOutput, "logits")
        module = model.get_submodule(path)
        calls = _all_calls(model, path, [*examples, _text(model, batch, length)])
        names = replace(Names.of(module, EMBEDDINGS), keep=None)
        outputs = calls[0].outputs
        if not hasattr(outputs, "keys"):
            raise CaptureError(f"{path} gives a {type(outputs).__name__}, and not an output of transformers.")
        seen: dict[str, Any] = {}
        for call in calls:
            selected = of_all_tokens(call.given, names)
            seen = {name: merged(seen.get(name), selected.get(name)) for name in {**seen, **selected}}
        known = {n: without_none(v) for n, v in seen.items() if n not in (names.cache, *IGNORED) and has_tensors(v)}
        part = cls(path, module, names, known, type(outputs), next(iter(outputs.keys())))
        return replace(part, usual=part.inputs(calls[0].given, 0))

    @property
    def prompt(self) -> str:
        """What `generate` calls the tokens."""
        return "input_ids" if self.path else self.names.tokens

    @property
    def takes_padding(self) -> bool:
        """Whether it makes its masks itself, from a mask of keys, [batch, keys]."""
        mask = self.usual.get(self.names.mask or "") if self.path else None
        return self.names.mask is not None and (not self.path or (isinstance(mask, Tensor) and mask.dim() == 2))

    def first(self, batch: int) -> dict[str, Any]:
        """Inputs of a call without a cache."""
        if not self.path:
            return {self.names.tokens: torch.zeros(batch, 1, dtype=torch.int64, device=self.module.device)}
        count = self.usual[self.names.tokens].shape[1]
        return Window(0, count, 0, (0, 0), (0, 0), batch).fit(self.usual, self.names)

    def inputs(self, given: Mapping[str, Any], cached: int) -> dict[str, Any]:
        """What the graphs need of what a text part is called with. What is absent gets the value that stands for it.

        Raises:
            InputError: it is called with what the graphs do not take, or with a mask of another kind or shape.
        """
        given = of_all_tokens(given, self.names)
        tokens = given[self.names.tokens]
        sizes = Sizes(tokens.shape[0], tokens.shape[1], cached)
        for name, value in given.items():
            if name not in (*self.usual, self.names.cache, *IGNORED) and (has_tensors(value) or value is True):
                raise InputError(
                    f"generate: the graphs were made without {name} of {self.path}. Make them with an example that "
                    "has all media that will be given: rewrite_for_generation(..., example=inputs)."
                )
        found: dict[str, Any] = {}
        for name, usual in self.usual.items():
            value = given.get(name)
            if name == self.names.mask:
                found[name] = to_mask(value, usual, sizes)
            elif name == self.names.positions:
                found[name] = to_positions(value, usual, sizes)
            elif value is None:
                found[name] = pytree.tree_map(partial(zeros_like, sizes.rows, sizes.count), usual)
            else:
                found[name] = value
        return found


@dataclass(frozen=True)
class Call:
    """A call of a module."""

    given: dict[str, Any]
    outputs: Any


def bound(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """What a call gives, by name."""
    given: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    return {name: value for name, value in given.items() if value is not None}


def _text(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs of `generate` without media."""
    length = min(8, length)
    mask = torch.ones(batch, length, dtype=torch.int64, device=model.device)
    mask[0, 0] = int(length < 2)
    return {"input_ids": random_tokens(model, batch, length), "attention_mask": mask}


def _all_calls(model: Any, path: str, offers: list[Mapping[str, Any]]) -> list[Call]:
    """The calls of a module for each of these inputs.

    Raises:
        CaptureError: the model fails.
    """
    calls: list[Call] = []
    for offer in offers:
        try:
            calls += _calls(model, path, offer)
        except Exception as error:
            with_what = ", ".join(offer)
            raise CaptureError(
                f"{type(model).__name__}.generate fails itself with {with_what}: {type(error).__name__}: {error}"
            ) from error
    return calls


def _calls(model: Any, path: str, offer: Mapping[str, Any]) -> list[Call]:
    """The calls of a module while two tokens are generated."""
    calls: list[Call] = []
    module = model.get_submodule(path)
    signature = inspect.signature(module.forward)

    @wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = module.forward(*args, **kwargs)
        calls.append(Call(bound(signature, args, kwargs), outputs))
        return outputs

    watched = with_forwards(model, {path: forward})
    watched.generate(
        **offer, do_sample=False, num_beams=1, use_cache=True, min_new_tokens=2, max_new_tokens=2, pad_token_id=0
    )
    return calls
