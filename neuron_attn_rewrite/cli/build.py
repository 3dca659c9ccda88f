"""From a config of transformers to a model. Weights that need no values take no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neuron_attn_rewrite.cli.configs import first_line, import_transformers
from neuron_attn_rewrite.errors import InputError


class Weightless(TorchFunctionMode):
    """Creates weights without memory: they come from `torch.empty`, `rand` or `randn`.

    Tensors that are computed, such as masks and rotary frequencies, keep their values.
    """

    FILLED = (torch.empty, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FILLED:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(
    config: Any, name: str, dtype: torch.dtype, attn: str | None, *, weights: str | None, numbers: bool
) -> nn.Module:
    """A model in eval mode.

    Args:
        config: a config of transformers.
        name: what the user calls the model, for messages.
        dtype: dtype of the weights.
        attn: attention implementation of transformers; None for its default.
        weights: a directory with weights; None for random ones.
        numbers: whether random weights get values. Otherwise they take no memory.

    Raises:
        InputError: transformers can't build the model.
    """
    transformers = import_transformers()
    options: dict[str, Any] = {"dtype": dtype}
    if attn is not None:
        options["attn_implementation"] = attn
    auto = _auto_class(transformers, config)
    torch.manual_seed(0)
    try:
        if weights is not None:
            model = auto.from_pretrained(weights, config=config, **options)
        elif numbers:
            model = auto.from_config(config, **options)
        else:
            with Weightless():
                model = auto.from_config(config, **options)
    except Exception as error:  # transformers raises many kinds of errors
        raise InputError(f"transformers can't build {name}: {first_line(error)}") from error
    give_stand_ins(model)
    model.eval()
    assert isinstance(model, nn.Module)
    return model


def give_stand_ins(model: nn.Module) -> None:
    """Replace every tensor on the meta device by a parameter, whose values no proof reads.

    All of them share the memory of the largest one. Nothing writes to it, so the system never provides the pages.
    """
    places = [(m, name) for m in model.modules() for name in (*m._parameters, *m._buffers)]
    found = [(m, name, t) for m, name in places if isinstance(t := getattr(m, name), Tensor) and t.is_meta]
    memory = torch.empty(max((t.nbytes for _, _, t in found), default=0), dtype=torch.uint8)
    made: dict[int, nn.Parameter] = {}
    for module, name, tensor in found:
        if id(tensor) not in made:
            shape = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            made[id(tensor)] = nn.Parameter(shape, requires_grad=False)
        module._buffers.pop(name, None)
        module._parameters[name] = made[id(tensor)]


def _auto_class(transformers: Any, config: Any) -> Any:
    """The class that the config names, else the class with a language head, else the model without a head."""
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    if hasattr(transformers, named):
        return _FromClass(getattr(transformers, named))
    kinds = transformers.models.auto.modeling_auto
    kind = config.model_type
    has_head = kind in kinds.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder or (has_head and kind not in kinds.MODEL_MAPPING_NAMES):
        return transformers.AutoModelForSeq2SeqLM if has_head else transformers.AutoModel
    is_decoder = kind in kinds.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in kinds.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModel


@dataclass(frozen=True)
class _FromClass:
    """A model class with the interface of an auto class."""

    kind: Any

    def from_config(self, config: Any, **options: Any) -> Any:
        return self.kind._from_config(config, **options)

    def from_pretrained(self, path: str, **options: Any) -> Any:
        return self.kind.from_pretrained(path, **options)
