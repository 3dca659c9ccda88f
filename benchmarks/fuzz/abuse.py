"""What callers do to a rewritten model: they change tensors that it shares with the original, and call it wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import Random

import torch
from torch import Tensor, nn

from neuron_attn_rewrite import RewriteError, RewrittenModule
from neuron_attn_rewrite.module import PROVEN_VALUES

Call = dict[str, Tensor]

EDITS: dict[str, Callable[[nn.Module, str, Tensor], object]] = {
    "written in place": lambda model, name, new: _tensors(model)[name].copy_(new),
    "written by a view": lambda model, name, new: _tensors(model)[name].view(-1).copy_(new.reshape(-1)),
    "loaded": lambda model, name, new: model.load_state_dict({name: new}, strict=False),
}
"""Ways to give a tensor of the original model another value. A tensor that is in no state_dict keeps it if loaded."""

BAD: dict[str, Callable[[Tensor], object]] = {
    "one more dim": lambda t: t[None],
    "one element less": lambda t: t[..., :-1],
    "twice the batch": lambda t: torch.cat([t, t]),
    "no element": lambda t: t[:0],
    "double": lambda t: t.double(),
    "int16": lambda t: t.to(torch.int16),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "None": lambda t: None,
    "a number": lambda t: 3,
    "a text": lambda t: "ids",
    "a list": lambda t: [t],
    "nested lists": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
}
"""What no input may be. An input that already has the dtype is left alone."""


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextmanager
def edited(model: nn.Module, rewritten: RewrittenModule, draw: Random) -> Iterator[str]:
    """Within the block, a tensor of the model has another value, most often one that a proof depends on.

    Gives the name of the tensor, and how it was changed; "" if the model holds no tensor.
    """
    held = {name: t for name, t in _tensors(model).items() if t.numel()}
    proven = [name for name in rewritten.meta[PROVEN_VALUES] if name in held]
    names = proven if proven and draw.random() < 0.8 else [name for name, _ in model.named_buffers() if name in held]
    if not names:
        yield ""
        return
    name, how = draw.choice(names), draw.choice(list(EDITS))
    t = held[name]
    saved = t.detach().clone()
    with torch.no_grad():
        EDITS[how](model, name, ~t if t.dtype == torch.bool else t.flip(-1) if t.dim() else t + 1)
    try:
        yield f"{name} {how}"
    finally:
        with torch.no_grad():
            t.copy_(saved)


def bad_calls(call: Call, draw: Random) -> Iterator[tuple[str, tuple[Tensor, ...], Mapping[str, object]]]:
    """Calls that no rewritten model may take: what is bad, and the arguments by position and by name."""
    name = draw.choice(list(call))
    t, how = call[name], draw.choice(list(BAD))
    bad = BAD[how](t)
    if not (
        isinstance(bad, Tensor)
        and (bad.dtype, bad.shape, bad.layout, bad.device) == (t.dtype, t.shape, t.layout, t.device)
    ):
        yield f"{name} is {how}", (), {**call, name: bad}
    yield f"{name} is missing", (), {key: value for key, value in call.items() if key != name}
    yield "one input more", (), {**call, "more": t}
    yield f"{name} is given twice", tuple(call.values()), {name: t}


def badly_taken(rewritten: RewrittenModule, call: Call, draw: Random) -> str | None:
    """How the model takes bad calls, if not by an error of ours."""
    for what, args, kwargs in bad_calls(call, draw):
        try:
            with torch.no_grad():
                rewritten(*args, **kwargs)
        except RewriteError:
            continue
        except Exception as error:
            return f"{what}: raw {type(error).__name__}: {error}"
        return f"{what}: no error"
    return None
