"""Draws inputs to compare with: other numbers, and padding, masks and positions that the example does not have.

A claim about a mask holds for every value of its inputs, so an example without padding says little about it. What an
input may hold is read from the example and from the graph:

* bool tensors, and integer tensors that are masks by their name, hold zeros and ones;
* a floating-point tensor that is added to the scores as it is hides keys by a large negative number;
* positions and lengths lie between 0 and the size of what they index, or the number of keys;
* all other integers, such as tokens, are those of the example in another order;
* all other floating-point tensors have the mean and the spread of the example.

Weights, and what is not a tensor, keep their values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, fx, nn

from neuron_attn_rewrite.graph.nodes import arguments, dtype, is_tensor, op_name, plain_name, shape, values_read
from neuron_attn_rewrite.graph.sizes import LARGEST
from neuron_attn_rewrite.patterns.site import MASKED
from neuron_attn_rewrite.patterns.views import CASTS
from neuron_attn_rewrite.replace.graft import Graft
from neuron_attn_rewrite.values.cells import ELEMENTWISE, MOVEMENT
from neuron_attn_rewrite.values.evaluator import is_mask_input

WEIGHTS = re.compile(r"(parameters|buffers)_")
"""In the name of an input of a compiled graph that is a weight of the model."""
FILLS = (-1e4, torch.finfo(torch.float16).min)
"""Numbers that hide keys, in every dtype. The first one rounds the scores behind it, the other absorbs them."""
LEARNED = frozenset("matmul bmm mm addmm baddbmm linear einsum embedding conv1d conv2d conv3d layer_norm".split())
"""Operators that mix an input with weights. What is behind them is not read as a mask."""

Pattern = Callable[[int, int, Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Draw:
    """Values for the placeholders."""

    words: str
    """What they are, such as "with padding on the left"."""
    seed: int
    tries: tuple[tuple[Any, ...], ...]
    """The values, one for each placeholder. The later ones are for models that raise an error on the earlier ones."""


def _right(rows: int, keys: int, g: Generator) -> Tensor:
    """At most half of each row is padding, and nothing of the first of several rows."""
    count = torch.randint(1, max(2, keys // 2 + 1), (rows, 1), generator=g)
    if rows > 1:
        count[0] = 0
    return torch.arange(keys) < keys - count


def _left(rows: int, keys: int, g: Generator) -> Tensor:
    return _right(rows, keys, g).flip(1)


def _anywhere(rows: int, keys: int, g: Generator) -> Tensor:
    return torch.rand(rows, keys, generator=g) < 0.7


def _nothing(rows: int, keys: int, g: Generator) -> Tensor:
    """The last row and some others are empty."""
    empty = torch.rand(rows, 1, generator=g) < 0.2
    empty[-1] = True
    return _anywhere(rows, keys, g) & ~empty


PATTERNS: Mapping[str, Pattern] = {
    "with padding on the left": _left,
    "with padding on the right": _right,
    "with keys hidden at random": _anywhere,
    "with a row that sees no key": _nothing,
}
"""The elements that are seen, for a number of rows of keys: bool [rows, keys]."""


def draws(graph: fx.Graph, grafts: Sequence[Graft], inputs: Sequence[Any]) -> list[Draw]:
    """One draw for each of `PATTERNS`. If no input hides a key, one draw with other numbers.

    If the caller promised right padding, all draws have right padding.

    The same graph and inputs always give the same draws. No tensor of `inputs` is changed.
    """
    known = _Inputs(grafts)
    given = list(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    of_masks = [isinstance(v, Tensor) and known.is_of_mask(n, v) for n, v in given]
    found = []
    for seed, (words, pattern) in enumerate(_kinds(grafts) if any(of_masks) else [("with other numbers", _anywhere)]):
        g = Generator().manual_seed(seed)
        every = tuple(known.draw(n, v, seed, pattern, g) if isinstance(v, Tensor) else v for n, v in given)
        # Positions and tokens may be bound to each other in ways that the graph does not show.
        zero_one = tuple(
            new if isinstance(v, Tensor) and (_is_zero_one(n, v) or v.is_floating_point()) else v
            for (n, v), new in zip(given, every, strict=True)
        )
        found.append(Draw(words, seed, (every, zero_one) if any(of_masks) else (every,)))
    return found


def _kinds(grafts: Sequence[Graft]) -> list[tuple[str, Pattern]]:
    if any(g.proof.promised for g in grafts):
        return [("with padding on the right", _right)] * 3
    return list(PATTERNS.items())


class _Inputs:
    """What the inputs of a graph are used for."""

    def __init__(self, grafts: Sequence[Graft]) -> None:
        sites = [g.verdict.site for g in grafts]
        forms = [g.verdict.form.site for g in grafts if g.verdict.form]
        operands = {o.node for site in (*sites, *forms) for o in site.operands}
        terms = [term for site in sites for term in site.terms]
        vectors = [p.node for g in grafts for p in (*g.proof.paddings, *g.proof.promised)]
        bounds = [n for g in grafts for n in g.added if is_tensor(n) and not dtype(n).is_floating_point]
        ends = [*(term.node for term in terms), *vectors, *bounds]
        self.of_masks = _behind(ends, lambda n: n not in operands and op_name(n) not in LEARNED)
        """The nodes that a mask of some attention is computed from."""
        self.added = _behind(
            [term.node for term in terms if term.kind == "add"],
            lambda n: n not in operands and (n.op == "placeholder" or op_name(n) in ELEMENTWISE | MOVEMENT),
        )
        """The nodes that are added to scores, up to factors and other sums."""
        self.longest = max((g.verdict.example.kv_len for g in grafts), default=0)

    def is_of_mask(self, node: fx.Node, value: Tensor) -> bool:
        """Whether other values of this input may hide other keys."""
        if isinstance(value, nn.Parameter) or value.numel() == 0 or WEIGHTS.search(node.name):
            return False
        if value.is_floating_point():
            return node in self.added
        return node in self.of_masks or (_is_zero_one(node, value) and value.dim() > 0)

    def draw(self, node: fx.Node, value: Tensor, seed: int, pattern: Pattern, g: Generator) -> Tensor:
        """Other values for one input."""
        if isinstance(value, nn.Parameter) or value.numel() == 0 or value.is_complex() or value.is_meta:
            return value
        if WEIGHTS.search(node.name) or (value.is_floating_point() and value.requires_grad and value.is_leaf):
            return value
        keys = value.shape[-1] if value.dim() else 1
        known = value.detach().cpu()
        seen = pattern(value.numel() // keys, keys, g).reshape(value.shape)
        if value.is_floating_point():
            drawn = self._numbers(node, known.double(), seen, g)
        elif not _is_zero_one(node, value):
            drawn = self._integers(node, known, seed, seen, g)
        elif value.dim():
            drawn = seen if known.double().mean() >= 0.5 else ~seen
        else:
            return value
        return drawn.to(value.device, value.dtype)

    def _numbers(self, node: fx.Node, known: Tensor, seen: Tensor, g: Generator) -> Tensor:
        if node in self.added and _all_in(known, 0.0, 1.0) and bool(known.any()):
            return seen
        high = known[(known > MASKED) & known.isfinite()]
        spread = float(high.std()) if high.numel() > 1 else 0.0
        drawn = torch.randn(known.shape, generator=g).double() * (spread if spread > 0 else 1.0)
        if node in self.added:
            is_mask = _all_in(known, 0.0) or bool((known <= MASKED).any())
            rows = torch.arange(known.numel() // max(1, known.shape[-1] if known.dim() else 1))
            fills = torch.tensor(FILLS, dtype=torch.float64)[(len(rows) - 1 - rows) % 2]
            fill = fills.reshape(*known.shape[:-1], *[1] * (known.dim() > 0))
            return torch.where(seen, torch.zeros(()).double() if is_mask else drawn, fill)
        if bool(known.any()) and bool((known >= 0).all()):
            return _shuffled(known, g)
        return drawn + known.mean().nan_to_num(0.0, 0.0, 0.0)

    def _integers(self, node: fx.Node, known: Tensor, seed: int, seen: Tensor, g: Generator) -> Tensor:
        """Tokens, positions or lengths. Positions are shifted, sorted or in any order: each draw has another kind."""
        if node not in self.of_masks:
            return _shuffled(known, g)
        low, high = int(known.min()), int(known.max())
        use = _use_of(node)
        if use.sizes:
            low, high = 0, min(use.sizes) - 1
        elif not use.is_index_after_arithmetic:
            low, high = min(low, 0), max(high, self.longest)
        legal = [number for number in use.compared_to if low <= number <= high]
        if legal:
            return torch.where(seen, _shuffled(known, g), legal[0])
        if seed == 0:
            step = torch.randint(min(0, low - int(known.min())), max(1, high - int(known.max()) + 1), (), generator=g)
            return known + step
        count = known.shape[-1] if known.dim() else 1
        rows = known.numel() // count
        if 1 < count <= high - low + 1:
            drawn = torch.stack([torch.randperm(high - low + 1, generator=g)[:count] for _ in range(rows)]) + low
        else:
            drawn = torch.randint(low, high + 1, (rows, count), generator=g)
        return (drawn.sort(-1).values if seed == 1 else drawn).reshape(known.shape)


@dataclass(frozen=True)
class _Use:
    """What a graph does with an integer input."""

    sizes: tuple[int, ...]
    """The sizes of the dims into which it points."""
    is_index_after_arithmetic: bool
    """Whether numbers that are computed from it point into something."""
    compared_to: tuple[int, ...]
    """The numbers that the graph compares it with."""


def _use_of(node: fx.Node) -> _Use:
    sizes, numbers, arithmetic = [], [], False
    stack, seen = [(node, False)], set()
    while stack:
        at, is_computed = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        for user in at.users:
            pointed, name = _pointed_into(user, at), plain_name(user)
            if pointed:
                sizes += [] if is_computed else pointed
                arithmetic |= is_computed
            elif name in ("eq", "ne") and isinstance(user.args[1], int) and not is_computed:
                numbers.append(user.args[1])
            elif (name == "logical_not" or (name in CASTS and dtype(user) == torch.bool)) and not is_computed:
                numbers.append(0)
            elif is_tensor(user) and not dtype(user).is_floating_point and dtype(user) != torch.bool:
                stack.append((user, is_computed or not (name in MOVEMENT or name in CASTS)))
    return _Use(tuple(sizes), arithmetic, tuple(numbers))


def _pointed_into(user: fx.Node, index: fx.Node) -> list[int]:
    """The sizes of the dims into which a tensor of integers points, in one call that reads it."""
    if not isinstance(user.target, torch._ops.OpOverload):
        return []
    name, given = plain_name(user).partition(".")[0].removesuffix("_"), arguments(user)
    if name == "embedding":
        pairs = [(given["indices"], given["weight"], 0)]
    elif name in ("index_select", "gather", "scatter", "scatter_add", "index_copy", "index_add", "index_fill"):
        pairs = [(given["index"], given["self"], given["dim"])]
    elif name in ("index", "index_put", "_unsafe_index"):
        pairs = [(read, given["self"], dim) for dim, read in enumerate(given["indices"])]
    else:
        return []
    return [
        size
        for read, target, dim in pairs
        if read is index and is_tensor(target) and (size := shape(target)[dim]) < LARGEST
    ]


def _behind(ends: Sequence[fx.Node], enter: Callable[[fx.Node], bool]) -> Collection[fx.Node]:
    stack, found = list(ends), set()
    while stack:
        node = stack.pop()
        if node not in found and enter(node):
            found.add(node)
            stack += values_read(node)
    return found


def _is_zero_one(node: fx.Node, value: Tensor) -> bool:
    return value.dtype == torch.bool or is_mask_input(node)


def _all_in(value: Tensor, *numbers: float) -> bool:
    return bool(torch.isin(value, torch.tensor(numbers, dtype=value.dtype)).all())


def _shuffled(value: Tensor, g: Generator) -> Tensor:
    return value.flatten()[torch.randperm(value.numel(), generator=g)].reshape(value.shape)
