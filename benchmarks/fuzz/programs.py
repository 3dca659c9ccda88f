"""Attentions drawn from a grammar.

Sizes that coincide, layouts, grouped heads, scales, softcap, masks, biases that hide keys or are rounded, sinks,
spellings of the softmax, readers of NaN, and writes in place. Gradients are compared too, unless `memory` puts copies,
views and writes through views between the mask, the scores, the operands and the output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fuzz.abuse import edited
from benchmarks.fuzz.masks import draw_mask
from benchmarks.fuzz.steps import BIASES, COARSE, DTYPES, ENDS, RANGES, Memory, Outcome, draw_places
from neuron_attn_rewrite import RewriteConfig, RewriteError, RewrittenModule, rewrite

TIMES = 3
"""On how many hostile inputs a program is compared."""
CONFIG = RewriteConfig(policy="always", verify=False)
TOLERANCE, TOLERANCE_OF_HALF = 1e-3, 5e-2
"""Of the largest number in an output or gradient: wrong masks are off by far more, sums by far less. The second one is
for scores in 16 bits."""
ROUNDING = (-1e9, -1e4)
"""Fills that leave some digits of a score."""
LOW = -(2**31) + 600
"""It hides a key. Twice it is 1200 in int32."""
APPLY = ("fill", "where", "half where", "half where", "add", "mul add", "int add", "sdpa", "sdpa add", "inplace")
FILLS = (-torch.inf, torch.finfo(torch.float32).min, *ROUNDING)


class Program(nn.Module):
    """An attention drawn from a seed: query, key, value and what masks are made of.

    With `memory`, tensors between its parts are copied, viewed and written in place.
    """

    def __init__(self, seed: int, memory: bool = False) -> None:
        super().__init__()
        draw = self.draw = Random(seed)
        self.words: list[str] = []
        some = draw.choice([(1, 2, 3, 4), (2, 4), (4,)])
        self.b, self.h, self.d, self.dv = (draw.choice(some) for _ in range(4))
        self.group = draw.choice([1, 1, 2])
        self.s = draw.choice((*some, 6, 7))
        self.t = self.s if draw.random() < 0.6 else draw.choice((*some, 5, 8))
        self.register_buffer("tril", torch.ones(9, 9, dtype=torch.bool).tril())
        self.register_buffer("steps", torch.arange(9))
        self.per_head = nn.Parameter(torch.linspace(0.5, 1.5, self.h * self.group)[:, None, None])
        self.mask = draw_mask(self, draw, (self.s, self.t), draw.choice([0, 1, 1, 2, 3]), self._say)
        self.parts = self._parts()
        self.places = draw_places(Random(-1 - seed)) if memory and self.fill not in ROUNDING else {}
        self.memory = Memory({})
        self.mask_dtype = draw.choice(DTYPES) if draw.random() < 0.4 else torch.int64
        self.low = draw.choice([0.0, 0.0, 0.0, *FILLS[:2]])
        """What hostile biases hold beside ordinary numbers."""
        self._say(f"attention_mask {self.mask_dtype} bias {self.low}")

    def inputs(self, seed: int | None) -> tuple[Tensor, ...]:
        """Benign ones for None."""
        torch.manual_seed(seed or 0)
        b, h, s, t = self.b, self.h, self.s, self.t
        q, k, v = torch.randn(b, h * self.group, s, self.d), torch.randn(b, h, t, self.d), torch.randn(b, h, t, self.dv)
        bias = torch.randn(self.draw_shape)
        if seed is None:
            ones, order = torch.ones(b, t, dtype=torch.int64), torch.arange(s).expand(b, s).contiguous()
            mask, length = ones.to(self.mask_dtype), torch.full((b,), t)
            return 2 * q, 2 * k, v, mask, ones.bool(), order, length, ones.clone(), bias
        rate = torch.rand(())
        kept = [torch.rand(b, t) < rate for _ in range(2)]
        order, ids = torch.randint(-2, t + 2, (b, s)), torch.randint(-1, 3, (b, t))
        bias = torch.where(torch.rand(self.draw_shape) < rate, bias, self.low)
        return 2 * q, 2 * k, v, kept[0].to(self.mask_dtype), kept[1], order, torch.randint(0, t + 1, (b,)), ids, bias

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor,
        keep: Tensor,
        order: Tensor,
        length: Tensor,
        ids: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Query [batch, heads, q_len, dim], key and value [batch, kv heads, kv_len, dim]."""
        self.memory = Memory(self.places)
        q, k, v = (self.memory.touch(name, x, is_input=True) for name, x in (("query", q), ("key", k), ("value", v)))
        mask = self.memory.touch("mask", self.seen(attention_mask, keep, order, length, ids))
        return self.memory.touch("output", self.parts(q, k, v, mask, bias))

    def seen(self, *leaves: Tensor) -> Tensor:
        """The mask, True where a key is seen."""
        return self.mask(dict(zip(("attention_mask", "keep", "order", "length", "ids"), leaves, strict=True)))

    def _say(self, word: object) -> None:
        self.words.append(str(word))

    def _parts(self) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
        draw, n = self.draw, self.h * self.group
        shape = (self.b, n, self.s, self.t)
        self.draw_shape = tuple(draw.choice([1, size]) for size in shape)[draw.choice([0, 0, 0, 1, 2]) :]
        number = draw.choice([0.5, -0.3, 2.0, self.d**-0.5])
        pick: dict[str, str] = {
            "heads": draw.choice(["interleave", "repeat", "expand", "gqa"]) if self.group > 1 else "same",
            "scale": draw.choice(["number", "tensor", "query", "key", "both", "head", "none", *RANGES]),
            "bias": draw.choice(["", "", "", *BIASES]),
            "order": draw.choice(["mask bias", "bias mask", "mask", "bias", "none", "mask mask"]),
            "coarse": draw.choice([""] * 9 + list(COARSE)),
            "apply": draw.choice(APPLY),
            "cap": draw.choice(["", "", "", "cap", "shifted cap"]),
            "shift": draw.choice(["", "", "max", "detached max", "number"]),
            "softmax": draw.choice(["softmax", "softmax", "float", "exp", "log", "transposed", "later", "sink"]),
            "after": draw.choice(["", "", "", "nan_to_num", "again", "scaled", "clone", "detach"]),
            "layout": draw.choice(["BHSD", "BSHD", "folded", "einsum"]),
            "end": draw.choice(["", "", *ENDS]),
        }
        fill = draw.choice(FILLS)
        is_half = pick["coarse"] or pick["apply"] == "half where"
        self.fill = -torch.inf if pick["apply"] == "half where" and fill < -1e5 else fill  # as float16 has it
        self.tolerance = TOLERANCE_OF_HALF if is_half else TOLERANCE
        for word in (*pick.items(), fill, self.draw_shape, (self.b, self.h, self.group, self.s, self.t, self.d)):
            self._say(word)

        def masked(x: Tensor, mask: Tensor) -> Tensor:
            if pick["apply"] == "where":
                return torch.where(mask, x, fill)
            if pick["apply"] in ("add", "sdpa add"):
                return x + torch.zeros(mask.shape).masked_fill(~mask, fill)
            if pick["apply"] == "int add":  # where both hide, the sum wraps
                hidden = [torch.ones(self.s, self.t).triu(far).to(torch.int32) for far in (1, 2)]
                return x + (hidden[0] * LOW + hidden[1] * LOW)
            if pick["apply"] == "half where":
                return torch.where(mask, x.half(), torch.full((), fill))
            if pick["apply"] == "mul add" and fill > -torch.inf:
                return x + (1.0 - mask.float()) * fill
            return x.masked_fill_(~mask, fill) if pick["apply"] == "inplace" else x.masked_fill(~mask, fill)

        def grouped(x: Tensor) -> Tensor:
            if pick["heads"] == "repeat":
                return x.repeat(1, self.group, 1, 1)
            if pick["heads"] == "expand":
                return x[:, :, None].expand(-1, -1, self.group, -1, -1).reshape(x.shape[0], n, *x.shape[2:])
            return x if pick["heads"] == "same" else x.repeat_interleave(self.group, 1)

        def product(a: Tensor, b: Tensor) -> Tensor:
            if pick["layout"] == "einsum":
                return torch.einsum("bhij,bhjk->bhik", a, b)
            if pick["layout"] == "folded":
                return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
            return a @ b

        def weights(x: Tensor, v: Tensor) -> Tensor:
            how = pick["softmax"]
            if how == "exp":
                e = torch.exp(x - x.amax(-1, keepdim=True))
                return e / e.sum(-1, keepdim=True)
            if how == "log":
                return torch.log_softmax(x, -1).exp()
            if how == "float":
                return torch.softmax(x.float(), -1, dtype=torch.float32).to(v.dtype)
            if how == "transposed":
                return torch.softmax(x.mT, -2).mT
            if how == "sink":
                sinks = self.per_head.expand(self.b, n, self.s, 1)
                return torch.softmax(torch.cat([x, sinks], -1), -1)[..., :-1]
            return torch.softmax(x, -1)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
            bias = BIASES[pick["bias"]](bias) if pick["bias"] else bias
            out = attention(q, k, v, mask, bias)
            return ENDS[pick["end"]](out) if pick["end"] else out

        def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
            if pick["layout"] == "BSHD":
                q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
            if pick["apply"].startswith("sdpa"):
                term = mask if pick["apply"] == "sdpa" else torch.where(mask, 0.0, fill)
                term = term + bias if pick["order"] == "mask bias" and term.dtype != torch.bool else term
                if pick["heads"] == "gqa":
                    return F.scaled_dot_product_attention(q, k, v, term, scale=abs(number), enable_gqa=True)
                return F.scaled_dot_product_attention(q, grouped(k), grouped(v), term, scale=abs(number))
            k, v, how = grouped(k), grouped(v), pick["scale"]
            q = q * number if how in ("query", "both") else q
            k = k / 2 if how in ("key", "both") else k
            x = product(q, k.mT)
            x = x * number if how == "number" else x * torch.tensor(number) if how == "tensor" else x
            x = RANGES[how](x) if how in RANGES else x * self.per_head if how == "head" else x
            x = COARSE[pick["coarse"]](x) if pick["coarse"] else x
            if pick["cap"]:
                x = 3 * torch.tanh((x + 1 if pick["cap"] == "shifted cap" else x) / 3)
            for step in pick["order"].split():
                x = masked(x, mask) if step == "mask" else x + bias if step == "bias" else x
            if "max" in pick["shift"]:
                largest = x.amax(-1, keepdim=True)
                x = x - (largest.detach() if pick["shift"] == "detached max" else largest)
            x = x - 1 if pick["shift"] == "number" else x
            if pick["softmax"] == "later":
                e = torch.exp(x - x.amax(-1, keepdim=True)).to(v.dtype)
                return product(e, v) / e.sum(-1, keepdim=True)
            w = self.memory.touch("weights", weights(self.memory.touch("scores", x), v).to(v.dtype))
            w = w.nan_to_num(0.0) if pick["after"] == "nan_to_num" else w
            w = w.masked_fill(~mask, 0.0) if pick["after"] == "again" else w
            w = w * self.per_head if pick["after"] == "scaled" else w
            w = w.clone() if pick["after"] == "clone" else w.detach() if pick["after"] == "detach" else w
            return product(w, v)

        return attend


