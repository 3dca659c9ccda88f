"""From a config of transformers to a model. Weights that need no values take no memory."""

from __future__ import annotations

import re
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neuron_attn_rewrite.cli.configs import import_transformers, why
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
    torch.manual_seed(0)
    try:
        kind = _model_class(transformers, config)
        if weights is not None:
            model = kind.from_pretrained(weights, config=config, **options)
        elif numbers:
            model = kind._from_config(config, **options)
        else:
            with Weightless():
                model = kind._from_config(config, **options)
    except InputError:
        raise
    except Exception as error:  # transformers raises many kinds of errors
        raise InputError(f"transformers can't build {name}: {why(error)}") from error
    give_stand_ins(model)
    model.eval()
    assert isinstance(model, nn.Module)
    return model


def give_stand_ins(model: nn.Module) -> None:
    """Replace every tensor on the meta device by a parameter, whose values no proof reads.

    All of them share zeros of the size of the largest one. Nothing writes to them, so the system provides no pages.
    """
    places = [(m, name) for m in model.modules() for name in (*m._parameters, *m._buffers)]
    found = [(m, name, t) for m, name in places if isinstance(t := getattr(m, name), Tensor) and t.is_meta]
    size = max((t.nbytes for _, _, t in found), default=1)
    memory = torch.frombuffer(mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS), dtype=torch.uint8)
    made: dict[int, nn.Parameter] = {}
    for module, name, tensor in found:
        if id(tensor) not in made:
            shape = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            made[id(tensor)] = nn.Parameter(shape, requires_grad=False)
        module._buffers.pop(name, None)
        module._parameters[name] = made[id(tensor)]


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the config names, else one with a language head, else the model without a head, else any.

    A class made for this kind of config comes first: the one with a language head may be the text model alone.
    """
    tables = transformers.models.auto.modeling_auto
    named = next(iter(getattr(config, "architectures", None) or ()), None)
    seq2seq, causal, bare = (
        getattr(tables, f"MODEL{task}_MAPPING_NAMES") for task in ("_FOR_SEQ_TO_SEQ_CAUSAL_LM", "_FOR_CAUSAL_LM", "")
    )
    kind, masked = config.model_type, tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    is_seq2seq = getattr(config, "is_encoder_decoder", False) or kind not in bare
    order = [seq2seq] if is_seq2seq else [] if kind in masked else [causal]
    others = [table for name, table in vars(tables).items() if re.fullmatch(r"MODEL_FOR_\w+_MAPPING_NAMES", name)]
    names = [named, *(table.get(kind) for table in (*order, bare, *others))]
    each = [one for name in names for one in (name if isinstance(name, (list, tuple)) else (name,))]
    found = [made for one in each if (made := getattr(transformers, one or "", None)) is not None]
    fitting = [made for made in found if isinstance(config, getattr(made, "config_class", None) or ())]
    if not found:
        raise InputError(f"transformers has no model class for a config of {kind}.")
    return next(iter(fitting or found))
