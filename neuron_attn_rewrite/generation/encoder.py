"""The encoder of a model: graphs for inputs of fixed shape."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from neuron_attn_rewrite.errors import CaptureError, InputError
from neuron_attn_rewrite.generation.fit import whole_numbers
from neuron_attn_rewrite.generation.step import Names
from neuron_attn_rewrite.generation.tokens import random_tokens

TOKENS, MASK = "input_ids", "attention_mask"
Tensors: TypeAlias = dict[str, Tensor]


class Encode(nn.Module):
    """An encoder as a function of tensors alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.training = encoder.training

    def forward(self, inputs: Tensors) -> Tensors:
        """The tensors of the encoder's output, by name."""
        return tensors_of(self.encoder(**inputs, return_dict=True))


def tensors_of(output: Any) -> Tensors:
    """The tensors of an output of transformers, by name."""
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Encoder:
    """What the graphs of an encoder take and give."""

    main: str
    """Its first input: `input_ids`, or a name of features."""
    examples: dict[str, Tensors]
    """Inputs for each graph, by its name, the smallest first. They have the shapes that it takes."""
    kind: type
    """The class of its output."""
    output: Tensors
    """What the encoder gives for the last example. The graphs of the decoder take these shapes."""
    filling: int
    """A token that takes the place of none."""

    @classmethod
    def of(
        cls, model: Any, names: Names, batch: int, lengths: Sequence[int], given: Mapping[str, Any] | None
    ) -> Encoder:
        """Examples for the encoder of a model of transformers, and its output.

        Args:
            model: an encoder-decoder model.
            names: what it calls its inputs.
            batch: how many sequences the graphs take.
            lengths: of inputs of tokens, increasing.
            given: inputs for `generate`, for an encoder that takes features.

        Raises:
            InputError: `given` is missing, or does not fit the encoder.
            CaptureError: the encoder fails, or its output is no output of transformers.
        """
        encoder = model.get_encoder()
        main = getattr(encoder, "main_input_name", TOKENS)
        if main == TOKENS:
            masks = names.encoder_mask is not None and MASK in inspect.signature(encoder.forward).parameters
            examples = {f"encoder[{n}]": _tokens(model, batch, n, masks) for n in lengths}
        elif given is not None and isinstance(given.get(main), Tensor):
            examples = {"encoder": {name: _whole(given[name], batch) for name in (main, MASK) if name in given}}
        else:
            raise InputError(
                f"rewrite_for_generation: the encoder of {type(model).__name__} takes {main}, whose shape is not "
                f"known. Give an example with {main}, as the processor of the model makes it."
            )
        try:
            with torch.no_grad():
                output = encoder(**list(examples.values())[-1], return_dict=True)
            found = tensors_of(output)
        except Exception as error:
            raise CaptureError(
                f"the encoder of {type(model).__name__} fails: {type(error).__name__}: {error}"
            ) from error
        filling = getattr(model.config, "pad_token_id", None)
        return cls(main, examples, type(output), found, filling if isinstance(filling, int) and filling >= 0 else 0)

    @property
    def takes_tokens(self) -> bool:
        """Whether inputs can be filled up: with tokens that the mask hides."""
        return self.main == TOKENS and MASK in self.last

    @property
    def last(self) -> Tensors:
        """The largest inputs."""
        return list(self.examples.values())[-1]

    def tensors(self, names: Names) -> dict[str, Any]:
        """What the graphs of the decoder take of the encoder, by name."""
        found: dict[str, Any] = {str(names.encoder_outputs): self.output}
        return found | ({str(names.encoder_mask): self.last[MASK]} if names.encoder_mask and MASK in self.last else {})

    def given(self, names: Names) -> dict[str, Any]:
        """What the model takes of the encoder, by name."""
        return self.tensors(names) | {str(names.encoder_outputs): self.kind(**self.output)}

    def fit(self, given: Mapping[str, Any]) -> tuple[str, Tensors]:
        """The graph that takes the inputs of a caller, and these inputs in the shape that it takes, but for the batch.

        Raises:
            InputError: there is none.
        """
        main = given.get(self.main)
        if not isinstance(main, Tensor):
            raise InputError(f"generate: the encoder needs {self.main}, a tensor.")
        for name, value in given.items():
            known = name in self.last or (name == MASK and isinstance(value, Tensor) and bool(value.all()))
            if not known and (isinstance(value, Tensor) or (value is True and name not in HARMLESS)):
                raise InputError(f"generate: the graph of the encoder was made without {name}, and can't take it.")
        mask = given.get(MASK)
        if self.takes_tokens and isinstance(mask, Tensor) and mask.shape != main.shape:
            raise InputError(f"generate: {MASK} must be {list(main.shape)}, as {self.main}, not {list(mask.shape)}.")
        for graph, example in self.examples.items():
            inputs = {}
            for name, like in example.items():
                value = given.get(name)
                if value is None and name != MASK:
                    raise InputError(f"generate: the encoder needs {name}, as when its graph was made.")
                if value is None:
                    value = like.new_ones(len(main), *(main if self.takes_tokens else like).shape[1:])
                if not like.is_floating_point():
                    value = whole_numbers(name, value)
                inputs[name] = self._filled(value, like, self.filling if name == self.main else 0)
            if all(value.shape[1:] == example[name].shape[1:] for name, value in inputs.items()):
                return graph, inputs
        raise InputError(
            "generate: the encoder's inputs are "
            f"{ {name: list(given[name].shape) for name in self.last if given.get(name) is not None} }, and the graphs "
            f"take {[{name: list(t.shape) for name, t in each.items()} for each in self.examples.values()]}"
            f"{', or shorter ones' if self.takes_tokens else ''}."
        )

    def _filled(self, value: Tensor, like: Tensor, filling: int) -> Tensor:
        if not self.takes_tokens or value.dim() != 2:
            return value
        return nn.functional.pad(value, (0, max(like.shape[1] - value.shape[1], 0)), value=filling)

    def cut(self, output: Tensors, given: Mapping[str, Any]) -> Any:
        """The output of a graph without what was filled in, as the class that the encoder gives."""
        rows, length = given[self.main].shape[:2]
        found = {
            name: t[:rows, :length] if self.takes_tokens and t.dim() > 1 else t[:rows] for name, t in output.items()
        }
        return self.kind(**found)

    def for_decoder(self, output: Any, mask: Tensor | None) -> tuple[Tensors, Tensor | None]:
        """An output of the encoder, and the mask of its input, in the shapes that the decoder takes.

        Args:
            output: as the encoder gives it, or a tuple with the hidden state.
            mask: [batch, length], as the caller gives it.

        Raises:
            InputError: they are too long, or something is missing.
        """
        given = dict(zip(self.output, output, strict=False)) if isinstance(output, (tuple, list)) else dict(output)
        found = {}
        for name, like in self.output.items():
            value = given.get(name)
            if not isinstance(value, Tensor) or value.dim() != like.dim() or value.shape[1] > like.shape[1]:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(
                    f"generate: {name} of encoder_outputs is {shape}, and the graphs take {list(like.shape)}."
                )
            found[name] = lengthen(value, like.shape[1]) if like.dim() > 1 else value
        if MASK not in self.last:
            return found, None
        like = self.last[MASK]
        size = next(iter(given.values())).shape[:2] if self.takes_tokens else like.shape
        if mask is None:
            mask = like.new_ones(size)
        elif self.takes_tokens and mask.shape != size:
            raise InputError(f"generate: {MASK} must be {list(size)}, as encoder_outputs, not {list(mask.shape)}.")
        return found, lengthen(mask, like.shape[1]).to(like.dtype)


HARMLESS = ("return_dict", "use_cache")


def lengthen(tensor: Tensor, length: int) -> Tensor:
    """Zeros at the end of dim 1."""
    missing = length - tensor.shape[1]
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1) if missing else tensor


def _tokens(model: Any, batch: int, length: int, masks: bool) -> Tensors:
    tokens = random_tokens(model, batch, length, encoder=True)
    mask = torch.ones_like(tokens)
    mask[0, length // 2 + 1 :] = 0  # with padding, so that the model builds a mask from it
    return {TOKENS: tokens, MASK: mask} if masks else {TOKENS: tokens}


def _whole(tensor: Tensor, batch: int) -> Tensor:
    """As many rows as the graphs take."""
    return tensor[torch.arange(batch, device=tensor.device) % len(tensor)]