def differs(old: Tensor, new: Tensor, tolerance: float) -> bool:
    """Where the model gives a number. Outputs and gradients are of the order of 1."""
    number = old.isfinite()
    old, new = (torch.where(number, x.double(), 0) for x in (old, new))
    return not bool(((old - new).abs() <= tolerance * old.abs().max().clamp_min(1.0)).all())


def run(module: nn.Module, inputs: tuple[Tensor, ...], with_gradients: bool) -> list[Tensor]:
    """The output, and the gradients of every floating-point input and parameter."""
    given = [t.clone().requires_grad_(with_gradients and t.is_floating_point()) for t in inputs]
    out = module(*given)
    if not out.requires_grad:
        return [out]
    torch.manual_seed(1)
    weighted = torch.where(out.isfinite(), out * torch.randn(out.shape), 0).sum()
    wanted = [t for t in (*given, *module.parameters()) if t.requires_grad]
    found = torch.autograd.grad(weighted, wanted, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True))]


def attack(seed: int, memory: bool = False) -> Outcome:
    """Rewrite the program of a seed on benign inputs, and compare it with itself on hostile ones."""
    program = Program(seed, memory)
    try:
        run(program, program.inputs(None), False)
    except (RuntimeError, IndexError, ValueError):  # its sizes don't fit
        return Outcome()
    words = (*program.words, *program.memory.words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rewritten = rewrite(program, program.inputs(None), config=CONFIG)
        except Exception as error:
            return Outcome(words, None, f"{type(error).__name__}: {error}")
    wrong = None
    for other in (None, *range(1, TIMES + 1)):
        wrong = wrong or compared(program, rewritten, other, memory)
    draw = Random(-2 - seed)
    if wrong or draw.random() < 0.3:
        return Outcome(words, rewritten, wrong)
    with edited(program, rewritten, draw) as how:
        return Outcome(words, rewritten, compared(program, rewritten, 1, memory, how))


def compared(program: Program, rewritten: RewrittenModule, seed: int | None, memory: bool, how: str = "") -> str | None:
    """How the rewritten program differs from the program on the inputs of a seed. None if it does not.

    `how` says how the program was changed since the rewrite: then the call may be refused.
    """
    inputs, where = program.inputs(seed), f"inputs {seed} {how}"
    old = run(program, inputs, with_gradients=not memory)
    try:
        new = run(rewritten, inputs, with_gradients=not memory)
    except Exception as error:
        return None if how and isinstance(error, RewriteError) else f"{where}: {type(error).__name__}: {error}"
    # A row that sees no key, or gives NaN, has no gradient that means something. Nor an output, where the scores
    # are rounded to what is left of them beside a large number.
    sees = program.seen(*inputs[3:8])
    sees = (sees & (inputs[8] > ROUNDING[0]) if program.low else sees).any(-1, keepdim=True)
    means = bool(sees.all()) and bool(old[0].isfinite().all())
    if program.fill in ROUNDING:
        old[0], new[0] = (torch.where(sees, out, 0) for out in (old[0], new[0]))
    for i, (a, b) in enumerate(zip(old if means else old[:1], new, strict=False)):
        if differs(a, b, program.tolerance):
            return f"{where}: {'output' if i == 0 else f'gradient {i - 1}'} differs"
    return None
