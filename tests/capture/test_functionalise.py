"""Random programs of views and writes: the captured graph computes what the model computes, bit for bit.

It also has the gradients of the model.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.graph.nodes import mutates
from neuron_attn_rewrite.graph.writes import Writes

PROGRAMS = 90
STEPS = 9


def without_gradients(run: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return run()


VIEWS: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "transpose": lambda r, x: x.transpose(0, -1),
    "permute": lambda r, x: x.permute(r.sample(range(x.dim()), x.dim())),
    "slice": lambda r, x: x[r.randrange(2) : 3],
    "step": lambda r, x: x[..., :: r.choice([1, 2])],
    "select": lambda r, x: x.select(r.randrange(x.dim()), 0),
    "diagonal": lambda r, x: x.diagonal(dim1=-2, dim2=-1),
    "unsqueeze": lambda r, x: x.unsqueeze(r.randrange(x.dim() + 1)),
    "squeeze": lambda r, x: x.squeeze(),
    "view": lambda r, x: x.view(-1),
    "view 2": lambda r, x: x.view(2, -1),
    "flatten": lambda r, x: x.flatten(0, 1),
    "reshape": lambda r, x: x.reshape(-1),
    "ravel": lambda r, x: x.ravel(),
    "reshape 2": lambda r, x: x.reshape(2, -1),
    "chunk": lambda r, x: x.chunk(2, r.randrange(x.dim()))[-1],
    "split": lambda r, x: x.split(1, r.randrange(x.dim()))[0],
    "unbind": lambda r, x: x.unbind(r.randrange(x.dim()))[1],
    "expand": lambda r, x: x.expand(2, *x.shape),
    "expand select": lambda r, x: x.expand(3, *x.shape)[1],
    "expand as": lambda r, x: x.expand_as(x),
    "narrow": lambda r, x: x.narrow(-1, 1, 1),
    "movedim": lambda r, x: x.movedim(0, -1),
    "mT": lambda r, x: x.mT,
    "detach": lambda r, x: x.detach(),
    "alias": lambda r, x: torch.ops.aten.alias(x),
    "to": lambda r, x: x.to(torch.float32),
    "type_as": lambda r, x: x.type_as(x),
    "contiguous": lambda r, x: x.contiguous(),
    "dropout": lambda r, x: F.dropout(x, 0.5, training=False),
    "einsum": lambda r, x: torch.einsum("...ij->...ji", x),
    "broadcast": lambda r, x: torch.broadcast_tensors(x, x)[0],
    "meshgrid": lambda r, x: torch.meshgrid(x.flatten(), x.flatten(), indexing="ij")[0][:, 0],
    "atleast": lambda r, x: torch.atleast_2d(x),
    "as_strided": lambda r, x: x.as_strided((2, 2), (2, 1)),
    "unfold": lambda r, x: x.unfold(-1, 2, 2),
    "bits": lambda r, x: x.view(torch.int32).view(torch.float32),
    "real": lambda r, x: torch.view_as_real(torch.complex(x, x))[..., 0],
    "conjugate": lambda r, x: torch.complex(x, x).conj().imag,
    "no gradient": lambda r, x: without_gradients(lambda: x * 3),
}
COPIES: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "clone": lambda r, x: x.clone(),
    "scale": lambda r, x: x * 2,
    "add": lambda r, x: x + 1,
    "zeros": lambda r, x: torch.zeros_like(x),
    "full": lambda r, x: torch.full((4, 4), 3.0),
    "double": lambda r, x: x.double().float(),
    "cat": lambda r, x: torch.cat([x, x]),
    "index": lambda r, x: x[torch.tensor([0, 1])],
    "pick": lambda r, x: torch.where(x > 0, x, 0.5),
    "cumsum": lambda r, x: x.cumsum(-1),
}
WRITES: dict[str, Callable[[random.Random, Tensor, Tensor], object]] = {
    "add_": lambda r, x, y: x.add_(1.5),
    "mul_": lambda r, x, y: x.mul_(y.sum()),
    "zero_": lambda r, x, y: x.zero_(),
    "fill_": lambda r, x, y: x.fill_(7.0),
    "copy_": lambda r, x, y: x.copy_(y.flatten()[0]),
    "masked_fill_": lambda r, x, y: x.masked_fill_(x > 1, -1.0),
    "setitem": lambda r, x, y: x.__setitem__(0, 2.5),
    "setitem view": lambda r, x, y: x.__setitem__((..., slice(0, 1)), y.flatten()[1]),
    "index_put": lambda r, x, y: x.__setitem__(torch.tensor([0, 1]), 0.25),
    "neg_": lambda r, x, y: x.neg_(),
    "addcmul": lambda r, x, y: x.add_(x, alpha=2),
    "double": lambda r, x, y: x.mul_(y.double().mean()),
    "out": lambda r, x, y: torch.add(x, 1, out=x),
    "foreach": lambda r, x, y: torch._foreach_add_([x], 1.0),
    "own": lambda r, x, y: x.add_(x.flip(0)),
    "copy expanded": lambda r, x, y: x.copy_(y.flatten()[:1].expand(x.shape)),
    "copy half": lambda r, x, y: x.copy_(x.half()),
    "setitem of a write": lambda r, x, y: x.__setitem__(0, x[0].add_(2)),
    "detached": lambda r, x, y: x.detach().mul_(2),
    "no gradient": lambda r, x, y: without_gradients(lambda: x.mul_(2)),
    "no gradient of a part": lambda r, x, y: without_gradients(lambda: x.__setitem__(0, y.flatten()[0])),
    "accumulate": lambda r, x, y: x.index_put_((torch.tensor([0, 0, 1]),), torch.tensor(2.0), accumulate=True),
    "index_add_": lambda r, x, y: x.index_add_(0, torch.tensor([0, 0]), x[:2] * 1),
    "masked_scatter_": lambda r, x, y: x.masked_scatter_(x > 0, torch.arange(64.0)),
    "cumsum_": lambda r, x, y: x.cumsum_(-1),
    "fill_diagonal_": lambda r, x, y: x.fill_diagonal_(3.0),
    "lerp_": lambda r, x, y: x.lerp_(x.flip(0), 0.5),
}
RESIZES: dict[str, Callable[[random.Random, Tensor], object]] = {
    "unsqueeze_": lambda r, x: x.unsqueeze_(0),
    "squeeze_": lambda r, x: x.squeeze_(),
    "transpose_": lambda r, x: x.transpose_(0, -1),
    "t_": lambda r, x: x.t_(),
}


class Program(nn.Module):
    """A random walk over tensors, the same at every call."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(16.0).view(4, 4))
        self.seed, self.words = seed, []
        self.failed: set[int] = set()
        """The steps that eager torch refuses, or that would change the sizes of an input."""
        self.tries = True
        self(*inputs())
        self.tries = False
        self.kept.copy_(torch.arange(16.0).view(4, 4))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        r, self.words = random.Random(self.seed), []
        live = [a, b, self.kept, a * 1.0, b + 0.5]
        own = 3  # tensors from here on are the program's own, and their sizes may change in place
        for step in range(STEPS):
            kind = r.choices(["view", "copy", "write", "resize"], [5, 2, 4, 0.5])[0]
            i = r.randrange(len(live)) if kind != "resize" else r.randrange(own, len(live))
            table = {"view": VIEWS, "copy": COPIES, "write": WRITES, "resize": RESIZES}[kind]
            name, function = r.choice(list(table.items()))  # type: ignore[attr-defined]
            given, draw = (live[i], r.choice(live)), random.Random(r.random())
            given = given if kind == "write" else given[:1]
            if self.tries and kind == "resize" and any(live[i] is x for x in (a, b, self.kept)):
                self.failed.add(step)
            if step in self.failed:
                continue
            try:
                made = function(draw, *given)
            except (RuntimeError, IndexError, ValueError):
                if not self.tries:
                    raise
                self.failed.add(step)
                continue
            self.words.append(f"{len(live)}: {name} of {i}")
            if kind in ("view", "copy") and made.numel():
                live.append(made)
        return tuple(x.clone() for x in live[own:])


