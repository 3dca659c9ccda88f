"""Graphs of real models with random steps between their parts.

A tiny model of transformers is exported. Near its attentions, a few tensors are copied, viewed, written through views,
cast, folded and read again. The changed graph is then a model of its own. In some programs a buffer changes after the
rewrite: then the rewritten model must follow or refuse the call.
"""

from __future__ import annotations

import functools
import warnings
from random import Random
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks.fuzz.steps import Memory, Outcome
from benchmarks.zoo.examine import difference, outputs, rounding
from benchmarks.zoo.inputs import paddings
from benchmarks.zoo.tiny import ready
from neuron_attn_rewrite import RewriteConfig, RewriteError, rewrite

MODELS = tuple(
    """
    albert bart bert biogpt bloom clip_text_model codegen deberta distilbert electra esm falcon gemma2 gpt2 gpt_neo
    gpt_neox gptj llama m2m_100 marian mistral mpnet mpt opt phi qwen2 roberta squeezebert t5 vit whisper xglm
    """.split()
)
CONFIG = RewriteConfig(policy="always", verify=False)
TOLERANCE = 1e-3
"""Of the largest number of an output, beside what rounding the weights anew changes."""
STEPS_NEAR = {"all_input_nodes": 14, "users": 4}
"""How many operators before and behind an attention count as near."""
ATTENTIONS = ("softmax", "_softmax", "scaled_dot_product_attention")

NOT_TAKEN = ("is not the model", "itself fails")
"""What an error says where the program is at fault: it runs without gradients only, or export gives another model."""


class Changed(nn.Module):
    """An exported model that touches the tensors of some nodes before they are read further."""

    def __init__(self, module: fx.GraphModule, places: list[str], draw: Random) -> None:
        super().__init__()
        self.module = module
        self.seeds = {place: draw.random() for place in places}
        self.words: list[str] = []
        self.inputs = [str(n.target) for n in module.graph.find_nodes(op="placeholder")]

    def forward(self, **call: Tensor) -> Any:
        steps = Memory(self.seeds, numbers=True)
        found = _Touching(self.module, steps).run(*[call[name] for name in self.inputs])
        self.words = steps.words
        return found, steps.read_again


class _Touching(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, steps: Memory) -> None:
        super().__init__(module)
        self.steps = steps

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return self.steps.touch(n.name, value, is_input=n.op == "placeholder") if n.name in self.steps.seeds else value


@functools.cache
def exported(name: str, implementation: str) -> tuple[fx.GraphModule, dict[str, dict[str, Tensor]]]:
    """The graph of a tiny model, and calls of it: "ones" first, then with padding."""
    model, example = ready(name, implementation)
    calls = paddings(model, example) or {"ones": dict(example)}
    call = calls["ones"]
    module = torch.export.export(model, (), dict(call), strict=False).module()
    assert isinstance(module, fx.GraphModule)
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


def hostile(calls: dict[str, dict[str, Tensor]], seed: int) -> list[dict[str, Tensor]]:
    """Each call with other random numbers in its inputs, and one with random masks."""
    torch.manual_seed(seed)
    found = []
    for call in (*calls.values(), calls["ones"]):
        found.append({name: _other(name, t) for name, t in call.items()})
    for name, t in found[-1].items():
        if "mask" in name and not t.is_floating_point():
            found[-1][name] = (torch.rand(t.shape) < torch.rand(())).to(t.dtype)
    return found


def _other(name: str, t: Tensor) -> Tensor:
    if "mask" in name or t.dtype == torch.bool:
        return t
    if t.is_floating_point():
        return torch.randn_like(t)
    return t.flatten()[torch.randperm(t.numel())].reshape(t.shape) if "ids" in name and "position" not in name else t


def attack(seed: int) -> Outcome:
    """Rewrite the program of a seed on inputs without padding, and compare it with itself on others."""
    draw = Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            type_name = draw.choice(MODELS)
            module, calls = exported(type_name, draw.choice(["sdpa", "eager"]))
        except Exception:  # not of this version of transformers
            return Outcome()
        near = near_attentions(module.graph)
        program = Changed(module, draw.sample(near, min(len(near), draw.choice([0, 1, 1, 2, 3]))), draw)
        benign = calls["ones"]
        try:
            outputs(program, benign)
        except Exception:  # an index that no longer fits, or a dtype that an operator does not take
            return Outcome()
        words = (type_name, *program.words)
        try:
            rewritten = rewrite(program, (), dict(benign), config=CONFIG)
        except RewriteError as error:
            is_fault = not any(text in str(error) for text in NOT_TAKEN)
            return Outcome(words, None, f"{type(error).__name__}: {error}" if is_fault else None)
        except Exception as error:
            return Outcome(words, None, f"{type(error).__name__}: {error}")
    edited = _edited(module, draw) if draw.random() < 0.2 else None
    try:
        for number, call in enumerate(hostile(calls, seed)):
            try:
                old = outputs(program, call)
            except Exception:  # the program itself does not take these
                continue
            try:
                new = outputs(rewritten, call)
            except RewriteError:
                if edited is None:
                    raise
                break
            error = difference(new, old)
            if error > TOLERANCE and error > TOLERANCE + 30 * rounding(program, call):
                changed = f", {edited} changed" if edited else ""
                return Outcome(words, rewritten, f"inputs {number}: differ by {error:.1e}{changed}")
    except Exception as error:
        return Outcome(words, rewritten, f"inputs {number}: {type(error).__name__}: {error}")
    finally:
        if edited is not None:
            exported.cache_clear()
    return Outcome(words, rewritten)


def _edited(module: fx.GraphModule, draw: Random) -> str | None:
    """Change a tensor that the model holds, in place. Gives its name."""
    held = [(name, t) for name, t in module.named_buffers() if t.numel()]
    if not held:
        return None
    name, t = draw.choice(held)
    with torch.no_grad():
        t.copy_(~t if t.dtype == torch.bool else t.flip(-1) if t.dim() else t + 1)
    return name
