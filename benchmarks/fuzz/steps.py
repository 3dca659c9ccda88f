"""What programs share: the steps between the parts of an attention, and how an attack ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_attn_rewrite import RewrittenModule

PLACES = ("mask", "query", "key", "value", "scores", "weights", "output")
STEPS = 4

Step: TypeAlias = Callable[[Tensor], Tensor]

COPIES: dict[str, Step] = {
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "cast": lambda x: x.to(torch.float64).to(x.dtype),
    "idle cast": lambda x: x.to(x.dtype),
    "idle dropout": lambda x: F.dropout(x, 0.3, training=False) if x.is_floating_point() else x,
    "type_as": lambda x: x.type_as(x),
    "scale": lambda x: x * 0.75 if x.is_floating_point() else x & True,
    "cat": lambda x: torch.cat([x[..., :1], x[..., 1:]], -1),
    "repeat": lambda x: x.repeat(*[1] * x.dim()),
    "index": lambda x: x[..., torch.arange(x.shape[-1])],
    "transposed copy": lambda x: x.mT.contiguous().mT,
    "constant": lambda x: torch.full(x.shape, 1.0 if x.is_floating_point() else True),
}
"""Each gives a tensor of the same shape. Some of them return their very argument."""
VIEWS: dict[str, Step] = {
    "all": lambda x: x[:],
    "diagonal": lambda x: x.diagonal(dim1=-2, dim2=-1),
    "first half": lambda x: x.chunk(2, -1)[0],
    "slice": lambda x: x[..., 1:],
    "select": lambda x: x.select(-2, 0),
    "mT": lambda x: x.mT,
    "flat": lambda x: x.reshape(-1)[:3],
    "ravel": lambda x: x.flatten()[2:5],
    "unbind": lambda x: x.unbind(-2)[-1],
    "expanded": lambda x: x.expand(2, *x.shape)[1],
    "strided": lambda x: x.as_strided((2,), (1,)),
    "einsum": lambda x: torch.einsum("...ij->...ji", x) if x.is_floating_point() else x.mT,
    "broadcast": lambda x: torch.broadcast_tensors(x, x[..., :1])[0],
}
FLOATS: dict[str, Callable[[Tensor], object]] = {
    "zero_": lambda x: x.zero_(),
    "mul_": lambda x: x.mul_(-1.5),
    "add_": lambda x: x.add_(0.5),
    "setitem": lambda x: x.__setitem__(0, 0.25),
    "masked_fill_": lambda x: x.masked_fill_(x > 0.7, 0.1),
    "foreach": lambda x: torch._foreach_mul_([x], 0.5),
    "bits": lambda x: x.view(torch.int32).bitwise_and_(-65536),
}
BOOLS: dict[str, Callable[[Tensor], object]] = {
    "fill_": lambda x: x.fill_(True),
    "clear": lambda x: x.fill_(False),
    "logical_not_": lambda x: x.logical_not_(),
    "setitem": lambda x: x.__setitem__(0, True),
    "out": lambda x: torch.logical_not(x, out=x),
}


INTEGERS: dict[str, Callable[[Tensor], object]] = {
    "fill_": lambda x: x.fill_(1),
    "add_": lambda x: x.add_(1),
    "setitem": lambda x: x.__setitem__(0, 0),
}
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
FOLDS: dict[str, Step] = {
    "double": lambda x: x + x,
    "half": lambda x: x / 2 if x.is_floating_point() else x,
    "negate twice": lambda x: x.neg().neg() if x.dtype != torch.bool else x.logical_not().logical_not(),
    "from one": lambda x: 1 - x if x.dtype != torch.bool else ~x,
    "times": lambda x: x * 3,
    "wrap": lambda x: x * 64 * 4,
    "up and down": lambda x: x + 100 - 100 if x.dtype != torch.bool else x + x,
    "underflow": lambda x: x * 1e-30 * 1e-30 * 1e30 * 1e30 if x.dtype == torch.float32 else x,
    "clamp": lambda x: x.clamp(-1, 1) if x.dtype != torch.bool else x | x,
    "fill low": lambda x: x.masked_fill(x > 0, -30000.0) if x.is_floating_point() else x,
    "nan_to_num": lambda x: x.nan_to_num(0.5) if x.is_floating_point() else x,
}
"""Each gives other numbers of the same shape and, but for bools, of the same dtype. Some leave the range of a dtype."""


RANGES: dict[str, Step] = {
    "underflow": lambda x: x * 1e-30 * 1e-30 * 1e30 * 1e30,
    "there and back": lambda x: x / 1e15 * 1e15,
}
"""Scales whose product is about 1, and whose parts leave the range of the dtype, or not."""
COARSE: dict[str, Step] = {
    "to float16": lambda x: x.half(),
    "range of float16": lambda x: x.half() / 300 / 300 * 300 * 300,
    "far in bfloat16": lambda x: x.bfloat16() + 500 - 500,
}
"""What else is done to scores, in 16 bits."""
BIASES: dict[str, Step] = {
    "far in bfloat16": lambda x: x.bfloat16() + 1000 - 1000,
    "far in float16": lambda x: x.half() + 3000 - 3000,
    "two in bfloat16": lambda x: (x * 99).bfloat16() + (x * -98).bfloat16(),
    "two in float32": lambda x: x + x.flip(-1),
    "in float16": lambda x: x.half(),
    "in int8": lambda x: (x.clamp(-3, 3) * 60).to(torch.int8).float() / 60,
    "wrapping in int8": lambda x: ((x.clamp(-3, 3) * 30).to(torch.int8) * 8).float() / 99,
}
ENDS: dict[str, Step] = {
    "nan_to_num 1": lambda x: x.nan_to_num(1.0),
    "where isnan": lambda x: torch.where(x.isnan(), 0.5, x),
    "x == x": lambda x: x.masked_fill(x != x, 2.0),
}
"""What reads NaN behind the attention."""


@dataclass(frozen=True)
class Outcome:
    """How the attack of one seed ends."""

    words: tuple[str, ...] = ()
    """The program. Empty if the seed gives none: its sizes don't fit, or it does not run."""
    rewritten: RewrittenModule | None = None
    """None if the program was refused."""
    wrong: str | None = None
    cause: str = ""
    """Why the program was refused, if that is right."""


