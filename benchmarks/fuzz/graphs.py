"""Graphs of real models with random steps between their parts.

A tiny model of transformers is exported. Near its attentions, a few tensors are copied, viewed, written through views,
cast, folded and read again. Masks come in any dtype, and a part of the graph may run under autocast, with a part of it
that does not. The changed graph is then a model of its own. In some programs a tensor of the model changes after the
rewrite: then the rewritten model must follow or refuse the call. Bad calls must end in an error of ours.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks.fuzz.abuse import Call, badly_taken, edited
from benchmarks.fuzz.steps import DTYPES, Memory, Outcome
from benchmarks.zoo.examine import difference, outputs, rounding
from benchmarks.zoo.inputs import paddings
from benchmarks.zoo.tiny import ready
from neuron_attn_rewrite import FlashAttentionStrategy, RewriteConfig, RewriteError, RewrittenModule, rewrite

MODELS = tuple(
    """
    albert bart bert biogpt bloom clip_text_model codegen deberta distilbert electra esm falcon gemma2 gpt2 gpt_neo
    gpt_neox gptj llama m2m_100 marian mistral mpnet mpt opt phi qwen2 roberta squeezebert t5 vit whisper xglm
    """.split()
)
CONFIG = RewriteConfig(policy="always", verify=False)
NATIVE = replace(CONFIG, strategy=FlashAttentionStrategy.NONE)
TOLERANCE, TOLERANCE_OF_HALF = 1e-3, 5e-2
"""Of the largest number of an output, beside what rounding the weights anew changes. The second one is for programs
that compute in bfloat16."""
TOLERANCE_OF_CAPTURE = 1e-5
"""The same for a graph in which nothing is replaced: it runs the operators of the program."""
STEPS_NEAR = {"all_input_nodes": 14, "users": 4}
"""How many operators before and behind an attention count as near."""
ATTENTIONS = ("softmax", "_softmax", "scaled_dot_product_attention")

CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)
"""What export checks its inputs by. Without it, the graph takes masks of any dtype."""

CAUSES = {"is not the model": "export gives another model"}
"""Refusals that are right: what their errors say, and how they are counted."""

Regions = list[tuple[str, str, bool]]
"""Where autocast is on or off: the first and the last node, the outer region first."""


class Changed(nn.Module):
    """An exported model that touches the tensors of some nodes before they are read further."""

    def __init__(self, module: fx.GraphModule, places: list[str], regions: Regions, draw: Random) -> None:
        super().__init__()
        self.module, self.regions = module, regions
        self.seeds = {place: draw.random() for place in places}
        self.words: list[str] = []
        self.inputs = [str(n.target) for n in module.graph.find_nodes(op="placeholder")]

    def forward(self, **call: Tensor) -> Any:
        steps = Memory(self.seeds, numbers=True)
        found = _Touching(self.module, steps, self.regions).run(*[call[name] for name in self.inputs])
        self.words = [*(f"{'autocast' if on else 'no autocast'} {a}..{b}" for a, b, on in self.regions), *steps.words]
        return found, steps.read_again


class _Touching(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, steps: Memory, regions: Regions) -> None:
        super().__init__(module)
        self.steps, self.regions = steps, regions
        self.open: list[torch.autocast] = []

    def run(self, *args: Any) -> Any:
        try:
            return super().run(*args)
        finally:
            while self.open:
                self.open.pop().__exit__(None, None, None)

    def run_node(self, n: fx.Node) -> Any:
        for first, _, on in self.regions:
            if n.name == first:
                self._float_again(not on)
                self.open.append(torch.autocast("cpu", torch.bfloat16, enabled=on))
                self.open[-1].__enter__()
        value = super().run_node(n)
        if n.name in self.steps.seeds:
            value = self.steps.touch(n.name, value, is_input=n.op == "placeholder")
        for _, last, on in self.regions:
            if n.name == last:
                self.open.pop().__exit__(None, None, None)
                self.env[n] = value
                self._float_again(on)
                value = self.env[n]
        return value

    def _float_again(self, is_needed: bool) -> None:
        """Cast what autocast has made, as models do behind it: operators take no two dtypes."""
        if is_needed:
            self.env = {n: v.float() if _is_bfloat16(v) else v for n, v in self.env.items()}


def _is_bfloat16(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


@functools.cache
def exported(name: str, implementation: str) -> tuple[fx.GraphModule, dict[str, Call]]:
    """The graph of a tiny model, and calls of it: "ones" first, then with padding."""
    model, example = ready(name, implementation)
    calls = paddings(model, example) or {"ones": dict(example)}
    call = calls["ones"]
    module = torch.export.export(model, (), dict(call), strict=False).module()
    assert isinstance(module, fx.GraphModule)
    for node in [n for n in module.graph.nodes if n.op == "call_module" or n.target in CHECKS]:
        module.graph.erase_node(node)
    module.recompile()
    return module, calls


def near_attentions(graph: fx.Graph) -> list[str]:
    """The floating-point, integer and bool tensors some operators before and behind a softmax."""
    ends = [n for n in graph.nodes if any(n.name.startswith(word) for word in ATTENTIONS)]
    found: dict[fx.Node, None] = dict.fromkeys(ends)
    for towards, steps in STEPS_NEAR.items():
        reached = dict.fromkeys(ends)
        for _ in range(steps):
            following = (m for n in reached for m in getattr(n, towards) if m.op in ("call_function", "placeholder"))
            reached = dict.fromkeys(following)
            found |= reached
    return [n.name for n in found if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dim()]


def draw_regions(graph: fx.Graph, near: list[str], draw: Random) -> Regions:
    """Mostly none; else one region of autocast, perhaps with one inside that turns it off."""
    names = [n.name for n in graph.nodes if n.op == "call_function"]
    known = [i for i, name in enumerate(names) if name in near]
    if len(known) < 8 or draw.random() < 0.7:
        return []
    half = len(known) // 2
    a, b, c, d = *sorted(draw.sample(known[:half], 2)), *sorted(draw.sample(known[half:], 2))
    outer = (names[a], names[d], True)
    return [outer, (names[b], names[c], False)] if draw.random() < 0.4 else [outer]


def with_masks(call: Call, kind: torch.dtype) -> Call:
    """The same call with masks of another dtype."""
    return {name: t.to(kind) if _is_mask(name, t) else t for name, t in call.items()}


def _is_mask(name: str, t: Tensor) -> bool:
    return "mask" in name and t.dtype == torch.int64


def hostile(calls: dict[str, Call], seed: int) -> list[Call]:
    """Each call with other random numbers in its inputs, one with random masks, and one with other strides."""
    torch.manual_seed(seed)
    found = []
    for call in (*calls.values(), calls["ones"], calls["ones"]):
        found.append({name: _other(name, t) for name, t in call.items()})
    for name, t in found[-2].items():
        if _is_mask(name, t):
            found[-2][name] = (torch.rand(t.shape) < torch.rand(())).to(t.dtype)
    found[-1] = {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in found[-1].items()}
    return found


def _other(name: str, t: Tensor) -> Tensor:
    if "mask" in name or t.dtype == torch.bool:
        return t
    if t.is_floating_point():
        return torch.randn_like(t)
    return t.flatten()[torch.randperm(t.numel())].reshape(t.shape) if "ids" in name and "position" not in name else t


def drawn(seed: int, draw: Random) -> tuple[Changed, Call, list[Call], tuple[str, ...]] | None:
    """A program that runs, the call that it is rewritten with, others, and its words. None if the seed gives none."""
    try:
        type_name = draw.choice(MODELS)
        module, calls = exported(type_name, draw.choice(["sdpa", "eager"]))
    except Exception:  # not of this version of transformers
        return None
    near = near_attentions(module.graph)
    places = draw.sample(near, min(len(near), draw.choice([0, 1, 1, 2, 3])))
    program = Changed(module, places, draw_regions(module.graph, near, draw), draw)
    kind = draw.choice(DTYPES) if draw.random() < 0.4 else torch.int64
    benign, *others = [with_masks(call, kind) for call in (calls["ones"], *hostile(calls, seed))]
    if kind.is_floating_point:  # nothing says that such a mask holds zeros and ones only
        others.append(
            {name: torch.randn_like(t) if t.dtype == kind and "mask" in name else t for name, t in benign.items()}
        )
    try:
        outputs(program, benign)
    except Exception:  # an index that no longer fits, or a dtype that an operator does not take
        return None
    said = "" if kind == torch.int64 else f"masks in {str(kind).removeprefix('torch.')}"
    return program, benign, others, (type_name, *filter(None, [said]), *program.words)


def attack(seed: int) -> Outcome:
    """Rewrite the program of a seed on inputs without padding, and compare it with itself on others."""
    draw = Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = drawn(seed, draw)
        if found is None:
            return Outcome()
        program, benign, others, words = found
        try:
            with torch.set_grad_enabled(_takes_gradients(program, benign)):
                native = rewrite(program, (), dict(benign), config=NATIVE) if program.regions else None
                rewritten = rewrite(program, (), dict(benign), config=CONFIG)
        except RewriteError as error:
            cause = next((cause for text, cause in CAUSES.items() if text in str(error)), "")
            return Outcome(words, None, None if cause else f"{type(error).__name__}: {error}", cause)
        except Exception as error:
            return Outcome(words, None, f"{type(error).__name__}: {error}")
        wrong = native and compared(program, native, others, TOLERANCE_OF_CAPTURE, roundings=0)
        tolerance = TOLERANCE_OF_HALF if program.regions else TOLERANCE
        is_edited = draw.random() < 0.2
        with edited(program, rewritten, draw) if is_edited else contextlib.nullcontext("") as how:
            wrong = wrong or compared(program, rewritten, others, tolerance, may_refuse=is_edited)
        wrong = f"{wrong}, {how}" if wrong and how else wrong
        return Outcome(words, rewritten, wrong or badly_taken(rewritten, benign, draw))


def _takes_gradients(program: nn.Module, call: Call) -> bool:
    """Whether a program runs with gradients. One that writes into a view of a parameter runs without them only."""
    try:
        program(**{name: t.clone() for name, t in call.items()})
    except RuntimeError:
        return False
    return True


def lost_to_autocast(program: nn.Module, call: Call, outputs_of_program: list[Tensor]) -> float:
    """How far the program is from itself without autocast. A result that is nearer to the program is rounded anew."""
    regions, program.regions = program.regions, []
    try:
        return difference(outputs_of_program, outputs(program, call))
    finally:
        program.regions = regions


def compared(
    program: nn.Module,
    other: RewrittenModule,
    calls: list[Call],
    tolerance: float,
    roundings: int = 30,
    may_refuse: bool = False,
) -> str | None:
    """How a rewritten program differs from the program itself on some calls. None if it does not."""
    for number, call in enumerate(calls):
        try:
            old = outputs(program, call)
        except Exception:  # the program itself does not take these
            continue
        try:
            new = outputs(other, call)
        except RewriteError as error:
            return None if may_refuse else f"inputs {number}: {type(error).__name__}: {error}"
        except Exception as error:
            return f"inputs {number}: {type(error).__name__}: {error}"
        if [t.dtype for t in new] != [t.dtype for t in old]:
            return f"inputs {number}: other dtypes"
        error = difference(new, old)
        if error <= tolerance or error <= tolerance + roundings * rounding(program, call):
            continue
        if not roundings or error > lost_to_autocast(program, call, old):
            return f"inputs {number}: differ by {error:.1e}"
    return None