def inputs() -> tuple[Tensor, Tensor]:
    return torch.arange(16.0).view(4, 4) / 8, torch.arange(8.0).view(2, 4) - 3


def differs(seed: int) -> tuple[str | None, bool]:
    """What the captured program of a seed does otherwise, and whether a write into an intermediate stayed."""
    model, shares = Program(seed), Program(seed)
    captured = capture(shares, inputs())
    writes = Writes(captured.module.graph)
    for _ in range(2):
        mine, theirs = inputs(), inputs()
        old, new = model(*theirs), captured.module(*mine)
        for kind, one, two in (
            ("outputs", old, new),
            ("inputs", theirs, mine),
            ("buffer", (model.kept,), (shares.kept,)),
        ):
            for x, y in zip(one, two, strict=True):
                if x.shape != y.shape or not torch.equal(x.nan_to_num(11.0), y.nan_to_num(11.0)):
                    return f"{kind} differ: {'; '.join(model.words)}\n{captured.module.graph}", False
    return None, writes.into_intermediates


@pytest.mark.parametrize("start", range(0, PROGRAMS, 30))
def test_a_captured_program_writes_what_the_model_writes(start: int) -> None:
    stayed = 0
    for seed in range(start, start + 30):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong, stays = differs(seed)
        assert wrong is None, f"seed {seed}: {wrong}"
        stayed += stays
    assert stayed < 25