class Memory:
    """What happens at some places of a program. Each call of the program gets a new one."""

    def __init__(self, seeds: Mapping[str, float], numbers: bool = False) -> None:
        """`seeds`: what is drawn at each place. `numbers`: tensors are also cast, folded, and read again as outputs."""
        self.seeds, self.numbers = seeds, numbers
        self.words: list[str] = []
        self.read_again: list[Tensor] = []

    def touch(self, place: str, x: Tensor, is_input: bool = False) -> Tensor:
        """Copy, view and write a tensor, and go on with it, or with a copy from before or after a write."""
        if place not in self.seeds:
            return x
        draw, live, said = Random(self.seeds[place]), [x], [place]
        for _ in range(STEPS):
            at = draw.randrange(len(live))
            if self.numbers and draw.random() < 0.3:
                live.append(self._other_numbers(draw, live[at], said))
            elif draw.random() < 0.45:
                name = draw.choice(list(COPIES))
                live.append(COPIES[name](live[at]))
                said.append(f"{len(live) - 1} = {name}({at})")
            else:
                writes = FLOATS if x.is_floating_point() else BOOLS if x.dtype == torch.bool else INTEGERS
                view, write = draw.choice(list(VIEWS)), draw.choice(list(writes))
                if is_input and at == 0:
                    live[0] = live[0] * 1.0  # a write into an input would be one into a leaf
                writes[write](VIEWS[view](live[at]))
                said.append(f"{write}({view}({at}))")
        end = draw.randrange(len(live))
        self.words.append(f"{' '.join(said)} -> {end}")
        return live[end]

    def _other_numbers(self, draw: Random, x: Tensor, said: list[str]) -> Tensor:
        how = draw.choice(["cast", "fold", "fold", "carried", "read"])
        if how == "read":
            self.read_again.append(x.to(torch.float32).nan_to_num(7.0).clamp(-9.0, 9.0))
            said.append("read")
            return x
        kind = x.dtype if how == "fold" else draw.choice(DTYPES)
        name = "cast" if how == "cast" else draw.choice(list(FOLDS))
        said.append(name if how == "fold" else f"{name} in {str(kind).removeprefix('torch.')}")
        moved = x.to(kind)
        return (moved if how == "cast" else FOLDS[name](moved)).to(x.dtype)


def draw_places(draw: Random) -> dict[str, float]:
    """The places of `benchmarks.fuzz` at which something happens, each with a seed."""
    return {place: draw.random() for place in draw.sample(PLACES, draw.choice([1, 1, 2, 3]))}