def gradients(module: nn.Module) -> list[Tensor]:
    leaves = tuple(x.requires_grad_() for x in inputs())
    outputs = module(*(x * 1.0 for x in leaves))
    weighted = ((x.nan_to_num(0.0, 0.0, 0.0) * (1.0 + torch.arange(x.numel())).view(x.shape)).sum() for x in outputs)
    return list(torch.autograd.grad(sum(weighted) + sum(x.sum() for x in leaves), leaves))


@pytest.mark.parametrize("start", range(0, PROGRAMS, 30))
def test_a_captured_program_has_the_gradients_of_the_model(start: int) -> None:
    compared = 0
    for seed in range(start, start + 30):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = Program(seed)
            captured = capture(Program(seed), inputs()).module
            try:
                old = gradients(model)
            except RuntimeError:  # autograd does not take every write
                continue
            new = gradients(captured)
        compared += 1
        for one, two in zip(old, new, strict=True):
            assert torch.allclose(one, two, 1e-4, 1e-4), f"seed {seed}: {'; '.join(model.words)}\n{captured.graph}"
    assert compared > 15


def graph_of(function: Callable[..., Tensor], *inputs: Tensor) -> torch.fx.Graph:
    class Model(nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return function(*given)

    return capture(Model(), inputs).module.graph


def diagonal_filled(x: Tensor) -> Tensor:
    x = x.clone()
    x.diagonal().fill_(0.0)
    return x


def part_scaled(x: Tensor) -> Tensor:
    x = x.clone()
    x.chunk(2, -1)[0].mul_(3.0)
    x.unbind(0)[1].add_(1.0)
    x.view(-1)[2:5].neg_()
    x.mT.mul_(2.0)
    return x


def half_by_float(x: Tensor) -> Tensor:
    y = x.half()
    y.mul_(torch.full((4,), 1.1))
    return y


def into_others(x: Tensor) -> Tensor:
    y = torch.empty(4, 4)
    torch.matmul(x, x.mT, out=y)
    torch.mul(y[0], 2.0, out=y[1])
    torch.softmax(y, -1, out=y)
    torch.cat([x[:2], x[2:]], out=y[:, :])
    return y


@pytest.mark.parametrize(
    "function", [diagonal_filled, part_scaled, half_by_float, into_others], ids=lambda f: f.__name__
)
def test_writes_into_own_tensors_are_gone(function: Callable[..., Tensor]) -> None:
    graph, x = graph_of(function, torch.randn(4, 4)), torch.randn(4, 4)
    assert not any(mutates(node) for node in graph.nodes)
    assert graph.owning_module is not None
    assert torch.equal(graph.owning_module(x), function(x))


def test_a_copy_with_an_open_size() -> None:
    class Copies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1.0
            y.copy_(x[:, :1])
            y[:, 1:].copy_(x[0, 0])
            return y

    shapes = {"x": {0: torch.export.Dim("batch", max=64)}}
    module = capture(Copies(), (torch.randn(3, 4),), dynamic_shapes=shapes).module
    assert not any(mutates(node) for node in module.graph.nodes)
    x = torch.randn(5, 4)
    assert torch.equal(module(x), Copies()(x))


def test_a_write_of_a_size_that_depends_on_data() -> None:
    """As SigLIP 2 does: a table of positions is resized to the shape of each image."""

    class Resizes(nn.Module):
        def forward(self, x: Tensor, shape: Tensor) -> Tensor:
            height, width = shape.tolist()
            for size in (height, width):
                torch._check(size > 0)
            torch._check(height * width <= len(x))
            part = F.interpolate(x[:4, :4][None, None], size=(height, width)).reshape(height * width)
            out = torch.zeros(len(x))
            out[: height * width] = part
            return x * out

    x = torch.randn(12, 12)
    module = capture(Resizes(), (x, torch.tensor([3, 4]))).module
    assert not any(mutates(node) for node in module.graph.nodes)
    for shape in ((3, 4), (1, 1), (5, 2)):
        given = torch.randn(12, 12), torch.tensor(shape)
        assert torch.equal(module(*given), Resizes()(*given))
